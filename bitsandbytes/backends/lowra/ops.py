"""Ops `bitsandbytes::lowra_*`: schema, fake kernel, checks, PyTorch reference, native kernels and autograd.

The packed tensors of one weight travel as separate arguments (an op cannot take a class), here and below as one
`PackedMatrix`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import checks, dense_parts, layout, lloyd, native, native_cpu, reference
from .layout import PackedMatrix

_PACKED = (
    "Tensor codes, Tensor row_order, Tensor scales, Tensor? scale_steps, Tensor levels, {bias}"
    "int rows_4bit, int rows_2bit, {in_features}int group_size"
)

torch.library.define(
    "bitsandbytes::lowra_quantize",
    "(Tensor weight, Tensor row_order, Tensor thresholds, int rows_4bit, int rows_2bit, int group_size)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "bitsandbytes::lowra_dequantize",
    f"({_PACKED.format(bias='', in_features='int in_features, ')}, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "bitsandbytes::lowra_dequantize_part",
    f"({_PACKED.format(bias='', in_features='int in_features, ')},"
    " int first_row, int rows, int first_column, int columns, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "bitsandbytes::lowra_linear",
    f"(Tensor x, {_PACKED.format(bias='Tensor? bias, ', in_features='')}) -> Tensor",
)

torch.library.define("bitsandbytes::lowra_encode_scales", "(Tensor absmax) -> (Tensor, Tensor)")
torch.library.define(
    "bitsandbytes::lowra_lloyd_max",
    "(Tensor weight, Tensor initial_levels, Tensor initial_thresholds, Tensor? column_weights, int group_size,"
    " int iterations, bool squared) -> (Tensor, Tensor, Tensor)",
)

_FUSED_TYPES = (torch.float16, torch.bfloat16)


def _search_of(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of `lowra_lloyd_max` without `column_weights`, which stays in the schema and means nothing.

    Raises:
        RuntimeError: they do not fit one another.
    """
    weight, levels, thresholds, column_weights, group_size, iterations, squared = arguments
    torch._check(column_weights is None, lambda: "column_weights are not supported: pass None")
    checks.check_lloyd_max(weight, levels, thresholds, group_size, iterations)
    return weight, levels, thresholds, group_size, iterations, squared


@torch.library.register_fake("bitsandbytes::lowra_lloyd_max")
def _(*arguments: Any) -> Any:
    weight, *_ = _search_of(arguments)
    return tuple(weight.new_empty(weight.shape[0], width, dtype=torch.float32) for width in (22, 19, 3))


@torch.library.register_kernel("bitsandbytes::lowra_lloyd_max", None)
def _(*arguments: Any) -> Any:
    search = _search_of(arguments)
    checks.check_memory(*search[:3])
    return native.by_reference(lloyd.lloyd_max, search[0].device, *search)


@torch.library.register_fake("bitsandbytes::lowra_encode_scales")
def _(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    checks.check_absmax(absmax)
    blocks = (absmax.numel() + layout.SCALE_BLOCK - 1) // layout.SCALE_BLOCK
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(blocks)


@torch.library.register_kernel("bitsandbytes::lowra_encode_scales", None)
def _(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    checks.check_absmax(absmax)
    checks.check_memory(absmax)
    return native.by_reference(reference.encode_scales, absmax.device, absmax)


@torch.library.register_fake("bitsandbytes::lowra_quantize")
def _(*arguments: Any) -> Any:
    checks.check_quantize(*arguments)
    weight, _, _, rows_4bit, rows_2bit, group_size = arguments
    rows, in_features = weight.shape
    size = layout.codes_size(rows, rows_4bit, rows_2bit, in_features)
    groups = layout.group_count(in_features, group_size)
    return (
        weight.new_empty(size, dtype=torch.uint8),
        weight.new_empty(rows, groups, dtype=torch.float32),
    )


@torch.library.register_kernel("bitsandbytes::lowra_quantize", None)
def _(*arguments: Any) -> Any:
    checks.check_quantize(*arguments)
    _, row_order, _, rows_4bit, rows_2bit, _ = arguments
    checks.check_memory(*arguments[:3])
    checks.ascends(row_order, rows_4bit, rows_2bit)
    return native.by_reference(reference.quantize, row_order.device, *arguments)


def _weight_of(arguments: Sequence[Any]) -> tuple[PackedMatrix, torch.dtype]:
    """The arguments of `lowra_dequantize`."""
    *packed, dtype = arguments
    return PackedMatrix(*packed), dtype


@torch.library.register_fake("bitsandbytes::lowra_dequantize")
def _(*arguments: Any) -> Any:
    packed, dtype = _weight_of(arguments)
    checks.check_type("dtype", dtype)
    checks.check_packed(packed)
    return packed.codes.new_empty(packed.rows, packed.in_features, dtype=dtype)


@torch.library.register_kernel("bitsandbytes::lowra_dequantize", None)
def _(*arguments: Any) -> Any:
    packed, dtype = _weight_of(arguments)
    checks.check_type("dtype", dtype)
    checks.check_packed(packed)
    checks.check_memory(*packed.tensors)
    checks.ascends(packed.row_order, packed.rows_4bit, packed.rows_2bit)
    return native.by_reference(reference.dequantize, packed.codes.device, packed, dtype)


def _part_of(arguments: Sequence[Any]) -> tuple[PackedMatrix, tuple[int, int, int, int], torch.dtype]:
    """The arguments of `lowra_dequantize_part`: a weight, (first row, rows, first column, columns) and a dtype."""
    *packed, first_row, rows, first_column, columns, dtype = arguments
    return PackedMatrix(*packed), (first_row, rows, first_column, columns), dtype


@torch.library.register_fake("bitsandbytes::lowra_dequantize_part")
def _(*arguments: Any) -> Any:
    packed, part, dtype = _part_of(arguments)
    checks.check_type("dtype", dtype)
    checks.check_packed(packed)
    checks.check_part(packed, part)
    _, rows, _, columns = part
    return packed.codes.new_empty(rows, columns, dtype=dtype)


@torch.library.register_kernel("bitsandbytes::lowra_dequantize_part", None)
def _(*arguments: Any) -> Any:
    packed, part, dtype = _part_of(arguments)
    checks.check_packed_once(packed, dtype)
    checks.check_part(packed, part)
    return torch.ops.bitsandbytes.lowra_dequantize(*packed, dtype)[_slices(part)].clone()


def _slices(part: tuple[int, int, int, int]) -> tuple[slice, slice]:
    first_row, rows, first_column, columns = part
    return slice(first_row, first_row + rows), slice(first_column, first_column + columns)


def _operands_of(arguments: Sequence[Any]) -> tuple[torch.Tensor, PackedMatrix, torch.Tensor | None]:
    """The arguments of `lowra_linear` as x, the weight and the bias."""
    x, codes, row_order, scales, scale_steps, levels, bias, rows_4bit, rows_2bit, group_size = arguments
    if x is None or codes is None or row_order is None or x.dim() == 0:
        checks.check_given(x=x, codes=codes, row_order=row_order)
        raise RuntimeError("x must be [..., in_features], got a single number")
    sizes = rows_4bit, rows_2bit, x.shape[-1], group_size
    return x, PackedMatrix(codes, row_order, scales, scale_steps, levels, *sizes), bias


def linear(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`bitsandbytes::lowra_linear`: x [..., K] times the transposed weight [N, K], plus bias: [..., N], as x.

    Raises:
        RuntimeError: x has another last dimension than the weight. The op takes K from x, and rows that are padded to
            whole bytes and groups would fit a K that is a little smaller.
    """
    if x.dim() and x.shape[-1] != packed.in_features:
        checks.refuse_width(x, packed)
    return torch.ops.bitsandbytes.lowra_linear(
        x, *packed.tensors, bias, packed.rows_4bit, packed.rows_2bit, packed.group_size
    )


@torch.library.register_fake("bitsandbytes::lowra_linear")
def _(*arguments: Any) -> Any:
    x, packed, bias = _operands_of(arguments)
    checks.check_packed(packed)
    checks.check_operands(x, packed, bias)
    return x.new_empty(*x.shape[:-1], packed.rows)


@torch.library.register_kernel("bitsandbytes::lowra_linear", None)
def _(*arguments: Any) -> Any:
    x, packed, bias = _operands_of(arguments)
    checks.check_watched(packed.row_order)
    checks.check_operands_once(x, packed, bias)
    checks.check_memory(x, bias)
    return torch.nn.functional.linear(x, torch.ops.bitsandbytes.lowra_dequantize(*packed, x.dtype), bias)


if native.cpu_available():
    # The library itself looks at the row order, at every call: there it costs nothing to speak of.

    @torch.library.register_kernel("bitsandbytes::lowra_quantize", "cpu")
    def _(*arguments: Any) -> Any:
        checks.check_quantize(*arguments)
        checks.check_memory(*arguments[:3])
        return native_cpu.quantize(*arguments)

    @torch.library.register_kernel("bitsandbytes::lowra_dequantize", "cpu")
    def _(*arguments: Any) -> Any:
        packed, dtype = _weight_of(arguments)
        checks.check_packed_once(packed, dtype)
        checks.check_memory(*packed.tensors)
        return native_cpu.dequantize(packed, dtype)

    @torch.library.register_kernel("bitsandbytes::lowra_dequantize_part", "cpu")
    def _(*arguments: Any) -> Any:
        packed, part, dtype = _part_of(arguments)
        checks.check_packed_once(packed, dtype)
        checks.check_part(packed, part)
        checks.check_memory(*packed.tensors)
        return native_cpu.dequantize(packed, dtype, part)

    @torch.library.register_kernel("bitsandbytes::lowra_linear", "cpu")
    def _(*arguments: Any) -> Any:
        x, packed, bias = _operands_of(arguments)
        checks.check_watched(packed.row_order)
        checks.check_packed_once(packed, x.dtype)
        checks.check_operands_once(x, packed, bias)
        checks.check_memory(x, bias, *packed.tensors)
        if x.numel() <= native_cpu.MOST_TOKENS * packed.in_features:
            return native_cpu.product(x, packed, bias)
        rows = dense_parts.at_once(packed.rows, packed.in_features, x)
        return dense_parts.product_by_rows(x, packed, bias, rows)

    @torch.library.register_kernel("bitsandbytes::lowra_lloyd_max", "cpu")
    def _(*arguments: Any) -> Any:
        search = _search_of(arguments)
        checks.check_memory(*search[:3])
        return native_cpu.lloyd_max(*search)


if native.cuda_available():

    def _dequantized(packed: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
        dense = native.cuda_dequantize(packed, dtype)
        return native.by_reference(reference.dequantize, packed.codes.device, packed, dtype) if dense is None else dense

    @torch.library.register_kernel("bitsandbytes::lowra_quantize", "cuda")
    def _(*arguments: Any) -> Any:
        checks.check_quantize(*arguments)
        _, row_order, _, rows_4bit, rows_2bit, _ = arguments
        checks.check_memory(*arguments[:3])
        checks.ascends(row_order, rows_4bit, rows_2bit)
        found = native.cuda_quantize(*arguments)
        return found or native.by_reference(reference.quantize, row_order.device, *arguments)

    @torch.library.register_kernel("bitsandbytes::lowra_encode_scales", "cuda")
    def _(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        checks.check_absmax(absmax)
        checks.check_memory(absmax)
        return native.cuda_encode_scales(absmax) or native.by_reference(reference.encode_scales, absmax.device, absmax)

    @torch.library.register_kernel("bitsandbytes::lowra_dequantize", "cuda")
    def _(*arguments: Any) -> Any:
        packed, dtype = _weight_of(arguments)
        checks.check_packed_once(packed, dtype)
        checks.ascends(packed.row_order, packed.rows_4bit, packed.rows_2bit)
        return _dequantized(packed, dtype)

    @torch.library.register_kernel("bitsandbytes::lowra_dequantize_part", "cuda")
    def _(*arguments: Any) -> Any:
        packed, part, dtype = _part_of(arguments)
        checks.check_packed_once(packed, dtype)
        checks.check_part(packed, part)
        checks.ascends(packed.row_order, packed.rows_4bit, packed.rows_2bit)
        out = native.cuda_dequantize(packed, dtype, part)
        return _dequantized(packed, dtype)[_slices(part)].clone() if out is None else out

    @torch.library.register_kernel("bitsandbytes::lowra_linear", "cuda")
    def _(*arguments: Any) -> Any:
        x, packed, bias = _operands_of(arguments)
        checks.check_watched(packed.row_order)
        checks.check_packed_once(packed, x.dtype)
        checks.check_operands_once(x, packed, bias)
        in_order = checks.ascends(packed.row_order, packed.rows_4bit, packed.rows_2bit)
        tokens = x.shape[:-1].numel()
        fused = tokens > 0 and x.dtype in _FUSED_TYPES and in_order  # products find rows by searching
        if fused and native.product_is_quicker(x.device, x.dtype, tokens, packed.rows, packed.in_features):
            out = native.cuda_product(x, packed, bias)
            if out is not None:
                return out
        rows = dense_parts.at_once(packed.rows, packed.in_features, x)
        if rows < packed.rows:
            return dense_parts.product_by_rows(x, packed, bias, rows)
        return torch.nn.functional.linear(x, _dequantized(packed, x.dtype), bias)

    @torch.library.register_kernel("bitsandbytes::lowra_lloyd_max", "cuda")
    def _(*arguments: Any) -> Any:
        search = _search_of(arguments)
        checks.check_memory(*search[:3])
        return native.cuda_lloyd_max(*search) or native.by_reference(lloyd.lloyd_max, search[0].device, *search)


def gradient_of_input(gradient: torch.Tensor, packed: PackedMatrix) -> torch.Tensor:
    """gradient [..., N] times the packed weight [N, K]: [..., K], the backward of `lowra_linear` in x."""
    # A product into a part of a tensor has no gradient of its own, and compiled code plans its memory itself.
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed()
    if whole or torch._C._functorch.is_legacy_batchedtensor(gradient):  # is_grads_batched of torch.autograd.grad
        return gradient @ torch.ops.bitsandbytes.lowra_dequantize(*packed, gradient.dtype)
    if (gradient.is_cuda and native.cuda_available()) or (gradient.is_cpu and native.cpu_available()):
        columns = dense_parts.at_once(packed.in_features, packed.rows, gradient)
        if gradient.is_cpu or columns < packed.in_features:
            return dense_parts.product_by_columns(gradient, packed, columns)
    return gradient @ torch.ops.bitsandbytes.lowra_dequantize(*packed, gradient.dtype)


class PackedLinear(torch.autograd.Function):
    """`linear` with a backward, a tangent and a rule for vmap; the op's own autograd is this as well.

    Called from Python it is the shorter way on the host: a training step of a 7B model calls it 448 times, and there
    the host, not the GPU, is the limit.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> torch.Tensor:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return cls._apply_here(*arguments)

    @classmethod
    def _apply_here(cls, *arguments: Any) -> torch.Tensor:
        # What Function.apply comes to as well, after it has looked up the signature of `forward`: a third of the call.
        short: Any = super(torch.autograd.Function, cls)
        return short.apply(*arguments)

    @staticmethod
    def forward(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return linear(x, packed, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, packed, bias = inputs
        # Packed tensors only: a dense weight kept for backward would undo the saving.
        ctx.save_for_backward(*packed.tensors)
        if is_transformed():
            ctx.save_for_forward(*packed.tensors)
        ctx.sizes = packed.sizes
        ctx.needs_bias = bias is not None and bias.requires_grad

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = gradient_of_input(grad, PackedMatrix(*ctx.saved_tensors, *ctx.sizes))
        if ctx.needs_bias:
            of_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        return of_x, None, of_bias

    @staticmethod
    def jvp(ctx: Any, of_x: torch.Tensor | None, _: Any, of_bias: torch.Tensor | None) -> torch.Tensor | None:
        if of_x is None:
            return None if of_bias is None else of_bias.expand(ctx.shape)
        return PackedLinear.apply(of_x, PackedMatrix(*ctx.saved_tensors, *ctx.sizes), of_bias)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, int]:
        """Whatever is mapped over becomes the first dimension of x; the weight is one for all."""
        of_x, of_packed, of_bias = in_dims
        if any(dim is not None for dim in of_packed):
            raise RuntimeError("vmap over several packed weights is not supported: call lowra_linear for each of them.")
        x = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
        if of_bias is None or bias is None:
            return PackedLinear.apply(x, packed, bias), 0
        own = bias.movedim(of_bias, 0)
        return PackedLinear.apply(x, packed, None) + own.view(len(own), *[1] * (x.dim() - 2), -1), 0


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which an autograd function has to know more for."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


@torch.library.impl("bitsandbytes::lowra_linear", "Autograd")
def _(*arguments: Any) -> Any:
    x, packed, bias = _operands_of(arguments)
    if torch._C._are_functorch_transforms_active():  # where PyTorch allows only what it can differentiate itself
        return torch.nn.functional.linear(x, torch.ops.bitsandbytes.lowra_dequantize(*packed, x.dtype), bias)
    if torch.is_grad_enabled() or is_transformed():
        return PackedLinear._apply_here(x, packed, bias)
    return PackedLinear.forward(x, packed, bias)
