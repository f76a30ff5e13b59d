"""A LoRA layer on a packed base as one function: y = x W^T + bias + scaling (x A^T) B^T.

The usual composition runs a dozen small operations a layer and pass; at the sizes of a fine-tuning step the host needs
longer for them than the GPU. It also keeps two more copies of x, one of them in float32.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import PackedLinear, gradient_of_input, is_transformed
from bitsandbytes.backends.lowra.shared_tables import shared_tables_of

from .linear import LowRALinear
from .shared_linear import SharedTablesLinear, changed_product, gradient_of_changes, gradients_by_pytorch


class Shortcuts:
    """What `lora_linear` may leave out or do for all layers at once, where one function of many layers is captured.

    Factors: each layer rounds its own A and B to the type of the computation, in forward and in backward, and widens
    their gradients again: five kernels for each factor and step, of a layer whose products take two. Here stand-ins
    are rounded all at once, and gradients are asked for of these.

    The last product: a recomputation needs what goes into it, and seldom what comes out, which is only added to.

    Args:
        parameters: of which some may be factors.
        dtype: of the computation; None where nothing is rounded.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], dtype: torch.dtype | None):
        self._given = {id(given): given for given in parameters if dtype is not None and given.dtype != dtype}
        self._dtype = dtype
        self._taken: dict[int, torch.Tensor] = {}
        self.last: LowRALinear | None = None
        self.unread: LowRALinear | None = None
        self.in_its_place: float | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Within, they are."""
        self._taken = {key: torch.empty_like(given, dtype=self._dtype) for key, given in self._given.items()}
        if self._taken:
            with torch.no_grad():
                torch._foreach_copy_(list(self._taken.values()), list(self._given.values()))
        for stand_in in self._taken.values():
            stand_in.requires_grad_()
        token = _shortcuts.set(self)
        try:
            yield
        finally:
            _shortcuts.reset(token)
            self._taken = {}  # memory of the graph's

    @contextlib.contextmanager
    def leaving_out(self, layer: "LowRALinear | None", fill: float | None = None) -> Iterator[None]:
        """Within, what a layer puts out is nothing in particular, or this number everywhere."""
        self.unread, self.in_its_place = layer, fill
        try:
            yield
        finally:
            self.unread = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """What stands in for a parameter; itself where nothing does."""
        return self._taken.get(id(parameter), parameter)

    def keep_those_of(self, leaves: Sequence[torch.Tensor]) -> None:
        """Gives up stand-ins that a forward pass did not take, or beside which it took the parameter too.

        Args:
            leaves: of the pass.
        """
        found = {id(leaf) for leaf in leaves}
        self._given = {
            key: given for key, given in self._given.items() if key not in found and id(self._taken[key]) in found
        }


_shortcuts: contextvars.ContextVar[Shortcuts | None] = contextvars.ContextVar("shortcuts", default=None)


def lora_linear(
    x: torch.Tensor,
    base: LowRALinear,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The output of a packed layer with one low-rank adapter, differentiable in x, A and B.

    Args:
        x: [..., K]; its dtype is that of the base's product and of the result.
        base: packed W [N, K]; a bias must not be trained. Tables of a `SharedTablesLinear` are, and must count now.
        a: A [r, K], of any floating dtype.
        b: B [N, r], likewise.
        scaling: factor of the adapter's term.
        dtype: of the adapter's term and of its sum with the base's product, to which A and B are rounded; that of x or
            a wider one.
    """
    if base.at_first_forward is not None:
        base.at_first_forward(base)
    packed, bias = base.matrix(), base.bias_as(x.dtype)
    unread, fill = False, None
    if (shortcuts := _shortcuts.get()) is not None:
        a, b = shortcuts.of(a), shortcuts.of(b)
        shortcuts.last, unread, fill = base, shortcuts.unread is base, shortcuts.in_its_place
    if is_transformed():
        product = base.forward(x) if isinstance(base, SharedTablesLinear) else PackedLinear.apply(x, packed, bias)
        return product + (scaling * (x.to(dtype) @ a.to(dtype).t() @ b.to(dtype).t())).to(x.dtype)
    changes, with_gains = (base.changes(), base.with_gains) if isinstance(base, SharedTablesLinear) else (None, False)
    keeps = with_gains and torch.is_grad_enabled()
    return _LoraLinear.apply(x, a, b, scaling, packed, bias, dtype, unread, fill, changes, with_gains, keeps)


def _scaled_product(like: torch.Tensor, x: torch.Tensor, y: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling x y, of the shape of `like`.

    On a CPU, where y has fewer columns than x has rows, its transpose is computed: MKL takes up to five times as long
    for a float32 product with few columns as for one with few rows.
    """
    if x.is_cpu and y.shape[1] < len(x):
        return torch.addmm(like.t(), y.t(), x.t(), beta=0, alpha=scaling).t()
    return torch.addmm(like, x, y, beta=0, alpha=scaling)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - as PyTorch calls it
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        packed: PackedMatrix,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        unread: bool,
        fill: float | None,
        changes: torch.Tensor | None,
        with_gains: bool,
        keeps: bool,
    ) -> torch.Tensor:
        """Args: changes, with_gains: of a `SharedTablesLinear`; keeps: for a backward pass that learns gains."""
        changed = packed if changes is None else shared_tables_of(packed, changes, with_gains)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        inner = (a.to(dtype) @ rows.t()).t() if x.is_cpu else rows @ a.to(dtype).t()  # see _scaled_product
        kept = None
        if unread:
            out = x.new_empty(*x.shape[:-1], packed.rows)
            if fill is not None:
                out.fill_(fill)
            if keeps:
                kept = out.view(-1, out.shape[-1])  # as undetermined, so that somebody who looks will see it
        else:  # returned as it is: a view could not be written into afterwards
            out, kept = changed_product(x, changed, bias, with_gains, keeps)
        if not unread:
            flat = out.view(-1, out.shape[-1])
            if dtype == x.dtype:
                flat.addmm_(inner, b.to(dtype).t(), alpha=scaling)
            else:
                flat.copy_(flat.to(dtype).addmm_(inner, b.to(dtype).t(), alpha=scaling))
        # A and B as they are: their roundings to x's type, kept for a whole block, would be memory of their own
        learned = () if changes is None else (changes, kept, changed.scales, changed.levels)
        ctx.save_for_backward(x, inner, a, b, *packed.tensors, *learned)
        ctx.scaling, ctx.sizes, ctx.dtype, ctx.with_gains = scaling, packed.sizes, dtype, with_gains
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, a, b, *tensors = ctx.saved_tensors
        packed = PackedMatrix(*tensors[:5], *ctx.sizes)
        changes, kept, scales, levels = tensors[5:] or [None] * 4
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        rows, shape, grad = x.reshape(-1, x.shape[-1]).to(ctx.dtype), x.shape, grad.reshape(-1, grad.shape[-1])
        a, b, wide = a.to(ctx.dtype), b.to(ctx.dtype), grad.to(ctx.dtype)
        grad_x = grad_a = grad_b = for_changes = None
        if torch.is_grad_enabled():  # to be differentiated again, so without sums in place and what forward left behind
            grad_inner = ctx.scaling * (wide @ b)
            grad_a, grad_b = grad_inner.t() @ rows, ctx.scaling * (wide.t() @ (rows @ a.t()))
            if changes is not None:
                flat = x.reshape(-1, x.shape[-1])
                of_base, for_changes = gradients_by_pytorch(flat, changes, ctx.with_gains, packed, grad)
            elif needs_x:
                of_base = gradient_of_input(grad, packed)
            grad_x = (of_base + grad_inner @ a).view(shape) if needs_x else None
            return grad_x, grad_a, grad_b, *[None] * 6, for_changes, None, None
        if needs_b:
            grad_b = _scaled_product(b, wide.t(), inner, ctx.scaling)
        if needs_x or needs_a:
            grad_inner = _scaled_product(inner, wide, b, ctx.scaling)
        if needs_a:
            grad_a = grad_inner.t() @ rows
        if changes is not None:
            packed = packed.with_tables(levels, scales)
        learns = ctx.needs_input_grad[9]
        if needs_x or learns:
            of_base = gradient_of_input(grad, packed)
        if learns:
            for_changes = gradient_of_changes(x, grad, of_base, kept, packed, changes)
        if needs_x:
            grad_x = of_base.to(ctx.dtype).addmm_(grad_inner, a).to(grad.dtype).view(shape)
        return grad_x, grad_a, grad_b, *[None] * 6, for_changes, None, None
