"""Ops for tables whose levels and scales change in common: `bitsandbytes::lowra_shared_tables` and their gradients.

All levels of a channel are moved by one shift and widened by one gain, and all scales of a group of columns widened by
one gain. A backward pass has x, the gradient of the output and that of x, and of these the gradients of such changes
are sums: with the gradient dY of the output, U = x times the transposed scales and Y = x times the transposed weight,

    of a channel's shift    e^gain of the sum of dY * U,   which is dY^T x, over each group of columns, times the scales
    of a channel's gain     the sum of dY * Y
    of a group's gain       the sum of x * dX over the columns of the group

each over all tokens. The gradient of a dense weight, of which those of single levels and scales are sums, takes a
product as large as the forward pass.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import checks, layout, native, native_shared
from .layout import PackedMatrix
from .reference import decode_scales

_LARGEST = torch.finfo(torch.float8_e5m2).max

torch.library.define(
    "bitsandbytes::lowra_shared_tables",
    "(Tensor codes, Tensor row_order, Tensor scales, Tensor? scale_steps, Tensor levels, Tensor level_shift,"
    " Tensor? level_gain, Tensor scale_gain, int rows_4bit, int rows_2bit, int in_features, int group_size)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "bitsandbytes::lowra_shared_gradients",
    "(Tensor x, Tensor gradient, Tensor gradient_of_x, Tensor? output, Tensor scales, Tensor row_order,"
    " Tensor? level_gain, int group_size) -> (Tensor, Tensor, Tensor)",
)


class SharedChanges(NamedTuple):
    """What the tables of a weight [N, K] have in common.

    Attributes:
        level_shift: float32 [N], packed order: added to all levels of a row.
        level_gain: float32 [N], packed order, or None: levels are multiplied by e to it after that.
        scale_gain: float32 [groups]: scales are multiplied by e to it.
    """

    level_shift: torch.Tensor
    level_gain: torch.Tensor | None
    scale_gain: torch.Tensor


def rows_of_levels(packed: PackedMatrix) -> torch.Tensor:
    """int64 [entries]: the packed row of each level."""
    counts = [(segment.end - segment.first, 2**segment.bits) for segment in packed.segments()]
    each = torch.cat([torch.full((rows,), width) for rows, width in counts])
    return torch.repeat_interleave(torch.arange(packed.rows), each).to(packed.levels.device)


def shared_tables(packed: PackedMatrix, changes: SharedChanges) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain PyTorch, differentiable in the changes.

    Returns:
        levels float32 [entries], not rounded yet, and scales float32 [N, groups], in packed order.
    """
    rows = rows_of_levels(packed)
    levels = packed.levels.float() + changes.level_shift[rows]
    if changes.level_gain is not None:
        levels = levels * changes.level_gain.exp()[rows]
    return levels, decode_scales(packed.scales, packed.scale_steps) * changes.scale_gain.exp()


def shared_gradients(  # noqa: PLR0917 - as the op
    x: torch.Tensor,
    gradient: torch.Tensor,
    gradient_of_x: torch.Tensor,
    output: torch.Tensor | None,
    scales: torch.Tensor,
    row_order: torch.Tensor,
    level_gain: torch.Tensor | None,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification of the gradients, in plain PyTorch.

    Args:
        x: [T, K].
        gradient: [T, N], of the output, as x.
        gradient_of_x: [T, K], as x: `gradient` times the weight alone.
        output: [T, N], x times the transposed weight without a bias, as x or float8_e5m2; None without level_gain.
        scales: float32 [N, groups], with their gains.
        row_order: int32 [N].
        level_gain: float32 [N] or None.
        group_size: columns of a group.

    Returns:
        float32 [N], [N], or [0] without level_gain, and [groups]: as the changes.
    """
    groups = scales.shape[1]
    lacking = groups * group_size - x.shape[1]

    def by_group(of_columns: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(of_columns, (0, lacking)).view(*of_columns.shape[:-1], groups, group_size)

    means = (by_group(x.float()).sum(dim=-1) / group_size).to(x.dtype)
    of_means = (gradient.t() @ means)[row_order.long()]
    for_shift = (of_means.float() * scales).sum(dim=1) * group_size
    for_gain = for_shift.new_empty(0)
    if level_gain is not None and output is not None:
        for_shift = for_shift * level_gain.exp()
        kept = output.float()
        if output.dtype == torch.float8_e5m2:  # infinite are numbers above the largest
            kept = kept.nan_to_num(nan=math.nan, posinf=_LARGEST, neginf=-_LARGEST)
        for_gain = (gradient.float() * kept).sum(dim=0)[row_order.long()]
    return for_shift, for_gain, by_group((x.float() * gradient_of_x.float()).sum(dim=0)).sum(dim=-1)


def shared_tables_of(packed: PackedMatrix, changes: SharedChanges) -> PackedMatrix:
    """`bitsandbytes::lowra_shared_tables`, by the device's kernel: the weight with these changes, levels rounded."""
    levels, scales = torch.ops.bitsandbytes.lowra_shared_tables(*packed.tensors, *changes, *packed.sizes)
    return packed._replace(scales=scales, scale_steps=None, levels=levels)


def _tables_of(arguments: Sequence[Any]) -> tuple[PackedMatrix, SharedChanges]:
    """The arguments of `lowra_shared_tables`.

    Raises:
        RuntimeError: the changes do not fit the weight.
    """
    packed, changes = PackedMatrix(*arguments[:5], *arguments[8:]), SharedChanges(*arguments[5:8])
    checks.check_packed(packed)
    groups = layout.group_count(packed.in_features, packed.group_size)
    for name, count in (("level_shift", packed.rows), ("level_gain", packed.rows), ("scale_gain", groups)):
        checks.check_change(name, getattr(changes, name), count, packed.codes)
    return packed, changes


@torch.library.register_fake("bitsandbytes::lowra_shared_tables")
def _(*arguments: Any) -> Any:
    packed, _ = _tables_of(arguments)
    return packed.levels.new_empty(packed.levels.shape), packed.scales.new_empty(
        packed.scales.shape, dtype=torch.float32
    )


@torch.library.register_kernel("bitsandbytes::lowra_shared_tables", None)
def _(*arguments: Any) -> Any:
    packed, changes = _tables_of(arguments)
    checks.check_memory(*packed.tensors, *changes)
    levels, scales = native.by_reference(shared_tables, packed.codes.device, packed, changes)
    return levels.half(), scales


def _sums_of(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of `lowra_shared_gradients`.

    Raises:
        RuntimeError: they do not fit one another.
    """
    x, gradient, gradient_of_x, output, scales, row_order, level_gain, group_size = arguments
    checks.check_shared_gradients(x, gradient, gradient_of_x, output, scales, row_order, group_size)
    checks.check_change("level_gain", level_gain, row_order.numel(), x)
    torch._check(
        (output is None) == (level_gain is None), lambda: "output and level_gain come together, or neither of them"
    )
    return tuple(arguments)


@torch.library.register_fake("bitsandbytes::lowra_shared_gradients")
def _(*arguments: Any) -> Any:
    x, _, _, output, scales, row_order, _, _ = _sums_of(arguments)
    rows, groups = row_order.numel(), scales.shape[1]
    sizes = rows, 0 if output is None else rows, groups
    return tuple(x.new_empty(size, dtype=torch.float32) for size in sizes)


@torch.library.register_kernel("bitsandbytes::lowra_shared_gradients", None)
def _(*arguments: Any) -> Any:
    given = _sums_of(arguments)
    checks.check_memory(*(each for each in given if isinstance(each, torch.Tensor)))
    return native.by_reference(shared_gradients, given[0].device, *given)


if native.cuda_available():

    @torch.library.register_kernel("bitsandbytes::lowra_shared_tables", "cuda")
    def _(*arguments: Any) -> Any:
        packed, changes = _tables_of(arguments)
        checks.check_memory(*packed.tensors, *changes)
        found = native_shared.shared_tables(packed, changes)
        if found is not None:
            return found
        levels, scales = native.by_reference(shared_tables, packed.codes.device, packed, changes)
        return levels.half(), scales

    @torch.library.register_kernel("bitsandbytes::lowra_shared_gradients", "cuda")
    def _(*arguments: Any) -> Any:
        given = _sums_of(arguments)
        checks.check_memory(*(each for each in given if isinstance(each, torch.Tensor)))
        if len(given[0]) == 0:
            return shared_gradients(*given)
        return native_shared.shared_gradients(*given) or native.by_reference(shared_gradients, given[0].device, *given)
