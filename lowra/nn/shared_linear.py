"""`SharedTablesLinear`: levels and scales are trained by changes that many of them have in common.

Gradients of single levels and scales are sums over that of the dense weight, a product as large as the forward pass;
those of these changes are sums over what a backward pass has anyway (bitsandbytes/backends/lowra/shared_tables.py).
"""

from typing import Any

import torch
from torch import nn

from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import gradient_of_input, linear
from bitsandbytes.backends.lowra.shared_tables import changes_size, shared_tables, shared_tables_of

from .linear import LowRALinear
from .tabled_linear import TabledLinear, dense

_NARROW = torch.float8_e5m2


class SharedTablesLinear(TabledLinear):
    """One whose levels change by channel and whose scales change by group of inputs.

    Attributes:
        shared_change: float32, `SharedChanges` one after the other: a parameter for each layer, not three.
        with_gains: whether gains of levels are among them.
    """

    shared_change: nn.Parameter
    trains_scales = True

    def __init__(self, layer: LowRALinear, gains: bool, adapter: str | None = None):
        """Args: gains: whether levels get gains, for which the output is kept until the backward pass."""
        super().__init__(layer, adapter)
        self.with_gains = gains
        rows, groups = layer.scales.shape
        size = changes_size(rows, groups, gains)
        self.shared_change = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=self.levels.device))

    def changes(self) -> torch.Tensor:
        """As the ops take them, whatever `model.to(dtype)` or a trainer made of the parameter."""
        return self.shared_change.float()

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        return shared_tables(self.matrix(), self.changes(), self.with_gains)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        differentiated = torch.is_grad_enabled()
        return _SharedTables.apply(x, self.changes(), self.with_gains, bias, self.matrix(), differentiated)


def changed_product(
    x: torch.Tensor, changed: PackedMatrix, bias: torch.Tensor | None, with_gains: bool, keeps: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x times a weight with changes, plus bias, and what gradients of gains need of it, [T, N], if it is to be kept.

    That is the product alone, in 8 bits where it has 16. It is a copy, because what comes after may write into the
    output (Liger's SwiGLU writes gradients there). Its rounding, an eighth of a number at most and as often up as down,
    is lost among the tokens that are added up; what a large bias rounds away would not be, so it comes afterwards.
    """
    out = linear(x, changed, None if with_gains else bias)
    kept = None
    if keeps:
        flat = out.view(-1, out.shape[-1])
        kept = flat.to(_NARROW) if out.dtype.itemsize == 2 else flat.clone()
    if with_gains and bias is not None:
        out += bias
    return out, kept


def gradient_of_changes(
    x: torch.Tensor,
    gradient: torch.Tensor,
    for_x: torch.Tensor,
    kept: torch.Tensor | None,
    changed: PackedMatrix,
    changes: torch.Tensor,
) -> torch.Tensor:
    """
    Args:
        x: [..., K] of the product.
        gradient: [..., N] of its output, as x.
        for_x: [..., K]: that times the weight.
        kept: by `changed_product`; None without gains of levels.
        changed: the weight with the changes.
        changes: those.
    """
    flat = (each.reshape(-1, each.shape[-1]) for each in (x, gradient, for_x))
    return torch.ops.bitsandbytes.lowra_shared_gradients(
        *flat, kept, changed.scales, changed.row_order, changes, changed.group_size
    )


def gradients_by_pytorch(
    x: torch.Tensor, changes: torch.Tensor, with_gains: bool, packed: PackedMatrix, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x [T, K] and of the changes as PyTorch differentiates them, any number of times."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    out = nn.functional.linear(x, dense(packed, *shared_tables(packed, changes, with_gains), x.dtype))
    given = [tensor for tensor in (x, changes) if tensor.requires_grad]
    for_x, *for_changes = torch.autograd.grad(out, given, gradient, create_graph=True)
    return for_x, for_changes[0] if for_changes else None


class _SharedTables(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        changes: torch.Tensor,
        with_gains: bool,
        bias: torch.Tensor | None,
        packed: PackedMatrix,
        differentiated: bool,
    ) -> torch.Tensor:
        changed = shared_tables_of(packed, changes, with_gains)
        out, kept = changed_product(x, changed, bias, with_gains, with_gains and differentiated)
        ctx.save_for_backward(x, changes, kept, changed.scales, changed.levels, *packed.tensors)
        ctx.sizes, ctx.with_gains = packed.sizes, with_gains
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, changes, kept, scales, levels, *tensors = ctx.saved_tensors
        packed, flat = PackedMatrix(*tensors, *ctx.sizes), gradient.reshape(-1, gradient.shape[-1])
        for_changes = None
        if torch.is_grad_enabled():  # to be differentiated again, which the kernels are not
            rows = x.reshape(-1, x.shape[-1])
            for_x, for_changes = gradients_by_pytorch(rows, changes, ctx.with_gains, packed, flat)
        else:
            changed = packed.with_tables(levels, scales)
            for_x = gradient_of_input(flat, changed)
            if ctx.needs_input_grad[1]:
                for_changes = gradient_of_changes(x, flat, for_x, kept, changed, changes)
        for_bias = flat.sum(dim=0) if ctx.needs_input_grad[3] else None
        return for_x.view(x.shape) if ctx.needs_input_grad[0] else None, for_changes, None, for_bias, None, None
