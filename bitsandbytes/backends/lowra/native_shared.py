"""ctypes calls of the kernels of `shared_tables`."""

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from . import native
from .layout import PackedMatrix

if TYPE_CHECKING:
    from .shared_tables import SharedChanges

_TYPES = {**native.TYPES, torch.float8_e5m2: 4}
_PARTS = 64  # of a sum over tokens, at most: blocks for every processor, and few numbers to be added up after them
_TOKENS = 8  # of a part, at least


class _SharedGradients(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("of_means", "of_groups", "of_channels", "row_order", "scales")),
        *((name, ctypes.c_void_p) for name in ("level_gain", "for_shift", "for_gain", "for_scale_gain")),
        *((name, ctypes.c_int64) for name in ("rows", "groups", "group_size", "group_parts", "channel_parts")),
        ("type", ctypes.c_int32),
    ]


def shared_tables(packed: PackedMatrix, changes: "SharedChanges") -> tuple[torch.Tensor, torch.Tensor] | None:
    """Levels float16 [entries] and scales float32 [N, groups] with the changes; None where the GPU has no code."""
    struct = native.packed_of(packed)
    levels = torch.empty_like(packed.levels)
    scales = torch.empty(packed.scales.shape, dtype=torch.float32, device=levels.device)
    status = native.call_cuda(
        "lowra_cuda_shared_tables",
        levels.device,
        ctypes.byref(struct),
        *(_address(change) for change in changes),
        levels.data_ptr(),
        scales.data_ptr(),
        native.stream_of(levels),
    )
    if not native.covered(status):
        return None
    native.check(status, "tables with shared changes", struct.shape)
    return levels, scales


def shared_gradients(  # noqa: PLR0917 - as the op
    x: torch.Tensor,
    gradient: torch.Tensor,
    gradient_of_x: torch.Tensor,
    output: torch.Tensor | None,
    scales: torch.Tensor,
    row_order: torch.Tensor,
    level_gain: torch.Tensor | None,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`shared_tables.shared_gradients` of one token or more; None where the GPU has no code."""
    x, gradient, gradient_of_x = x.contiguous(), gradient.contiguous(), gradient_of_x.contiguous()
    (tokens, columns), (rows, groups) = x.shape, scales.shape
    parts = min(_PARTS, -(-tokens // _TOKENS))
    like: Any = {"dtype": torch.float32, "device": x.device}
    stream = native.stream_of(x)
    means, of_groups = x.new_empty(tokens, groups), torch.empty(parts, groups, **like)
    given = x.data_ptr(), gradient_of_x.data_ptr(), _TYPES[x.dtype], tokens, columns, group_size
    status = native.call_cuda(
        "lowra_cuda_group_sums", x.device, *given, means.data_ptr(), of_groups.data_ptr(), parts, stream
    )
    if not native.covered(status):
        return None
    native.check_status(status, f"sums over groups of {group_size} columns of {list(x.shape)}")
    of_channels, for_gain = None, torch.empty(0 if output is None else rows, **like)
    if output is not None:
        output = output.contiguous()
        of_channels = torch.empty(parts, rows, **like)
        given = gradient.data_ptr(), _TYPES[x.dtype], output.data_ptr(), _TYPES[output.dtype], tokens, rows
        status = native.call_cuda("lowra_cuda_channel_sums", x.device, *given, of_channels.data_ptr(), parts, stream)
        native.check_status(status, f"sums over the tokens of {list(gradient.shape)}")
    of_means = gradient.t() @ means
    for_shift, for_scale_gain = torch.empty(rows, **like), torch.empty(groups, **like)
    struct = _SharedGradients(
        *map(_address, (of_means, of_groups, of_channels, row_order, scales, level_gain)),
        *map(_address, (for_shift, for_gain, for_scale_gain)),
        *(rows, groups, group_size, parts, 0 if of_channels is None else parts, _TYPES[x.dtype]),
    )
    status = native.call_cuda("lowra_cuda_shared_gradients", x.device, ctypes.byref(struct), stream)
    native.check_status(status, f"gradients of shared changes of a weight [{rows}, {columns}]")
    return for_shift, for_gain, for_scale_gain


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
