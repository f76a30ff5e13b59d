"""ctypes calls of the kernels of `shared_tables`."""

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from . import native
from .layout import PackedMatrix

if TYPE_CHECKING:
    from .shared_tables import Passed

_TYPES = {**native.TYPES, torch.float8_e5m2: 4}
# Tokens are added up in parts: blocks for every processor, and few numbers to be added up after them. The most parts,
# and the tokens that one has at least, which are those that the kernels load at once.
_GROUP_PARTS, _GROUP_TOKENS = 128, 4
_CHANNEL_PARTS, _CHANNEL_TOKENS = 64, 8


class _SharedGradients(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("of_means", "of_groups", "of_channels", "row_order", "scales")),
        *((name, ctypes.c_void_p) for name in ("level_gain", "for_shift", "for_gain", "for_scale_gain")),
        *((name, ctypes.c_int64) for name in ("rows", "groups", "group_size", "group_parts", "channel_parts")),
        ("type", ctypes.c_int32),
    ]


def shared_tables(
    packed: PackedMatrix, changes: torch.Tensor, with_gains: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Levels float16 [entries] and scales float32 [N, groups] with the changes; None where the GPU has no code."""
    struct = native.packed_of(packed)
    levels = torch.empty_like(packed.levels)
    scales = torch.empty(packed.scales.shape, dtype=torch.float32, device=levels.device)
    status = native.call_cuda(
        "lowra_cuda_shared_tables",
        levels.device,
        ctypes.byref(struct),
        *_addresses(changes, packed.rows, with_gains),
        levels.data_ptr(),
        scales.data_ptr(),
        native.stream_of(levels),
    )
    if not native.covered(status):
        return None
    native.check(status, "tables with shared changes", struct.shape)
    return levels, scales


def shared_gradients(passed: "Passed") -> torch.Tensor | None:
    """`shared_tables.shared_gradients` of one token or more; None where the GPU has no code."""
    x, gradient, gradient_of_x = (tensor.contiguous() for tensor in passed[:3])
    output, scales, row_order, changes, group_size = passed[3:]
    (tokens, columns), (rows, groups) = x.shape, scales.shape
    group_parts = min(_GROUP_PARTS, -(-tokens // _GROUP_TOKENS))
    channel_parts = 0 if output is None else min(_CHANNEL_PARTS, -(-tokens // _CHANNEL_TOKENS))
    like: Any = {"dtype": torch.float32, "device": x.device}
    stream = native.stream_of(x)
    means, of_groups = x.new_empty(tokens, groups), torch.empty(group_parts, groups, **like)
    given = x.data_ptr(), gradient_of_x.data_ptr(), _TYPES[x.dtype], tokens, columns, group_size
    status = native.call_cuda(
        "lowra_cuda_group_sums", x.device, *given, means.data_ptr(), of_groups.data_ptr(), group_parts, stream
    )
    if not native.covered(status):
        return None
    native.check_status(status, f"sums over groups of {group_size} columns of {list(x.shape)}")
    of_channels = None
    if output is not None:
        output, of_channels = output.contiguous(), torch.empty(channel_parts, rows, **like)
        given = gradient.data_ptr(), _TYPES[x.dtype], output.data_ptr(), _TYPES[output.dtype], tokens, rows
        status = native.call_cuda(
            "lowra_cuda_channel_sums", x.device, *given, of_channels.data_ptr(), channel_parts, stream
        )
        native.check_status(status, f"sums over the tokens of {list(gradient.shape)}")
    of_means, found = gradient.t() @ means, torch.empty_like(changes)
    _, level_gain, _ = _addresses(changes, rows, output is not None)
    struct = _SharedGradients(
        *map(native.address_of, (of_means, of_groups, of_channels, row_order, scales)),
        *(level_gain, *_addresses(found, rows, output is not None)),
        *(rows, groups, group_size, group_parts, channel_parts, _TYPES[x.dtype]),
    )
    status = native.call_cuda("lowra_cuda_shared_gradients", x.device, ctypes.byref(struct), stream)
    native.check_status(status, f"gradients of shared changes of a weight [{rows}, {columns}]")
    return found


def _addresses(changes: torch.Tensor, rows: int, with_gains: bool) -> tuple[int, int | None, int]:
    """Of shifts and gains of levels and gains of scales in a tensor of all of them."""
    first, each = changes.data_ptr(), rows * changes.element_size()
    return first, first + each if with_gains else None, first + each * (1 + with_gains)
