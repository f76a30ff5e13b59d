"""The quantisation method "lowra" of Transformers: quantise while loading, load packed, save.

`from_pretrained(path, quantization_config=LowRAConfig(bits=1.5))` plans over the checkpoint's shards first (tables and
precisions of all matrices, one tensor in memory at a time) and then packs each weight as it is loaded. A packed
checkpoint loads by copying its tensors.
"""

import contextlib
import contextvars
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..checkpoints.atomic import save_text
from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.matching import check_packed_names
from ..checkpoints.packed import PackedFiles
from ..checkpoints.targets import Target, find_targets
from ..config import FILLED_IN, PRECISIONS, LowRAConfig
from ..device import choose_device
from ..nn.packed_module import PackedModule
from ..quantization import card
from ..quantization.pack import quantize_matrix
from ..quantization.planning import Plan, Planner, learn
from ..weights.packed import TENSOR_NAMES, channel_bits
from .adapter_records import write_record
from .carried_tables import watch_tables
from .direct_loading import DirectLoading, large_dense_tensors
from .fsdp import check_fsdp
from .integrity import IntegrityCheck, packing_in_memory, write_digests_of_saved
from .loose_factors import watch_factors
from .missing_start import say_of_dequantised
from .model_patches import (
    declare_ties,
    forget_conversions,
    keep_values,
    mend_casts_to_weight_dtype,
    refuse_resizing,
    use_experts_one_by_one,
)
from .modules import make_dense, put_packed, put_stored, share_tied
from .origins import remember_packed, remember_stored
from .patching import require_patches

OPTIONS = tuple(field.name for field in dataclasses.fields(LowRAConfig) if field.name not in FILLED_IN)
_asked: contextvars.ContextVar[tuple[Any, tuple[str, ...]]] = contextvars.ContextVar("asked", default=(None, ()))


@contextlib.contextmanager
def asked_for(config: Any, options: tuple[str, ...]) -> Iterator[None]:
    """Within, a packed checkpoint that is loaded has to be what was asked for.

    Args:
        config: a LowRAConfig, or something else that is left to Transformers.
        options: those that were given.
    """
    token = _asked.set((config, options))
    try:
        yield
    finally:
        _asked.reset(token)


def _check_asked(config: LowRAConfig) -> None:
    """
    Raises:
        ValueError: the checkpoint is packed otherwise.
    """
    asked, options = _asked.get()
    if not isinstance(asked, LowRAConfig):
        return
    for name in options:
        wanted, found = getattr(asked, name), getattr(config, name)
        if wanted != found:
            raise ValueError(
                f"This checkpoint is packed already, with {name}={found}: {name}={wanted} has no effect on it. Leave "
                "quantization_config out, or load the dense model that it was packed from."
            )


@register_quantizer("lowra")
class LowRAHfQuantizer(HfQuantizer):
    """Puts packed modules in the place of the linear layers: empty for a packed checkpoint, planned for a dense one."""

    requires_calibration = False
    quantization_config: LowRAConfig

    def __init__(self, quantization_config: LowRAConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._targets: dict[str, Target] = {}
        self._targets_by_weight: dict[str, Target] = {}  # under the names of tied weights too
        self._plan: Plan | None = None
        self._loading: DirectLoading | None = None
        self._check: IntegrityCheck | None = None
        self._packed_files: PackedFiles | None = None
        self._device_map: dict | str | None = None

    def validate_environment(self, *args: Any, device_map: dict | str | None = None, **kwargs: Any) -> None:
        require_patches()
        if self.pre_quantized:
            _check_asked(self.quantization_config)
        self._device_map = device_map  # called again once "auto" and the like have been resolved
        check_fsdp()
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "DeepSpeed's ZeRO-3 loads and splits weights by itself and does not know packed ones: use FSDP2 "
                "(`fsdp_version: 2` in accelerate's configuration), or DDP, since a packed model is small."
            )
        asked = self.quantization_config
        if not self.pre_quantized and (asked.feedback or asked.reconstruct or asked.end_to_end):
            raise ValueError(
                "Quantising while loading reads no text, which feedback, reconstruct and end_to_end need: write a "
                "packed checkpoint first with `lowra quantize MODEL --calibrate FILE --output DIR` and load that."
            )
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "Quantising while loading cannot offload to disk: write a packed checkpoint first with "
                "`lowra quantize MODEL --output DIR` and load that."
            )

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Nothing: packed weights are not split over devices. The default walks all parameters to find that out."""

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes that one element will take, for the device map: by the plan, where a weight is still to be packed."""
        plan, target = self._plan, self._targets_by_weight.get(param_name)
        if plan is None or target is None:
            return param.element_size()
        shape = target.out_features, target.in_features
        counts = torch.bincount(plan.row_bits[target.weight_name], minlength=5).tolist()
        bits = sum(counts[b] * channel_bits(*shape, b, self.quantization_config) for b in PRECISIONS)
        return bits / 8 / param.numel()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        # The bare model or another task's head on a packed checkpoint has no use for the packed head.
        head = config.quantize_head and not (self.pre_quantized and model.get_output_embeddings() is None)
        self._targets = find_targets(model, config.modules_to_not_convert, head, config.quantize_embeddings)
        self._targets_by_weight = dict(self._targets)
        for target in self._targets.values():
            self._targets_by_weight.update({f"{name}.weight": target for name in target.tied})
        files = [pathlib.Path(path) for path in checkpoint_files or []]
        if not files or not all(path.suffix == ".safetensors" for path in files):
            raise ValueError("lowra reads safetensors checkpoints only; this one has none.")
        # Transformers is under torch.device("meta") here; the plan needs real memory.
        with torch.device("cpu"):
            if self.pre_quantized:
                self._put_stored(model, files)
            else:
                self._put_planned(model, files)
        if config.quantize_embeddings:
            refuse_resizing(model)
        mend_casts_to_weight_dtype(model)
        use_experts_one_by_one(model, self._targets)

    def _put_stored(self, model: PreTrainedModel, files: list[pathlib.Path]) -> None:
        """Packed modules with the shapes in the files."""
        group_size = self.quantization_config.group_size
        packed_files = self._packed_files = PackedFiles(
            files, self._targets, group_size, large_dense_tensors(model, self._targets)
        )
        self._loading = DirectLoading(model, self._targets, packed_files, self._only_device)
        for module in put_stored(model, self._targets, group_size, packed_files):
            # Layers left on disk never meet the loader: Transformers would draw random numbers into their bytes.
            keep_values(module.parameters())
        on = self._only_device()
        self._check = IntegrityCheck(files, model.config, mapped=on is not None and on.type == "cpu")
        # Another class than the one that was saved (a new head, the bare encoder) may lack and gain tensors.
        if type(model).__name__ in (model.config.architectures or []):
            check_packed_names(files, model, packed_files.names_by_key())

    def _put_planned(self, model: PreTrainedModel, files: list[pathlib.Path]) -> None:
        """The plan of the whole model, and modules for `_Pack` to fill.

        Until it is packed, `weight` keeps the dense shape and type: the loader casts to the type it finds, and the
        device map counts param_element_size per dense element. The loader merges fused experts into their dense
        parameter, and `_Pack` replaces that.
        """
        planner = Planner(self.quantization_config)
        # whatever else is missing Transformers reports, or starts anew: the head of another task
        source = DenseCheckpoint(files, model, needed=set(self._targets))
        source.check_stored(self._targets)
        learn(planner, source, self._targets, choose_device(), progress=True)
        self._plan = planner.assign()
        for target in self._targets.values():
            if target.experts is None:
                empty = {key: torch.empty(0, device="meta", dtype=torch.uint8) for key in self._stored_names()}
                empty["weight"] = model.get_parameter(target.weight_name).detach()
                put_packed(model, target, self.quantization_config.group_size, empty)
        declare_ties(model, self._targets)

    def _only_device(self) -> torch.device | None:
        """Where the whole model goes; None where it is spread over several devices, or the disk."""
        if not isinstance(self._device_map, dict):
            return torch.device("cpu") if self._device_map is None else None
        devices = set(self._device_map.values())
        return torch.device(*devices) if len(devices) == 1 and "disk" not in devices else None

    def _stored_names(self) -> list[str]:
        return [n for n in TENSOR_NAMES if n != "scale_steps" or self.quantization_config.scales == "double_quant"]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and param_name in self._targets_by_weight

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        nominal = stored = parameters = 0
        if self._loading is not None:
            self._loading.finish()
            self._loading = None
        if self._check is not None:
            found = self._check.finish(model, self.quantization_config)
        watch_factors(model)
        watch_tables(model)
        for target in self._targets.values():
            module: Any = model.get_submodule(target.name)
            for parameter in module.packed_tensors().values():
                parameter.requires_grad_(False)  # the loader turns gradients on for float tensors
            if module.row_bits.device.type != "meta":
                module.prepare()
                share_tied(model, target)
            if self._plan is not None:
                # from the plan: the tensors of offloaded layers are on "meta" by now
                nominal += int(self._plan.row_bits[target.weight_name].sum()) * target.in_features
                stored += module.packed.stored_bits
                parameters += target.size
        if self._check is not None and self._packed_files is not None:
            remember_stored(model, self.quantization_config, self._check.folder, self._packed_files, found)
            self._check = self._packed_files = None
        if self._plan is not None:
            config = self.quantization_config
            config.nominal_bits = round(nominal / parameters, 6)
            config.true_bits = round(stored / parameters, 6)
            config.error = self._plan.error
            config.fingerprint = self._plan.fingerprint
            config.base = str(model.config.name_or_path)
            config.packing = packing_in_memory(model)
            remember_packed(model, config)
            self._plan = None
            forget_conversions(model)
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict]:
        # PEFT's merge_and_unload leaves dense layers behind; a quantization_config beside them could not be loaded.
        modules = dict(model.named_modules())
        dense = [target.name for target in self._targets.values() if _is_dense(modules, target.name)]
        if dense:
            raise ValueError(
                f"{len(dense)} of {len(self._targets)} packed layers became dense (first: {dense[0]}), so this model "
                "is no packed checkpoint any more. Merge with lowra.merge_into_dense(peft_model), which makes a clean "
                "dense model of it, and save that."
            )
        return None, {}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dtype = dtype or model.dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a name, once the model has been saved
        say_of_dequantised(model)
        make_dense(model, self._targets, dtype)
        return model


def _is_dense(modules: dict[str, nn.Module], name: str) -> bool:
    module = modules.get(f"{name}.base_layer", modules.get(name))
    return isinstance(module, (nn.Linear, nn.Embedding)) and not isinstance(module, PackedModule)


class _Pack(ConversionOps):
    """Packs one dense weight by the plan while it is loaded."""

    def __init__(self, quantizer: LowRAHfQuantizer):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override] # Transformers gives all but the tensors by name
        self,
        input_dict: dict[str, Any],
        full_layer_name: Any = None,
        missing_keys: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        plan: Any = self.quantizer._plan
        target = self.quantizer._targets_by_weight[full_layer_name]
        name = target.weight_name
        if name not in plan.codebooks:
            return {}  # a tied weight that the checkpoint holds twice
        packed = quantize_matrix(
            target.as_matrix(weight),
            plan.codebooks.pop(name),
            plan.row_bits[name],
            self.quantizer.quantization_config,
        )
        tensors = {f"{target.name}.{name}": tensor for name, tensor in packed.tensors().items()}
        if target.experts is not None:
            meta = {name: tensor.to("meta") for name, tensor in packed.tensors().items()}
            put_packed(model, target, packed.group_size, meta)
            missing_keys = set() if missing_keys is None else missing_keys
            missing_keys.discard(full_layer_name)
        module = model.get_submodule(target.name)
        for name, tensor in packed.tensors().items():
            # set_param_for_module compares shapes for every tensor but the weight itself
            setattr(module, name, nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False))
        if missing_keys is not None:
            missing_keys.difference_update(tensors)
        return tensors


register_quantization_config("lowra")(LowRAConfig)


def describe_saved(model: PreTrainedModel, folder: pathlib.Path, variant: str | None = None) -> None:
    """Writes digests beside packed weights that were just saved, and a model card unless there is one.

    Beside an adapter of `model.add_adapter` it writes its record.

    Args:
        model: that was saved.
        folder: where to.
        variant: under which name, as `save_pretrained` took it.
    """
    config = getattr(model.config, "quantization_config", None)
    modules = {module.weight: module for module in model.modules() if isinstance(module, PackedModule)}.values()
    if not modules or not isinstance(config, LowRAConfig):
        return
    if getattr(model, "_hf_peft_config_loaded", False):  # then the active adapter is all that is saved
        write_record(model, folder, model.active_adapters()[0])
        return
    write_digests_of_saved(folder, config, variant)
    if (folder / card.CARD_FILE).exists():
        return
    parameters = sum(module.in_features * module.out_features for module in modules)
    packed_bytes = sum(tensor.nbytes for module in modules for tensor in module.packed_tensors().values())
    save_text(card.model_card(config, type(model).__name__, parameters, packed_bytes), folder / card.CARD_FILE)


def refuse_layers_of_adapters(model: PreTrainedModel) -> None:
    """Before a packed model is saved.

    Raises:
        ValueError: adapters' layers are around its own, under whose names nobody would find them again.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return  # then the adapter is all that is saved
    names = [name for name, module in model.named_modules() if isinstance(module, PackedModule)]
    wrapped = [name for name in names if name.endswith(".base_layer")]
    if wrapped:
        raise ValueError(
            f"{len(wrapped)} of {len(names)} packed layers are inside layers of an adapter (first: {wrapped[0]}), and "
            "a checkpoint saved like this could not be loaded: PeftModel.save_pretrained saves the adapter, and "
            "PeftModel.unload() gives the base without it, which can be saved."
        )


def dtype_of_packed(model: PreTrainedModel) -> torch.dtype | None:
    """The dtype of a model whose first floating parameters are those of a packed module; None for other models."""
    first = next((module for module in model.modules() if _has_floats(module)), None)
    return first.compute_dtype if isinstance(first, PackedModule) else None


def _has_floats(module: nn.Module) -> bool:
    return any(parameter.is_floating_point() for parameter in module.parameters(recurse=False))
