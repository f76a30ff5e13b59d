"""Tables of adapters in a state dict: one tensor for each packed layer that an adapter has tables for.

It has the name that PyTorch gives to what is no parameter, because engines (torch.distributed.checkpoint) know that
name, and it is a tensor, because state dicts are written to safetensors. Metadata of a state dict would not do: it is
lost where one is made anew, as `{name: tensor for ...}` or by reading a file.
"""

from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch

from ..checkpoints.dense import check_finite
from ..weights.fingerprint import weight_digest
from ..weights.packed import TABLES
from .row_layout import is_readable

KEY = "_extra_state"
IN_TRAINING = ("level_change", "scale_change", "shared_change")  # parameters of a layer whose tables are being trained

Parts = dict[str, torch.Tensor]


def codes_digest(name: str, weight: torch.Tensor) -> torch.Tensor:
    """uint8 [32]: what tells the codes of a layer from others."""
    return torch.frombuffer(bytearray.fromhex(weight_digest(name, weight)), dtype=torch.uint8)


def check_part(key: str, tensor: torch.Tensor, own: torch.Tensor | None, where: str) -> None:
    """
    Args:
        key: name of the tensor where it comes from.
        tensor: levels, scales or scale steps that are to count in a layer.
        own: what the layer has in that place.
        where: it comes from, for the message.

    Raises:
        ValueError: they do not fit the layer, or are not finite.
    """
    # PEFT's k-bit preparation makes float32 of float16, in the model or in what was saved from it
    kinds = {torch.float16, torch.float32} if own is not None and own.is_floating_point() else {torch.uint8}
    if own is None or own.shape != tensor.shape or tensor.dtype not in kinds:
        found = "none" if own is None else f"{own.dtype} {list(own.shape)}"
        raise ValueError(f"{where}: {key} is {tensor.dtype} {list(tensor.shape)}, this model has {found}.")
    check_finite(key, tensor)


def as_state(name: str, weight: torch.Tensor, tables: dict[str, Parts]) -> torch.Tensor:
    """
    Args:
        name: of the layer in the base.
        weight: its codes.
        tables: `levels`, `scales` and `scale_steps` of the layer by adapter, of which one may have some.

    Returns:
        uint8 [bytes]: a safetensors file of `part.adapter`, and `codes`, which tells those that the tables belong to.
    """
    tensors = {f"{part}.{a}": t.detach().cpu().contiguous() for a, parts in tables.items() for part, t in parts.items()}
    if is_readable(weight):
        tensors["codes"] = codes_digest(name, weight)
    return torch.frombuffer(bytearray(safetensors.torch.save(tensors)), dtype=torch.uint8)


def from_state(name: str, state: object, own: Mapping[str, torch.Tensor]) -> dict[str, Parts]:
    """What `as_state` was given.

    Args:
        name: of the layer in the base.
        state: what a state dict has for it.
        own: packed tensors of the layer.

    Raises:
        ValueError: it is damaged, or the tables of other codes.
    """
    where = f"The levels and scales of adapters in this state dict ({name}.{KEY})"
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise ValueError(f"{where} are no bytes any more, of which there is no average: leave them as they were saved.")
    try:
        stored = safetensors.torch.load(state.detach().cpu().numpy().tobytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where} are damaged ({error}): save the state dict again.") from error
    codes = stored.pop("codes", None)
    if codes is not None and is_readable(own["weight"]) and not torch.equal(codes, codes_digest(name, own["weight"])):
        raise ValueError(f"{where} belong to other codes than this model has: load both, or those of its own base.")
    tables: dict[str, Parts] = {}
    for key, tensor in stored.items():
        part, _, adapter = key.partition(".")
        if part not in TABLES:
            raise ValueError(f"{where} hold {key!r}; expected {', '.join(TABLES)}: save the state dict again.")
        check_part(key, tensor, own.get(part), where)
        tables.setdefault(adapter, {})[part] = tensor
    return tables
