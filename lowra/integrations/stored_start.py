"""New LoRA adapters on a base that was packed with an initial one begin from that.

`get_peft_model(model, LoraConfig(r=16))`, which TRL's trainers and `trl sft` call too, makes an adapter of random
factors and zeros. On a base that is less than the model by its initial adapter training would begin far off: so the
factors of that adapter are put in, scaled for the new alpha, where ranks and layers agree. Where they do not, the
reason is told.
"""

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from ..checkpoints.guarded import read_json, read_tensors
from ..checkpoints.records import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .adapter_records import Arriving, check_adapter, check_saved, keep_record
from .missing_start import StoredStart, stored_start
from .peft import LowRALoraLinear

logger = logging.getLogger(__name__)

_from_file: contextvars.ContextVar[bool] = contextvars.ContextVar("from_file", default=False)


@contextlib.contextmanager
def filled_from_file() -> Iterator[None]:
    """Within, adapters that are made are about to be filled from a file."""
    token = _from_file.set(True)
    try:
        yield
    finally:
        _from_file.reset(token)


def is_filled_from_file() -> bool:
    """Whether the adapters at hand come from a file that has been, or will be, held against its record."""
    return _from_file.get()


def choose_layers(model: nn.Module, config: LoraConfig) -> None:
    """Gives an adapter that names no layers those of the stored start, before it is made, if that can be its own."""
    start = _start_for_new(model)
    unnamed = config.target_modules is None and config.layers_to_transform is None
    if start is None or not unnamed or getattr(config, "target_parameters", None):
        return
    settings = _settings(start)
    if config.r == settings["r"] and _other_kind(config) is None:
        config.target_modules = list(settings["target_modules"])


def begin_from_start(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Fills an adapter that has just been made with the stored start of its base, if there is one that fits.

    Args:
        model: Transformers' model with the adapter's layers.
        config: of the adapter, with which the record of the start is kept.
        name: of the adapter.

    Raises:
        ValueError: the initial adapter beside the base is damaged, or belongs to another base.
    """
    start = _start_for_new(model)
    if start is None:
        return
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRALoraLinear) and name in m.lora_A}
    if any(layer.lora_A[name].weight.device.type == "meta" for layer in layers.values()):
        return  # to be loaded by other means
    settings = _settings(start)
    tensors, _ = read_tensors(start.folder / ADAPTER_WEIGHTS, "the factors of the initial adapter")
    prefix, ending = "base_model.model.", ".lora_A.weight"
    started = [key.removeprefix(prefix).removesuffix(ending) for key in tensors if key.endswith(ending)]
    if obstacle := _obstacle(settings, started, layers, config, name):
        logger.warning(
            "lowra: adapter %r cannot begin from %s (%s): %s, so that training starts far off. "
            "LoraConfig(r=%d, target_modules='all-linear') begins from it.",
            name,
            start.folder,
            start.what,
            obstacle,
            settings["r"],
        )
        return
    record = check_adapter(model, start.folder, {}, any_base=False).record
    check_saved(str(start.folder), {}, record)
    scaling = settings["lora_alpha"] / settings["r"]
    with torch.no_grad():
        for layer_name in started:
            layer = layers[layer_name]
            for side, factor in (("lora_A", 1.0), ("lora_B", scaling / layer.scaling[name])):
                weight = getattr(layer, side)[name].weight
                stored = tensors[f"{prefix}{layer_name}.{side}.weight"]
                if stored.shape != weight.shape:
                    raise ValueError(
                        f"{start.folder} has {side} of shape {list(stored.shape)} for {layer_name}, which needs "
                        f"{list(weight.shape)}: it is damaged. Copy the packed checkpoint again."
                    )
                weight.copy_(stored.to(weight.device, weight.dtype) * factor)
    keep_record(config, Arriving(record))
    logger.warning("lowra: adapter %r begins from %s (%s).", name, start.folder, start.what)


def _start_for_new(model: nn.Module) -> StoredStart | None:
    start = stored_start(model)
    usable = start is not None and not _from_file.get() and (start.folder / ADAPTER_CONFIG).is_file()
    return start if usable else None


def _settings(start: StoredStart) -> dict:
    return read_json(start.folder / ADAPTER_CONFIG, "the settings of the initial adapter")


def _obstacle(settings: dict, started: list[str], layers: dict[str, Any], config: LoraConfig, name: str) -> str | None:
    """Why an adapter cannot begin from the stored start, or None."""
    if (kind := _other_kind(config)) is not None:
        return kind
    left_out = [layer for layer in started if layer not in layers]
    if left_out:
        return f"it has factors for {len(left_out)} of {len(started)} layers that this one leaves out ({left_out[0]})"
    ranks = sorted({layers[layer].r[name] for layer in started} - {settings["r"]})
    return f"its rank is {settings['r']} and this one's {ranks[0]}" if ranks else None


def _other_kind(config: LoraConfig) -> str | None:
    if config.init_lora_weights is not True:
        return f"init_lora_weights={config.init_lora_weights!r} asks for another start"
    return "the magnitudes of DoRA would belong to other weights" if config.use_dora else None
