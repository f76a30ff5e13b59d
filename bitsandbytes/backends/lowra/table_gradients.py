"""Op `bitsandbytes::lowra_table_gradients`: what the gradient of a dense weight says about its levels and scales.

A weight is level[code] * scale. So the gradient of a level is the sum of scale * gradient over the weights of its row
that have its code, and that of a scale the sum of level * gradient over its group.
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import checks, layout, native
from .layout import PackedMatrix
from .reference import decode_scales, rows_of_codes

torch.library.define(
    "bitsandbytes::lowra_table_gradients",
    "(Tensor gradient, Tensor codes, Tensor row_order, Tensor scales, Tensor? scale_steps, Tensor levels,"
    " int rows_4bit, int rows_2bit, int group_size, bool with_scales) -> (Tensor, Tensor)",
)


def table_gradients(
    gradient: torch.Tensor, packed: PackedMatrix, with_scales: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain PyTorch.

    Args:
        gradient: of the dense weight, floating point [N, K], rows in the order of W.
        packed: the weight.
        with_scales: whether the scales' is wanted.

    Returns:
        float32, in packed order: for levels [entries], and for scales [N, groups] or, if not wanted, [0].
    """
    rows, columns = gradient.shape
    group_size, levels = packed.group_size, packed.levels
    groups = layout.group_count(columns, group_size)
    absmax = decode_scales(packed.scales, packed.scale_steps).view(rows, groups)
    for_levels = torch.empty(levels.shape, dtype=torch.float32, device=gradient.device)
    for_scales = torch.empty(absmax.shape if with_scales else 0, dtype=torch.float32, device=gradient.device)
    for bits, part, entries, code in rows_of_codes(packed):
        own = gradient[packed.row_order[part].long()].float()
        scaled = own * absmax[part].repeat_interleave(group_size, dim=1)[:, :columns]
        sums = [(scaled * (code == level)).sum(dim=1) for level in range(2**bits)]
        for_levels[entries] = torch.stack(sums, dim=1).view(-1)
        if with_scales:
            normal = levels[entries].float().view(-1, 2**bits).gather(1, code.long())
            padded = torch.nn.functional.pad(own * normal, (0, groups * group_size - columns))
            for_scales[part] = padded.view(-1, groups, group_size).sum(dim=2)
    return for_levels, for_scales


def table_gradients_of(
    gradient: torch.Tensor, packed: PackedMatrix, with_scales: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`bitsandbytes::lowra_table_gradients`, by the kernel of the device; as `table_gradients`."""
    return torch.ops.bitsandbytes.lowra_table_gradients(
        gradient, *packed.tensors, packed.rows_4bit, packed.rows_2bit, packed.group_size, with_scales
    )


def _operands_of(arguments: Sequence[Any]) -> tuple[torch.Tensor, PackedMatrix, bool]:
    """The op's arguments by name.

    Raises:
        RuntimeError: the gradient is not one of that weight.
    """
    gradient, codes, row_order, scales, steps, levels, rows_4bit, rows_2bit, group_size, with_scales = arguments
    checks.check_gradient(gradient, codes, row_order)
    sizes = rows_4bit, rows_2bit, gradient.shape[1], group_size
    return gradient, PackedMatrix(codes, row_order, scales, steps, levels, *sizes), with_scales


@torch.library.register_fake("bitsandbytes::lowra_table_gradients")
def _(*arguments: Any) -> Any:
    _, packed, with_scales = _operands_of(arguments)
    checks.check_packed(packed)
    for_scales = packed.scales.shape if with_scales else 0
    levels = packed.levels
    return levels.new_empty(levels.shape, dtype=torch.float32), levels.new_empty(for_scales, dtype=torch.float32)


@torch.library.register_kernel("bitsandbytes::lowra_table_gradients", None)
def _(*arguments: Any) -> Any:
    gradient, packed, with_scales = _operands_of(arguments)
    checks.check_packed(packed)
    checks.check_memory(gradient, *packed.tensors)
    checks.ascends(packed.row_order, packed.rows_4bit, packed.rows_2bit)
    return native.by_reference(table_gradients, gradient.device, gradient, packed, with_scales)


if native.cuda_available():

    @torch.library.register_kernel("bitsandbytes::lowra_table_gradients", "cuda")
    def _(*arguments: Any) -> Any:
        gradient, packed, with_scales = _operands_of(arguments)
        checks.check_packed_once(packed, gradient.dtype)
        checks.check_memory(gradient)
        checks.ascends(packed.row_order, packed.rows_4bit, packed.rows_2bit)
        found = native.cuda_table_gradients(gradient, packed, with_scales)
        return found or native.by_reference(table_gradients, gradient.device, gradient, packed, with_scales)
