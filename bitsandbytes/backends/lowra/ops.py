"""Ops `bitsandbytes::lowra_*`: schema, checks, fake kernel, PyTorch reference, CPU kernel and autograd.

The packed tensors of one weight travel as separate arguments (an op cannot take a class); `LowRALinear` holds them.
"""

import torch

from . import layout, lloyd, native, reference

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

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_FUSED_TYPES = (torch.float16, torch.bfloat16)


def _check_quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size):
    torch._check(weight.dim() == 2, lambda: f"weight must be [out_features, in_features], got {tuple(weight.shape)}")
    torch._check(weight.dtype in _FLOATS, lambda: f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    rows = weight.shape[0]
    _check_rows(rows, row_order, rows_4bit, rows_2bit, group_size)
    expected = layout.thresholds_size(rows, rows_4bit, rows_2bit)
    torch._check(
        thresholds.dtype == torch.float32 and thresholds.numel() == expected,
        lambda: f"thresholds must be {expected} float32 values, got {thresholds.numel()} of {thresholds.dtype}",
    )


def _check_rows(rows, row_order, rows_4bit, rows_2bit, group_size):
    torch._check(
        row_order.dtype == torch.int32 and row_order.numel() == rows,
        lambda: f"row_order must be int32 [{rows}], got {row_order.dtype} {tuple(row_order.shape)}",
    )
    torch._check(
        rows_4bit >= 0 and rows_2bit >= 0 and rows_4bit + rows_2bit <= rows,
        lambda: f"{rows_4bit} 4-bit and {rows_2bit} 2-bit rows do not fit into {rows} rows",
    )
    torch._check(
        group_size % 8 == 0 and 8 <= group_size <= 256,
        lambda: f"group_size must be a multiple of 8 from 8 to 256, got {group_size}",
    )


def check_packed(codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size):
    """Raises where the tensors of a packed weight do not fit one another (`torch._check`)."""
    rows = row_order.numel()
    _check_rows(rows, row_order, rows_4bit, rows_2bit, group_size)
    size = layout.codes_size(rows, rows_4bit, rows_2bit, in_features)
    torch._check(
        codes.dtype == torch.uint8 and codes.numel() == size,
        lambda: f"codes must be {size} bytes (uint8) for in_features={in_features}, got {codes.numel()} {codes.dtype}",
    )
    groups = layout.group_count(in_features, group_size)
    torch._check(
        scales.numel() == rows * groups,
        lambda: f"scales must be [{rows}, {groups}], got {tuple(scales.shape)}",
    )
    if scales.dtype == torch.uint8:
        blocks = layout.scale_step_count(rows, in_features, group_size)
        torch._check(
            scale_steps is not None and scale_steps.dtype == torch.float32 and scale_steps.numel() == blocks,
            lambda: f"8-bit scales need scale_steps float32 [{blocks}]",
        )
    else:
        torch._check(
            scales.dtype in (torch.float32, torch.float16) and scale_steps is None,
            lambda: f"scales must be float32, float16 or (with scale_steps) uint8, got {scales.dtype}",
        )
    entries = layout.levels_size(rows, rows_4bit, rows_2bit)
    torch._check(
        levels.dtype == torch.float16 and levels.numel() == entries,
        lambda: f"levels must be {entries} float16 values, got {levels.numel()} of {levels.dtype}",
    )


_checked = set()


def _check_packed_once(codes, row_order, scales, scale_steps, levels, *numbers):
    """`check_packed` for kernels: known sizes pass at once, since the checks take longer than a launch."""
    steps = (None, None) if scale_steps is None else (scale_steps.numel(), scale_steps.dtype)
    key = tuple((tensor.numel(), tensor.dtype) for tensor in (codes, row_order, scales, levels)) + steps + numbers
    if key not in _checked:
        check_packed(codes, row_order, scales, scale_steps, levels, *numbers)
        _checked.add(key)


def _check_lloyd_max(weight, initial_levels, initial_thresholds, column_weights, group_size):
    torch._check(weight.dim() == 2, lambda: f"weight must be [out_features, in_features], got {tuple(weight.shape)}")
    torch._check(weight.dtype in _FLOATS, lambda: f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    torch._check(
        initial_levels.numel() == 22 and initial_thresholds.numel() == 19,
        lambda: (
            f"22 levels and 19 thresholds start the search, got {initial_levels.numel()} and "
            f"{initial_thresholds.numel()}"
        ),
    )
    torch._check(
        column_weights is None or column_weights.numel() == weight.shape[1],
        lambda: f"column_weights must be [{weight.shape[1]}], got {tuple(column_weights.shape)}",
    )
    torch._check(
        group_size % 8 == 0 and 8 <= group_size <= 256,
        lambda: f"group_size must be a multiple of 8 from 8 to 256, got {group_size}",
    )


@torch.library.register_fake("bitsandbytes::lowra_lloyd_max")
def _(weight, initial_levels, initial_thresholds, column_weights, group_size, iterations, squared):
    _check_lloyd_max(weight, initial_levels, initial_thresholds, column_weights, group_size)
    return tuple(weight.new_empty(weight.shape[0], width, dtype=torch.float32) for width in (22, 19, 3))


@torch.library.register_kernel("bitsandbytes::lowra_lloyd_max", None)
def _(weight, initial_levels, initial_thresholds, column_weights, group_size, iterations, squared):
    _check_lloyd_max(weight, initial_levels, initial_thresholds, column_weights, group_size)
    return lloyd.lloyd_max(weight, initial_levels, initial_thresholds, column_weights, group_size, iterations, squared)


@torch.library.register_fake("bitsandbytes::lowra_encode_scales")
def _(absmax):
    torch._check(absmax.dtype == torch.float32, lambda: f"absmax must be float32, got {absmax.dtype}")
    blocks = (absmax.numel() + layout.SCALE_BLOCK - 1) // layout.SCALE_BLOCK
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(blocks)


@torch.library.register_kernel("bitsandbytes::lowra_encode_scales", None)
def _(absmax):
    torch._check(absmax.dtype == torch.float32, lambda: f"absmax must be float32, got {absmax.dtype}")
    return reference.encode_scales(absmax)


@torch.library.register_fake("bitsandbytes::lowra_quantize")
def _(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size):
    _check_quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)
    rows, in_features = weight.shape
    size = layout.codes_size(rows, rows_4bit, rows_2bit, in_features)
    groups = layout.group_count(in_features, group_size)
    return (
        weight.new_empty(size, dtype=torch.uint8),
        weight.new_empty(rows, groups, dtype=torch.float32),
    )


@torch.library.register_fake("bitsandbytes::lowra_dequantize")
def _(codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size, dtype):
    check_packed(codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size)
    torch._check(dtype in _FLOATS, lambda: f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return codes.new_empty(row_order.numel(), in_features, dtype=dtype)


def _check_part(shape, first_row, rows, first_column, columns):
    """A part of a weight must lie within it; kernels begin with a group, whatever its size."""
    inside = 0 <= first_row and 0 <= rows and first_row + rows <= shape[0]
    inside = inside and 0 <= first_column and 0 <= columns and first_column + columns <= shape[1]
    torch._check(
        inside and first_column % 256 == 0,
        lambda: (
            f"a part must lie within {list(shape)} and its columns begin at a multiple of 256, got {rows} rows from "
            f"{first_row} on, {columns} columns from {first_column} on"
        ),
    )


@torch.library.register_fake("bitsandbytes::lowra_dequantize_part")
def _(*arguments):
    *packed, first_row, rows, first_column, columns, dtype = arguments
    check_packed(*packed)
    _check_part((packed[1].numel(), packed[7]), first_row, rows, first_column, columns)
    return packed[0].new_empty(rows, columns, dtype=dtype)


@torch.library.register_kernel("bitsandbytes::lowra_dequantize_part", None)
def _(*arguments):
    *packed, first_row, rows, first_column, columns, dtype = arguments
    _check_part((packed[1].numel(), packed[7]), first_row, rows, first_column, columns)
    whole = torch.ops.bitsandbytes.lowra_dequantize(*packed, dtype)
    return whole[first_row : first_row + rows, first_column : first_column + columns].clone()


@torch.library.register_fake("bitsandbytes::lowra_linear")
def _(x, codes, row_order, scales, scale_steps, levels, bias, rows_4bit, rows_2bit, group_size):
    check_packed(codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, x.shape[-1], group_size)
    return x.new_empty(*x.shape[:-1], row_order.numel())


@torch.library.register_kernel("bitsandbytes::lowra_quantize", None)
def _(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size):
    _check_quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)
    return reference.quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)


@torch.library.register_kernel("bitsandbytes::lowra_dequantize", None)
def _(codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size, dtype):
    packed = (codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size)
    check_packed(*packed)
    return reference.dequantize(*packed, dtype)


@torch.library.register_kernel("bitsandbytes::lowra_linear", None)
def _(x, codes, row_order, scales, scale_steps, levels, bias, rows_4bit, rows_2bit, group_size):
    weight = torch.ops.bitsandbytes.lowra_dequantize(
        codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, x.shape[-1], group_size, x.dtype
    )
    return torch.nn.functional.linear(x, weight, bias)


if native.cpu_available():

    @torch.library.register_kernel("bitsandbytes::lowra_quantize", "cpu")
    def _(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size):
        _check_quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)
        return native.cpu_quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)

    @torch.library.register_kernel("bitsandbytes::lowra_dequantize", "cpu")
    def _(codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size, dtype):
        packed = (codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size)
        _check_packed_once(*packed)
        return native.cpu_dequantize(*packed, dtype)

    @torch.library.register_kernel("bitsandbytes::lowra_lloyd_max", "cpu")
    def _(weight, initial_levels, initial_thresholds, column_weights, group_size, iterations, squared):
        _check_lloyd_max(weight, initial_levels, initial_thresholds, column_weights, group_size)
        return native.cpu_lloyd_max(
            weight, initial_levels, initial_thresholds, column_weights, group_size, iterations, squared
        )


if native.cuda_available():

    @torch.library.register_kernel("bitsandbytes::lowra_quantize", "cuda")
    def _(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size):
        arguments = (weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)
        _check_quantize(*arguments)
        return native.cuda_quantize(*arguments) or reference.quantize(*arguments)

    @torch.library.register_kernel("bitsandbytes::lowra_encode_scales", "cuda")
    def _(absmax):
        torch._check(absmax.dtype == torch.float32, lambda: f"absmax must be float32, got {absmax.dtype}")
        return native.cuda_encode_scales(absmax)

    @torch.library.register_kernel("bitsandbytes::lowra_dequantize", "cuda")
    def _(codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size, dtype):
        packed = (codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size)
        _check_packed_once(*packed)
        return native.cuda_dequantize(*packed, dtype)

    @torch.library.register_kernel("bitsandbytes::lowra_dequantize_part", "cuda")
    def _(*arguments):
        *packed, first_row, rows, first_column, columns, dtype = arguments
        _check_packed_once(*packed)
        _check_part((packed[1].numel(), packed[7]), first_row, rows, first_column, columns)
        return native.cuda_dequantize(*packed, dtype, (first_row, rows, first_column, columns))

    @torch.library.register_kernel("bitsandbytes::lowra_linear", "cuda")
    def _(x, codes, row_order, scales, scale_steps, levels, bias, rows_4bit, rows_2bit, group_size):
        in_features = x.shape[-1]
        packed = (codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, in_features, group_size)
        _check_packed_once(*packed)
        tokens, out_features = x.shape[:-1].numel(), row_order.numel()
        fused = tokens > 0 and x.dtype in _FUSED_TYPES
        if fused and native.product_is_quicker(x.device, tokens, out_features, in_features):
            out = native.cuda_product(
                x, codes, row_order, scales, scale_steps, levels, bias, rows_4bit, rows_2bit, group_size
            )
            if out is not None:
                return out
        rows = _at_once(out_features, in_features * x.element_size())
        if rows < out_features:
            return product_by_rows(x, bias, rows, *packed)
        return torch.nn.functional.linear(x, native.cuda_dequantize(*packed, x.dtype), bias)

    @torch.library.register_kernel("bitsandbytes::lowra_lloyd_max", "cuda")
    def _(*arguments):
        _check_lloyd_max(*arguments[:5])
        return native.cuda_lloyd_max(*arguments) or lloyd.lloyd_max(*arguments)


# Dense bytes of a weight that a product on a GPU holds at once. What a 13B has stays whole: parts of 24 MiB took 1 %
# off a 7B's peak, for 35 launches a layer (docs/log.md). A 70B's widest weight is 448 MiB.
_DENSE_BYTES = 256 << 20


def _at_once(count: int, bytes_each: int) -> int:
    """Rows or columns of a weight to be dense at a time: as equal as multiples of 256 can be."""
    parts = max(1, -(-count * bytes_each // _DENSE_BYTES))
    return -(-count // parts // 256) * 256


def product_by_rows(
    x: torch.Tensor, bias: torch.Tensor | None, rows: int, *packed: torch.Tensor | int | None
) -> torch.Tensor:
    """x [..., K] times the transposed packed weight [N, K], plus bias, with so many rows of the weight dense at a time.

    Not differentiable. packed: what `lowra_dequantize` takes, without the dtype, which is that of x.
    """
    out_features, in_features = packed[1].numel(), packed[7]
    flat = x.reshape(-1, in_features)
    out = x.new_empty(flat.shape[0], out_features)
    for first in range(0, out_features, rows):
        block = slice(first, min(first + rows, out_features))
        part = (first, block.stop - first, 0, in_features)
        weight = torch.ops.bitsandbytes.lowra_dequantize_part(*packed, *part, x.dtype).t()
        if bias is None:
            torch.mm(flat, weight, out=out[:, block])
        else:
            torch.addmm(bias[block], flat, weight, out=out[:, block])
        del weight  # or two parts would be held while the next is made
    return out.view(*x.shape[:-1], out_features)


def product_by_columns(gradient: torch.Tensor, columns: int, *packed: torch.Tensor | int | None) -> torch.Tensor:
    """gradient [..., N] times the packed weight [N, K], with so many columns of the weight dense at a time.

    Not differentiable. columns: a multiple of 256. packed: as in `product_by_rows`.
    """
    rows, in_features = packed[1].numel(), packed[7]
    flat = gradient.reshape(-1, rows)
    out = gradient.new_empty(flat.shape[0], in_features)
    for first in range(0, in_features, columns):
        block = slice(first, min(first + columns, in_features))
        part = (0, rows, first, block.stop - first)
        weight = torch.ops.bitsandbytes.lowra_dequantize_part(*packed, *part, gradient.dtype)
        torch.mm(flat, weight, out=out[:, block])
        del weight
    return out.view(*gradient.shape[:-1], in_features)


def gradient_of_input(gradient: torch.Tensor, *packed: torch.Tensor | int | None) -> torch.Tensor:
    """gradient [..., N] times the packed weight [N, K]: [..., K], the backward of `lowra_linear` in x.

    Args:
        packed: what `lowra_dequantize` takes, without the dtype, which is that of `gradient`.
    """
    rows, in_features = packed[1].numel(), packed[7]
    columns = _at_once(in_features, rows * gradient.element_size())
    in_parts = columns < in_features and gradient.is_cuda and native.cuda_available()
    # A product into a part of a tensor has no gradient of its own, and compiled code plans its memory itself.
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not in_parts:
        return gradient @ torch.ops.bitsandbytes.lowra_dequantize(*packed, gradient.dtype)
    return product_by_columns(gradient, columns, *packed)


def _linear_setup_context(ctx, inputs, output):
    x, codes, row_order, scales, scale_steps, levels, bias, rows_4bit, rows_2bit, group_size = inputs
    # Packed tensors only: a dense weight kept for backward would undo the saving.
    ctx.save_for_backward(codes, row_order, scales, scale_steps, levels)
    ctx.arguments = (rows_4bit, rows_2bit, x.shape[-1], group_size)
    ctx.needs_bias = bias is not None and bias.requires_grad


def _linear_backward(ctx, grad):
    codes, row_order, scales, scale_steps, levels = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = gradient_of_input(grad, codes, row_order, scales, scale_steps, levels, *ctx.arguments)
    if ctx.needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x, None, None, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("bitsandbytes::lowra_linear", _linear_backward, setup_context=_linear_setup_context)


class PackedLinear(torch.autograd.Function):
    """`lowra_linear` with the same backward, by a shorter way than an op's registered autograd takes on the host.

    A training step of a 7B model calls it 448 times; the registered way costs about twice as much a call, and there the
    host, not the GPU, is the limit.
    """

    @staticmethod
    def forward(*arguments):
        return torch.ops.bitsandbytes.lowra_linear(*arguments)

    setup_context = staticmethod(_linear_setup_context)
    backward = staticmethod(_linear_backward)
