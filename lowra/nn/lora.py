"""A LoRA layer on a packed base as one function: y = x W^T + bias + scaling (x A^T) B^T.

The usual composition runs a dozen small operations a layer and pass; at the sizes of a fine-tuning step the host needs
longer for them than the GPU. It also keeps two more copies of x, one of them in float32.
"""

from typing import Any

import torch

from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import PackedLinear, gradient_of_input, is_transformed, linear

from .linear import LowRALinear


def lora_linear(x: torch.Tensor, base: LowRALinear, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The output of a packed layer with one low-rank adapter, differentiable in x, A and B.

    Args:
        x: [..., K]; its dtype is that of the computation and of the result.
        base: packed W [N, K]; a bias must not be trained.
        a: A [r, K], of any floating dtype, rounded to that of x.
        b: B [N, r], likewise.
        scaling: factor of the adapter's term.
    """
    packed, bias = base.matrix(), base.bias_as(x.dtype)
    if is_transformed():
        return PackedLinear.apply(x, packed, bias) + scaling * (x @ a.to(x.dtype).t() @ b.to(x.dtype).t())
    return _LoraLinear.apply(x, a, b, scaling, packed, bias)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        packed: PackedMatrix,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = linear(x, packed, bias)  # returned as it is: a view could not be written into afterwards
        inner = rows @ a.to(x.dtype).t()
        out.view(-1, out.shape[-1]).addmm_(inner, b.to(x.dtype).t(), alpha=scaling)
        # A and B as they are: their roundings to x's type, kept for a whole block, would be memory of their own
        ctx.save_for_backward(x, inner, a, b, *packed.tensors)
        ctx.scaling, ctx.sizes = scaling, packed.sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, a, b, *tensors = ctx.saved_tensors
        packed = PackedMatrix(*tensors, *ctx.sizes)
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        rows, shape, grad = x.reshape(-1, x.shape[-1]), x.shape, grad.reshape(-1, grad.shape[-1])
        a, b = a.to(grad.dtype), b.to(grad.dtype)
        grad_x = grad_a = grad_b = None
        if torch.is_grad_enabled():  # to be differentiated again, so without sums in place and what forward left behind
            grad_inner = ctx.scaling * (grad @ b)
            grad_a, grad_b = grad_inner.t() @ rows, ctx.scaling * (grad.t() @ (rows @ a.t()))
            grad_x = (gradient_of_input(grad, packed) + grad_inner @ a).view(shape) if needs_x else None
            return grad_x, grad_a, grad_b, None, None, None
        if needs_b:
            grad_b = torch.addmm(b, grad.t(), inner, beta=0, alpha=ctx.scaling)
        if needs_x or needs_a:
            grad_inner = torch.addmm(inner, grad, b, beta=0, alpha=ctx.scaling)
        if needs_a:
            grad_a = grad_inner.t() @ rows
        if needs_x:
            grad_x = gradient_of_input(grad, packed)
            grad_x = grad_x.addmm_(grad_inner, a).view(shape)
        return grad_x, grad_a, grad_b, None, None, None
