"""`SharedTablesLinear`: levels and scales are trained by changes that many of them have in common.

Gradients of single levels and scales are sums over that of the dense weight, a product as large as the forward pass;
those of these changes are sums over what a backward pass has anyway (bitsandbytes/backends/lowra/shared_tables.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import gradient_of_input, linear
from bitsandbytes.backends.lowra.shared_tables import SharedChanges, shared_tables, shared_tables_of

from .linear import LowRALinear
from .tabled_linear import TabledLinear, dense

_NARROW = torch.float8_e5m2


class SharedTablesLinear(TabledLinear):
    """One whose levels change by channel and whose scales change by group of inputs.

    Attributes:
        level_shift: float32 [N], packed row order: added to all levels of a channel.
        level_gain: float32 [N], packed row order: then they are multiplied by e to it; or None.
        scale_gain: float32 [groups]: the scales of a group of inputs are multiplied by e to it.
    """

    level_shift: nn.Parameter
    level_gain: nn.Parameter | None
    scale_gain: nn.Parameter
    trains_scales = True

    def __init__(self, layer: LowRALinear, gains: bool, adapter: str | None = None):
        """Args: gains: whether levels get gains, for which the output is kept until the backward pass."""
        super().__init__(layer, adapter)
        rows, groups = layer.scales.shape
        self.level_shift = nn.Parameter(self._zeros(rows))
        self.register_parameter("level_gain", nn.Parameter(self._zeros(rows)) if gains else None)
        self.scale_gain = nn.Parameter(self._zeros(groups))

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float32, device=self.levels.device)

    def changes(self) -> SharedChanges:
        return SharedChanges(self.level_shift, self.level_gain, self.scale_gain)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        return shared_tables(self.matrix(), self.changes())

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _SharedTables.apply(x, *self.changes(), bias, self.matrix(), torch.is_grad_enabled())


def kept_output(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What gradients of gains need of an output [..., N]: the product alone, in 8 bits where it has 16.

    Another copy, because what comes after may write into the output (Liger's SwiGLU writes gradients there). Its
    rounding, an eighth of a number at most and as often up as down, is lost among the tokens that are added up.
    """
    product = out if bias is None else out - bias
    flat = product.reshape(-1, out.shape[-1])
    return flat.to(_NARROW) if out.dtype.itemsize == 2 else flat.clone()


def gradients_of_changes(
    x: torch.Tensor,
    gradient: torch.Tensor,
    for_x: torch.Tensor,
    kept: torch.Tensor | None,
    changed: PackedMatrix,
    level_gain: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of `SharedChanges`.

    Args:
        x: [..., K] of the product.
        gradient: [..., N] of its output, as x.
        for_x: [..., K]: that times the weight.
        kept: of the output, by `kept_output`; None without `level_gain`.
        changed: the weight with the changes.
    """
    for_shift, for_gain, for_scale_gain = torch.ops.bitsandbytes.lowra_shared_gradients(
        x.reshape(-1, x.shape[-1]),
        gradient.reshape(-1, gradient.shape[-1]),
        for_x.reshape(-1, for_x.shape[-1]),
        kept,
        changed.scales,
        changed.row_order,
        level_gain,
        changed.group_size,
    )
    return for_shift, None if level_gain is None else for_gain, for_scale_gain


def gradients_by_pytorch(x: torch.Tensor, changes: SharedChanges, packed: PackedMatrix, gradient: torch.Tensor) -> Any:
    """Gradients of x [T, K] and of the changes as PyTorch differentiates them, any number of times."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    out = nn.functional.linear(x, dense(packed, *shared_tables(packed, changes), x.dtype))
    given = [tensor for tensor in (x, *changes) if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(out, given, gradient, create_graph=True))
    return next(found), *(None if c is None or not c.requires_grad else next(found) for c in changes)


class _SharedTables(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - as PyTorch calls it
        ctx: Any,
        x: torch.Tensor,
        level_shift: torch.Tensor,
        level_gain: torch.Tensor | None,
        scale_gain: torch.Tensor,
        bias: torch.Tensor | None,
        packed: PackedMatrix,
        differentiated: bool,
    ) -> torch.Tensor:
        changed = shared_tables_of(packed, SharedChanges(level_shift, level_gain, scale_gain))
        out = linear(x, changed, bias)
        kept = None if level_gain is None or not differentiated else kept_output(out, bias)
        changes = level_shift, level_gain, scale_gain
        ctx.save_for_backward(x, kept, changed.scales, changed.levels, *changes, *packed.tensors)
        ctx.sizes = packed.sizes
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, kept, scales, levels, *tensors = ctx.saved_tensors
        changes, packed = SharedChanges(*tensors[:3]), PackedMatrix(*tensors[3:], *ctx.sizes)
        flat = gradient.reshape(-1, gradient.shape[-1])
        for_changes: Sequence[torch.Tensor | None] = (None, None, None)
        for_x: torch.Tensor
        if torch.is_grad_enabled():  # to be differentiated again, which the kernels are not
            for_x, *for_changes = gradients_by_pytorch(x.reshape(-1, x.shape[-1]), changes, packed, flat)
        else:
            changed = packed._replace(scales=scales, scale_steps=None, levels=levels)
            for_x = gradient_of_input(flat, changed)
            if any(ctx.needs_input_grad[1:4]):
                for_changes = gradients_of_changes(x, flat, for_x, kept, changed, changes.level_gain)
        for_bias = flat.sum(dim=0) if ctx.needs_input_grad[4] else None
        return for_x.view(x.shape) if ctx.needs_input_grad[0] else None, *for_changes, for_bias, None, None
