"""Codes that are known to be a packing's own, and where that packing comes from.

Bytes that were averaged, interpolated or altered are a packing like any other to look at. So a state dict carries in
its metadata what its codes and tables were when it was made, and of one that has lost its metadata (made anew as
`{name: tensor}`, read from safetensors) the codes must be some that this process has seen: loaded, packed or read out.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..weights.digests import canonical_digest, digest_of_tensor, joined
from ..weights.packed import TABLES

Origin = dict[str, Any]  # what config.json says of a packing beside its recipe, and `start`, a folder

_known: dict[str, Origin | None] = {}


def digest_of_codes(tensors: Mapping[str, torch.Tensor]) -> str:
    """What tells the codes of a packed layer from others, from its tensors by name: all that are bytes."""
    return joined_codes({n: digest_of_tensor(t, "U8") for n, t in tensors.items() if t.dtype == torch.uint8})


def joined_codes(digests: Mapping[str, str]) -> str:
    """The same from digests of the tensors that are bytes, by name."""
    return joined([f"{name} {digests[name]}" for name in ("weight", "row_bits", "scales") if name in digests])


def digest_of_tables(tensors: Mapping[str, torch.Tensor]) -> str:
    """What tells the tables of a packed layer from others."""
    return joined([f"{name} {canonical_digest(tensors[name])}" for name in sorted(TABLES) if name in tensors])


def learn_codes(digest: str, origin: Origin | None) -> None:
    """Remembers codes of a packing."""
    if origin is not None or digest not in _known:
        _known[digest] = origin


def is_known(digest: str) -> bool:
    return digest in _known


def origin_of(digest: str) -> Origin | None:
    """Of the packing that codes are of; None where that is not known."""
    return _known.get(digest)
