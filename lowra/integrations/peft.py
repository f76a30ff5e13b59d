"""lowra inside PEFT: a LoRA layer that can merge, training preparation, and merging into dense weights.

PEFT takes `LowRALinear` for an `nn.Linear`, so every adapter method trains on it. `merge`, however, would add to the
packed bytes; `LowRALoraLinear`, put in the place of PEFT's own LoRA layer, merges into a dequantised layer instead.
"""

import contextlib
import pathlib
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.configs import packing_described
from ..checkpoints.dense import DenseCheckpoint, empty_model, safetensors_files
from ..checkpoints.hub import resolve_folder
from ..checkpoints.records import ADAPTER_WEIGHTS, digest_of_adapter, digests_of_file
from ..checkpoints.targets import find_targets, replace_module
from ..nn.checkpointing import enable_checkpointing
from ..nn.embedding import LowRAEmbedding
from ..nn.hooks import is_awaited
from ..nn.linear import LowRALinear, as_autocast
from ..nn.lora import lora_linear
from ..nn.packed_module import PackedModule
from ..nn.shared_linear import SharedTablesLinear
from ..quantization.token_tables import token_tables
from ..weights.fingerprint import fingerprint_of, weight_digest
from .adapter_keys import base_name, stands_in
from .adapter_places import file_of
from .adapter_records import check_fingerprint, packing, record_of, refuse_losing_tables
from .modules import dense_linear, make_embedding_dense
from .peft_limits import check_start


class LowRALoraLinear(LoraLinear):
    """PEFT's LoRA layer over `LowRALinear`.

    `merge` puts a dense layer with the dequantised weight in the place of the packed one and adds to that in float32;
    `unmerge` puts the packed layer back, bit for bit.
    """

    merges_packed = True

    base_layer: Any  # LowRALinear, or the dense layer that stands in for it

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any):
        """Takes a LoraConfig as `config`; before PEFT 0.19, its fields one by one."""
        # GPT-2's Conv1D is [out, in] once packed
        if "config" in kwargs:
            kwargs["config"].fan_in_fan_out = False
        else:
            kwargs["fan_in_fan_out"] = False
        self._packed: list[LowRALinear] = []  # in a list, so that it is no submodule while a dense one stands in
        super().__init__(base_layer, adapter_name, **kwargs)

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        options = vars(kwargs["config"]) if "config" in kwargs else kwargs
        check_start(options["init_lora_weights"], options.get("kasa_config"))
        super().update_layer(adapter_name, r, *args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """PEFT's forward; one plain adapter without dropout goes through `lora_linear`, which computes the same."""
        held = getattr(self.base_layer, "adapter_tables", None)
        if held is not None and kwargs.get("adapter_names") is not None:
            held.check_batch(kwargs["adapter_names"])
        adapter = None if args or kwargs else self._plain_adapter(x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        x = as_autocast(x)
        a: Any = self.lora_A[adapter].weight
        b: Any = self.lora_B[adapter].weight
        dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else a.dtype
        return lora_linear(x, self.base_layer, a, b, self.scaling[adapter], dtype)

    def _plain_adapter(self, x: torch.Tensor) -> str | None:
        """Name of the only active adapter, if `lora_linear` covers it here."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self._packed or self.disable_adapters or len(active) != 1 or torch.compiler.is_compiling():
            return None
        (name,) = active
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        bias = self.base_layer.bias
        plain = (
            (type(self.base_layer) is LowRALinear or self._shares_tables(name))
            and name not in self.lora_variant  # DoRA and others
            and a.bias is None
            and b.bias is None
            and (bias is None or not bias.requires_grad)
            and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
            and not is_awaited(dropout)
            # sharded and offloaded weights come together in the modules' own forward
            and all(type(m) is nn.Linear and type(m.weight) is nn.Parameter and not is_awaited(m) for m in (a, b))
            and not is_awaited(self.base_layer)
            and a.weight.device == x.device
            and x.dtype != torch.float64  # which the kernels do not know
            and (torch.is_autocast_enabled(x.device.type) or a.weight.dtype == x.dtype or self._casts_up(x, a, b))
        )
        return name if plain else None

    def _shares_tables(self, adapter: str) -> bool:
        """Whether the base's tables are trained in a way that `lora_linear` knows, and for this adapter."""
        base = self.base_layer
        return isinstance(base, SharedTablesLinear) and base.counts() and base.adapter in (None, adapter)

    def _casts_up(self, x: torch.Tensor, a: nn.Module, b: nn.Module) -> bool:
        """Whether PEFT makes a float32 of x for the adapter; not looked at on a GPU."""
        wide = a.weight.dtype == b.weight.dtype == torch.float32
        return x.device.type == "cpu" and x.is_floating_point() and wide and self.cast_input_dtype_enabled

    def orthogonal_init(self, adapter_name: str) -> None:
        """PEFT's, which takes the type of the factors from the base weight."""
        packed, self.base_layer = self.base_layer, nn.Linear(0, 0, device="meta", dtype=self.base_layer.compute_dtype)
        try:
            super().orthogonal_init(adapter_name)
        finally:
            self.base_layer = packed

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into a dense copy of the base. See PEFT for the arguments."""
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            return
        if not self._packed:
            held = self.base_layer.adapter_tables
            with contextlib.nullcontext() if held is None else held.of(adapter_names):
                self.put_dense_base()
        elif (held := self._packed[0].adapter_tables) is not None:
            held.common([*self.merged_adapters, *adapter_names])
        self.base_layer.float()
        super().merge(safe_merge, adapter_names)
        self.base_layer.to(self._packed[0].compute_dtype)

    def put_dense_base(self, weight: torch.Tensor | None = None) -> None:
        """Puts a dense layer in the place of the packed one: its dequantised weight, or the weight [N, K] given."""
        self._packed.append(self.base_layer)
        self.base_layer = dense_linear(self.base_layer, torch.float32, weight)

    def unmerge(self) -> None:
        """Puts the packed layer back."""
        if self._packed:
            device = self.base_layer.weight.device
            self.base_layer = self._packed.pop().to(device)
        self.merged_adapters.clear()


def prepare_for_training(
    model: PreTrainedModel, gradient_checkpointing: bool = True, float32_norms_and_head: bool = False
) -> PreTrainedModel:
    """Freezes a packed model and makes it ready for adapters; our counterpart of `prepare_model_for_kbit_training`.

    Packed tensors are left as they are. Unlike PEFT's function it keeps norms and head in the model's dtype unless
    asked: LoRA needs no float32 there, and a head in float32 costs more than the packed weights of several layers.

    Args:
        model: before `get_peft_model`.
        gradient_checkpointing: recompute the blocks in backward; turns the generation cache off.
        float32_norms_and_head: hold norms, the output head and what is tied to it in float32.
    """
    model.requires_grad_(False)
    if float32_norms_and_head:
        head = model.get_output_embeddings()
        for module in model.modules():
            if type(module).__name__.endswith("Norm") or (module is head and not isinstance(head, LowRALinear)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.float()
    model.enable_input_require_grads()
    if gradient_checkpointing:
        model.config.use_cache = False
        enable_checkpointing(model)
    return model


def merge_into_dense(
    model: PeftModel,
    original: str | pathlib.Path | None = None,
    initial: str | pathlib.Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Merges the active adapters and leaves a plain dense model whose config.json has no `quantization_config`.

    Args:
        model: adapters on a packed base; taken apart by this.
        original: None merges into the dequantised base, which is what the adapter was trained on. A folder or hub name
            of the 16-bit base merges into that instead, embeddings and head included where those were trained with the
            packed weights.
        initial: with `original`, the adapter's own start (`initial_adapter`), for adapters that began as LoftQ,
            CLoQ or PiSSA: that makes up for the quantisation and is taken off again, so that only the training is
            merged.
        trust_remote_code: run the Python code that `original` brings, where its architecture is its own.

    Raises:
        TypeError: a model without adapters.
        ValueError: no packed base; a method without anything to merge; `original` is another model; an adapter that
            began as one of these is to be merged into the original without its start.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"merge_into_dense expects a PeftModel (PeftModel.from_pretrained), got {type(model).__name__}: a packed "
            "model without adapters becomes dense by its own dequantize()."
        )
    base = model.get_base_model()
    quantizer = getattr(base, "hf_quantizer", None)
    for layer in base.modules():
        if isinstance(layer, LowRALoraLinear):
            layer.unmerge()  # what `merge_adapter` did, or a dense stand-in would hide the packed layer
    if not any(isinstance(module, LowRALinear) for module in base.modules()) or quantizer is None:
        raise ValueError("There is no packed base below this adapter: use its merge_and_unload().")
    if not isinstance(model.base_model, BaseTuner):
        method = model.active_peft_config.peft_type.value
        raise ValueError(f"{method} adds to the inputs of a model, not to its weights: there is nothing to merge.")
    if original is None and initial is not None:
        raise ValueError("`initial` is only taken off the original weights: give `original` too, or leave both out.")
    if original is not None:
        for name in model.active_adapters:
            start = record_of(model, name).get("init")
            if start not in (None, "lora") and initial is None:
                raise ValueError(
                    f"Adapter {name!r} began as {start}: part of it makes up for the quantisation and does not "
                    "belong on the original weights. Give initial='DIR/initial_adapter' to take its start off, or "
                    "merge into the dequantised base (original=None)."
                )
        instead = ": merge into the packed base itself, without an original"
        refuse_losing_tables(model, model.active_adapters, "merging into the original", instead)
        if initial is not None:
            _check_start(model, initial)
        _put_original_below(model, original, initial, trust_remote_code)
    for layer in base.modules():
        # LowRALoraLinear merges by itself; the layers of other methods (IA3, OFT, VeRA …) need a dense base first
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LowRALoraLinear):
            _make_dense(layer)
    merged = model.merge_and_unload()
    return quantizer.dequantize(merged)


def _check_start(model: PeftModel, initial: str | pathlib.Path) -> None:
    """Raises ValueError where an adapter is not what the active ones began with, but one of these itself, say."""
    path = file_of(initial, ADAPTER_WEIGHTS, {})
    found = None if path is None else digest_of_adapter(path)
    for name in model.active_adapters:
        record = record_of(model, name)
        start = record.get("start")
        itself = (record.get("files") or {}).get(ADAPTER_WEIGHTS)
        trained = start is None and itself is not None and path is not None and digests_of_file(path) == itself
        if trained or None not in (start, found) and start != found:
            raise ValueError(
                f"{initial} is not what adapter {name!r} began with, and taking it off would take off what was learned "
                f"too: give the initial_adapter of the packed base ({record.get('base')}) that it was trained on."
            )


def refuse_packed_original(folder: pathlib.Path) -> None:
    """Raises ValueError where what should be an original is packed."""
    if packing_described(folder) is not None:
        raise ValueError(f"{folder} is packed itself; the original is the checkpoint in 16 or 32 bits.")


def _put_original_below(
    model: PeftModel,
    original: str | pathlib.Path,
    initial: str | pathlib.Path | None,
    trust_remote_code: bool,
) -> None:
    """Replaces every packed layer by a dense one of the original, less what the initial adapter adds to it."""
    base, folder = model.get_base_model(), resolve_folder(str(original))
    refuse_packed_original(folder)
    skeleton = empty_model(folder, trust_remote_code)
    which = ("modules_to_not_convert", "quantize_head", "quantize_embeddings")
    targets = find_targets(skeleton, *(packing(base, name) for name in which))
    source = DenseCheckpoint(safetensors_files(folder), skeleton)
    digests = {name: weight_digest(name, target.as_matrix(source.load(name)[name])) for name, target in targets.items()}
    check_fingerprint(fingerprint_of(digests), base, f"The original {original}", "Give the folder it was packed from.")
    known = {name for target in targets.values() for name in (target.name, *target.tied)}
    for name, module in base.named_modules():
        name = name.removesuffix(".base_layer")
        if isinstance(module, PackedModule) and name not in known:
            raise ValueError(
                f"{name} is no layer of the original (layer_replication?): merge into the dequantised base "
                "(original=None)."
            )
    if packing(base, "end_to_end"):
        _put_token_tables_below(base, source, sorted(set(token_tables(skeleton)) - targets.keys()))
    active, temporary = list(model.active_adapters), "lowra_initial"
    if initial is not None:
        model.load_adapter(initial, temporary)
        wrapper: Any = model.base_model
        wrapper.set_adapter(active)
    for name, target in targets.items():
        layer: Any = base.get_submodule(target.name)
        if target.experts is not None:
            dtype = layer.compute_dtype
            replace_module(base, target.name, nn.Parameter(source.load(name)[name].to(dtype), requires_grad=False))
            continue
        weight = target.as_matrix(source.load(name)[name]).float()
        if isinstance(layer, LowRAEmbedding):
            make_embedding_dense(base, target, weight.to(layer.weight.device, layer.compute_dtype))
            continue
        if isinstance(layer, LowRALinear):
            replace_module(base, target.name, dense_linear(layer, layer.compute_dtype, weight.to(layer.weight.device)))
            continue
        weight = weight.to(layer.base_layer.weight.device)
        if not isinstance(layer, LowRALoraLinear):
            _make_dense(layer, weight)
            continue
        if initial is not None and temporary in layer.lora_A:
            weight = weight - layer.get_delta_weight(temporary).float()
        layer.put_dense_base(weight)
    if initial is not None:
        model.delete_adapter(temporary)


def _put_token_tables_below(base: nn.Module, source: DenseCheckpoint, names: list[str]) -> None:
    """Gives a base the original's embeddings and head: its own were trained to make up for what its codes lost."""
    parameters = dict(base.named_parameters())
    own = {base_name(key): parameter for key, parameter in parameters.items()}
    for name in names:
        copies = [key for key in parameters if key.startswith(name.removesuffix("weight")) and stands_in(key)]
        table = source.load(name)[name]
        if copies or table.shape != own[name].shape:
            what = "trained whole with this adapter" if copies else "of another size in the original"
            raise ValueError(
                f"{name} was trained with the packed weights of this base, and is {what}: merge into the dequantised "
                "base (original=None; on the command line without --original)."
            )
        own[name].data = table.to(own[name].device, own[name].dtype)


def _make_dense(layer: Any, weight: torch.Tensor | None = None) -> None:
    """Puts a dense base below an adapter layer for good: the dequantised weight, or the weight [N, K] given."""
    if isinstance(layer.base_layer, LowRALinear):
        layer.base_layer = dense_linear(layer.base_layer, layer.base_layer.compute_dtype, weight)
