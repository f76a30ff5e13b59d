"""The methods of the paper as presets over one pipeline with real packed bits, and the model each one trains.

qlora, loftq and pissa keep NormalFloat tables and reach budgets below 4 bits by layer order, as section 7.2 and LoftQ
describe; assigner_only adds the exact assigner to LoftQ (appendix B); lowra learns the tables as well. lora16 trains on
the dense base. hqq is the one baseline whose formats are not ours (it has 3 bits): its base is dequantised into dense
weights and its bits are counted, see `hqq.py`.
"""

import dataclasses
import pathlib
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from ..checkpoints.dense import empty_model, safetensors_files
from ..checkpoints.guarded import read_json
from ..checkpoints.hub import resolve_folder
from ..checkpoints.places import expanded
from ..checkpoints.targets import find_targets
from ..config import FILLED_IN, LowRAConfig, check_keys
from ..integrations.fsdp import is_sharded_run
from ..quantization.initial_adapter import ADAPTER_FOLDER, AdapterRecipe, task_type
from ..quantization.pipeline import quantize_checkpoint
from . import hqq
from .packed_base import adapter_fields, on_packed_base, packed_config
from .recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Method:
    """A preset.

    Attributes:
        quantization: options of LowRAConfig, or None where the base is not packed by us.
        init: of the adapter: "loftq", "pissa" or "lora".
        least, most: budgets it can be given, in nominal bits.
    """

    quantization: dict | None
    init: str
    least: float = 1.0
    most: float = 4.0


_LAYER_ORDER = {"codebook": "normal_float", "assigner": "layer_order"}

METHODS = {
    "lora16": Method(None, "lora"),
    "qlora": Method(_LAYER_ORDER, "lora", least=2.0),
    "loftq": Method(_LAYER_ORDER, "loftq", least=2.0),
    "pissa": Method(_LAYER_ORDER, "pissa", least=2.0),
    "assigner_only": Method({"codebook": "normal_float", "assigner": "exact"}, "loftq", least=2.0),
    "lowra": Method({"codebook": "learned", "assigner": "exact"}, "loftq"),
    "hqq": Method(None, "lora"),
}


@dataclasses.dataclass
class Base:
    """A base and its initial adapter, ready to be trained as often as wanted.

    Attributes:
        folder: checkpoint to load, packed or dense.
        nominal_bits, true_bits: per quantised parameter; 16 or 32 for the dense base.
        adapter: folder of the initial PEFT adapter, or None where PEFT's own start is used.
        hqq_bits: bits that hqq gives every linear weight after loading, or None.
        name: by which an adapter finds it, from whatever folder that is loaded: its whole path, or its name on the hub.
    """

    folder: pathlib.Path
    nominal_bits: float
    true_bits: float
    adapter: pathlib.Path | None = None
    hqq_bits: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or str(self.folder.resolve())


def supports(method: str, bits: float) -> bool:
    """Whether the method has this budget; hqq has whole bits only, lora16 has none (16)."""
    if method == "lora16":
        return True
    preset = METHODS[method]
    return preset.least <= bits <= preset.most and (method != "hqq" or float(bits).is_integer())


def check_method(recipe: Recipe) -> None:
    """
    Raises:
        ValueError: unknown method, a budget the method does not have, options that make no sense.
    """
    if recipe.method not in METHODS:
        check_keys([recipe.method], list(METHODS), "The list of methods")
    if not supports(recipe.method, recipe.bits):
        preset = METHODS[recipe.method]
        whole = "whole numbers " if recipe.method == "hqq" else ""
        raise ValueError(
            f"{recipe.method} has no form at {recipe.bits} bits: give {whole}from {preset.least:g} to {preset.most:g}"
            + (", or method=lowra for fewer." if preset.least > 1 else ".")
        )
    if METHODS[recipe.method].quantization is None and recipe.quantization:
        raise ValueError(f"{recipe.method} does not use quantization options; got {', '.join(recipe.quantization)}.")
    if METHODS[recipe.method].quantization is None and recipe.tables not in ("auto", "frozen"):
        raise ValueError(f"{recipe.method} has no tables that could be trained; tables must be frozen.")
    if METHODS[recipe.method].init != "lora":
        refuse_other_adapters(recipe, f"method={recipe.method}", "method=qlora or lora16")
    quantization_config(recipe)


def refuse_other_adapters(recipe: Recipe, what: str, remedy: str) -> None:
    """
    Raises:
        ValueError: the recipe asks for an adapter that cannot begin where the fitted one does.
    """
    if fields := adapter_fields(recipe):
        raise ValueError(
            f"{fields[0]} cannot be used with {what}: its adapter begins with what quantisation lost, in all packed "
            f"layers and in LoRA's plain form. Take {remedy}, or quantise without --rank."
        )


def quantization_config(recipe: Recipe) -> LowRAConfig | None:
    """The configuration of the packed base; None for lora16 and hqq."""
    preset = METHODS[recipe.method].quantization
    if preset is None:
        return None
    return LowRAConfig.from_dict({"bits": recipe.bits, **preset, **recipe.quantization})


def prepare_base(recipe: Recipe, folder: pathlib.Path, device: torch.device, progress: bool = True) -> Base:
    """Quantises the model into `folder` unless it is there already, or takes a packed model as it is.

    Raises:
        FileNotFoundError, ValueError: a model that cannot be used; `folder` has not been created then.
    """
    source = resolve_folder(recipe.model)
    name = "" if expanded(recipe.model).is_dir() else recipe.model
    packed = packed_config(source, recipe)
    if packed is not None:
        on_packed_base(recipe, source, packed)
        initial = None if is_of_another_kind(recipe) else source / ADAPTER_FOLDER
        if initial is not None and not initial.exists():
            initial = None
        return Base(source, packed["nominal_bits"], packed["true_bits"], initial, name=name)
    quantization = quantization_config(recipe)
    if quantization is None:
        safetensors_files(source)
        dense = 8 * compute_dtype(recipe).itemsize
        if recipe.method == "lora16":
            return Base(source, dense, dense, name=name)
        bits = int(recipe.bits)
        return Base(source, bits, hqq.true_bits(bits), hqq_bits=bits, name=name)
    adapter = AdapterRecipe(recipe.rank, recipe.alpha, METHODS[recipe.method].init, recipe.init_steps, recipe.dropout)
    if not (folder / "config.json").exists():
        quantize_checkpoint(
            recipe.model,
            folder,
            quantization,
            adapter,
            device,
            progress,
            trust_remote_code=recipe.trust_remote_code,
        )
    reached = read_json(folder / "config.json", "the configuration of the packed base")["quantization_config"]
    _check_same(folder, reached, quantization, adapter, recipe.model)
    initial = None if is_of_another_kind(recipe) else folder / ADAPTER_FOLDER
    return Base(folder, reached["nominal_bits"], reached["true_bits"], initial)


def is_of_another_kind(recipe: Recipe) -> bool:
    """Whether the recipe asks for an adapter that starts anew, and not from the one beside the packed base."""
    return bool(adapter_fields(recipe))


def _check_same(folder: pathlib.Path, reached: dict, wanted: LowRAConfig, adapter: AdapterRecipe, model: str) -> None:
    """
    Raises:
        ValueError: the base in `folder`, from an earlier run, was made by another recipe.
    """
    stored = read_json(folder / ADAPTER_FOLDER / "adapter_config.json", "the base's initial adapter")
    reached = LowRAConfig.from_dict(reached).to_dict()  # an earlier version wrote fewer keys
    pairs = {name: (reached[name], value) for name, value in wanted.to_dict().items() if name not in FILLED_IN}
    was, now = (expanded(name) for name in (reached.get("base") or model, model))
    if not was.is_absolute() or was.exists():  # or it has been moved, and nothing tells
        pairs["model"] = str(was.resolve()), str(now.resolve())
    pairs["rank"] = (stored["r"], adapter.rank)
    pairs["alpha"] = (stored["lora_alpha"], adapter.alpha)
    for name, (was, asked) in pairs.items():
        if was != asked:
            raise ValueError(f"{folder} was made with {name}={was}, the recipe now asks for {asked}: use a new output.")


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """Of the base and of autocast."""
    if recipe.fp16:
        return torch.float16
    return torch.bfloat16 if recipe.bf16 else torch.float32


def load_base(base: Base, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The base model on the device, in the compute type of the recipe; to be sharded, it stays in the host's memory."""
    architecture = type(empty_model(base.folder, recipe.trust_remote_code))
    model: Any = architecture.from_pretrained(base.folder, dtype=compute_dtype(recipe))
    if not is_sharded_run():
        model.to(device)
    if base.hqq_bits is not None:
        hqq.quantize_model(model, base.hqq_bits)
    return model


def attach_adapter(model: PreTrainedModel, base: Base, recipe: Recipe) -> peft.PeftModel:
    """The model with its trainable adapter at the start of training, on the same linear layers for every method."""
    if base.adapter is not None:
        start: Any = peft.PeftConfig.from_pretrained(str(base.adapter))
        start.lora_dropout, start.inference_mode = recipe.dropout, False
        start.base_model_name_or_path = base.name  # the folder may have been moved since it was packed
        return peft.PeftModel.from_pretrained(model, base.adapter, is_trainable=True, config=start)
    names = _adapted(model)
    if recipe.target_modules is not None:
        chosen = {part: [n for n in names if n == part or n.endswith(f".{part}")] for part in recipe.target_modules}
        for part, found in chosen.items():
            if not found:
                leaves = sorted({name.rpartition(".")[2] for name in names})
                raise ValueError(f"target_modules has {part!r}, which is no layer of the model: {', '.join(leaves)}.")
        names = sorted({name for found in chosen.values() for name in found})
    alpha: Any = recipe.rank if recipe.alpha is None else recipe.alpha  # PEFT says int and divides by the rank
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=alpha,
        lora_dropout=recipe.dropout,
        target_modules=names,
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        task_type=task_type(model),
    )
    return peft.get_peft_model(model, config)


def _adapted(model: PreTrainedModel) -> list[str]:
    if getattr(model, "quantization_method", None) == "lowra":
        from ..nn.linear import LowRALinear

        head = model.get_output_embeddings()  # may be packed, but an adapter on it would be saved with the whole head
        return [
            name for name, module in model.named_modules() if isinstance(module, LowRALinear) and module is not head
        ]
    names = [name for name, target in find_targets(model, None).items() if target.adapted]
    return [name.removesuffix(".weight") for name in names]
