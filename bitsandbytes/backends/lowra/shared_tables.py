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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import checks, layout, native, native_shared
from .layout import PackedMatrix
from .reference import decode_scales

_LARGEST = torch.finfo(torch.float8_e5m2).max

torch.library.define(
    "bitsandbytes::lowra_shared_tables",
    "(Tensor codes, Tensor row_order, Tensor scales, Tensor? scale_steps, Tensor levels, Tensor changes,"
    " bool with_gains, int rows_4bit, int rows_2bit, int in_features, int group_size) -> (Tensor, Tensor)",
)
torch.library.define(
    "bitsandbytes::lowra_shared_gradients",
    "(Tensor x, Tensor gradient, Tensor gradient_of_x, Tensor? output, Tensor scales, Tensor row_order, Tensor changes,"
    " int group_size) -> Tensor",
)


class SharedChanges(NamedTuple):
    """What the tables of a weight [N, K] have in common. One tensor holds them one after the other.

    Attributes:
        level_shift: float32 [N], packed order: added to all levels of a row.
        level_gain: float32 [N], packed order, or None: levels are multiplied by e to it after that.
        scale_gain: float32 [groups]: scales are multiplied by e to it.
    """

    level_shift: torch.Tensor
    level_gain: torch.Tensor | None
    scale_gain: torch.Tensor


class Passed(NamedTuple):
    """What a product with a weight [N, K] of changed tables, and its backward pass, had: the op's arguments.

    Attributes:
        x: [T, K].
        gradient: [T, N], of the output, as x.
        gradient_of_x: [T, K], as x: `gradient` times the weight alone.
        output: [T, N], x times the transposed weight without a bias, as x or float8_e5m2; None without gains of levels.
        scales: float32 [N, groups], with their gains.
        row_order: int32 [N].
        changes: float32 [changes_size].
        group_size: columns of a group.
    """

    x: torch.Tensor
    gradient: torch.Tensor
    gradient_of_x: torch.Tensor
    output: torch.Tensor | None
    scales: torch.Tensor
    row_order: torch.Tensor
    changes: torch.Tensor
    group_size: int


def changes_size(rows: int, groups: int, with_gains: bool) -> int:
    """Numbers of the changes of a weight."""
    return rows * (1 + with_gains) + groups


def changes_of(changes: torch.Tensor, rows: int, with_gains: bool) -> SharedChanges:
    """What a tensor of `changes_size` holds, as views of it."""
    gain = changes[rows : 2 * rows] if with_gains else None
    return SharedChanges(changes[:rows], gain, changes[rows * (1 + with_gains) :])


def rows_of_levels(packed: PackedMatrix) -> torch.Tensor:
    """int64 [entries]: the packed row of each level."""
    counts = [(segment.end - segment.first, 2**segment.bits) for segment in packed.segments()]
    each = torch.cat([torch.full((rows,), width) for rows, width in counts])
    return torch.repeat_interleave(torch.arange(packed.rows), each).to(packed.levels.device)


def shared_tables(packed: PackedMatrix, changes: torch.Tensor, with_gains: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain PyTorch, differentiable in the changes.

    Args:
        packed: the weight.
        changes: of it, float32 [changes_size].
        with_gains: whether gains of levels are among them.

    Returns:
        levels float32 [entries], not rounded yet, and scales float32 [N, groups], in packed order.
    """
    shift, gain, scale_gain = changes_of(changes, packed.rows, with_gains)
    rows = rows_of_levels(packed)
    levels = packed.levels.float() + shift[rows]
    if gain is not None:
        levels = levels * gain.exp()[rows]
    return levels, decode_scales(packed.scales, packed.scale_steps) * scale_gain.exp()


def shared_gradients(passed: Passed) -> torch.Tensor:
    """The specification of the gradients, in plain PyTorch: float32, as the changes."""
    x, gradient, gradient_of_x, output, scales, row_order, changes, group_size = passed
    rows, groups = scales.shape
    gain = changes_of(changes, rows, output is not None).level_gain
    lacking = groups * group_size - x.shape[1]

    def by_group(of_columns: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.pad(of_columns, (0, lacking)) if lacking else of_columns
        return whole.reshape(*whole.shape[:-1], groups, group_size).sum(dim=-1, dtype=torch.float32)

    means = (by_group(x) / group_size).to(x.dtype)
    of_means = (gradient.t() @ means)[row_order.long()]
    for_shift = (of_means.float() * scales).sum(dim=1) * group_size
    for_scale_gain = by_group((x.float() * gradient_of_x).sum(dim=0))
    if gain is None or output is None:
        return torch.cat([for_shift, for_scale_gain])
    kept = output.float()
    if output.dtype == torch.float8_e5m2:  # infinite are numbers above the largest
        kept.clamp_(-_LARGEST, _LARGEST)
    for_gain = (kept * gradient).sum(dim=0)[row_order.long()]
    return torch.cat([for_shift * gain.exp(), for_gain, for_scale_gain])


def shared_tables_of(packed: PackedMatrix, changes: torch.Tensor, with_gains: bool) -> PackedMatrix:
    """`bitsandbytes::lowra_shared_tables`, by the device's kernel: the weight with these changes, levels rounded."""
    levels, scales = torch.ops.bitsandbytes.lowra_shared_tables(*packed.tensors, changes, with_gains, *packed.sizes)
    return packed.with_tables(levels, scales)


def _tables_of(arguments: Sequence[Any]) -> tuple[PackedMatrix, torch.Tensor, bool]:
    """The arguments of `lowra_shared_tables`.

    Raises:
        RuntimeError: the changes do not fit the weight.
    """
    changes, with_gains = arguments[5:7]
    packed = PackedMatrix(*arguments[:5], *arguments[7:])
    checks.check_packed(packed)
    groups = layout.group_count(packed.in_features, packed.group_size)
    _check_changes(changes, changes_size(packed.rows, groups, with_gains), packed.codes)
    return packed, changes, with_gains


@torch.library.register_fake("bitsandbytes::lowra_shared_tables")
def _(*arguments: Any) -> Any:
    packed, *_ = _tables_of(arguments)
    levels, scales = packed.levels, packed.scales
    return levels.new_empty(levels.shape), scales.new_empty(scales.shape, dtype=torch.float32)


@torch.library.register_kernel("bitsandbytes::lowra_shared_tables", None)
def _(*arguments: Any) -> Any:
    packed, changes, with_gains = _tables_of(arguments)
    checks.check_memory(*packed.tensors, changes)
    levels, scales = native.by_reference(shared_tables, packed.codes.device, packed, changes, with_gains)
    return levels.half(), scales


def _passed(arguments: Sequence[Any]) -> Passed:
    """The arguments of `lowra_shared_gradients`.

    Raises:
        RuntimeError: they do not fit one another.
    """
    passed = Passed(*arguments)
    x, gradient, gradient_of_x, output, scales, row_order, changes, group_size = passed
    checks.check_given(x=x, gradient=gradient, gradient_of_x=gradient_of_x, scales=scales, row_order=row_order)
    others = {"gradient": gradient, "gradient_of_x": gradient_of_x, "output": output}
    checks.check_together(x=x, **others, scales=scales, row_order=row_order)
    torch._check(x.dim() == 2, lambda: f"x must be [tokens, in_features], got {tuple(x.shape)}")
    (tokens, columns), rows = x.shape, row_order.numel()
    checks.check_sizes(rows, 0, 0, columns, group_size)
    checks.check_type("x", x.dtype)
    expected = {"gradient": (tokens, rows), "gradient_of_x": (tokens, columns), "output": (tokens, rows)}
    for name, tensor in others.items():
        narrow = name == "output" and tensor is not None and tensor.dtype == torch.float8_e5m2
        torch._check(
            tensor is None or (tensor.shape == expected[name] and (narrow or tensor.dtype == x.dtype)),
            lambda name=name, tensor=tensor: (
                f"{name} must be {x.dtype} {list(expected[name])} as x, got {tensor.dtype} {list(tensor.shape)}"
            ),
        )
    groups = layout.group_count(columns, group_size)
    torch._check(
        scales.dtype == torch.float32 and scales.shape == (rows, groups) and scales.is_contiguous(),
        lambda: f"scales must be float32 [{rows}, {groups}], got {scales.dtype} {tuple(scales.shape)}",
    )
    torch._check(
        row_order.dtype == torch.int32 and row_order.dim() == 1 and row_order.is_contiguous(),
        lambda: f"row_order must be int32 [rows] in one piece, got {row_order.dtype} {list(row_order.shape)}",
    )
    _check_changes(changes, changes_size(rows, groups, output is not None), x)
    return passed


def _check_changes(changes: torch.Tensor, count: int, like: torch.Tensor) -> None:
    checks.check_given(changes=changes)
    checks.check_together(**{"the weight": like, "changes": changes})
    torch._check(
        changes.dtype == torch.float32 and changes.shape == (count,) and changes.is_contiguous(),
        lambda: f"changes must be float32 [{count}] in one piece of memory, got {changes.dtype} {list(changes.shape)}",
    )


@torch.library.register_fake("bitsandbytes::lowra_shared_gradients")
def _(*arguments: Any) -> Any:
    changes = _passed(arguments).changes
    return changes.new_empty(changes.shape)


@torch.library.register_kernel("bitsandbytes::lowra_shared_gradients", None)
def _(*arguments: Any) -> Any:
    passed = _passed(arguments)
    checks.check_memory(*passed[:-1])
    return native.by_reference(shared_gradients, passed.x.device, passed)


if native.cuda_available():

    @torch.library.register_kernel("bitsandbytes::lowra_shared_tables", "cuda")
    def _(*arguments: Any) -> Any:
        packed, changes, with_gains = _tables_of(arguments)
        checks.check_memory(*packed.tensors, changes)
        found = native_shared.shared_tables(packed, changes, with_gains)
        if found is not None:
            return found
        levels, scales = native.by_reference(shared_tables, packed.codes.device, packed, changes, with_gains)
        return levels.half(), scales

    @torch.library.register_kernel("bitsandbytes::lowra_shared_gradients", "cuda")
    def _(*arguments: Any) -> Any:
        passed = _passed(arguments)
        checks.check_memory(*passed[:-1])
        if passed.gradient.numel() == 0:  # no tokens, or no rows
            return shared_gradients(passed)
        found = native_shared.shared_gradients(passed)
        return native.by_reference(shared_gradients, passed.x.device, passed) if found is None else found
