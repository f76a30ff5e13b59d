"""Ops `bitsandbytes::lowra_*`: schema, checks, fake kernel, PyTorch reference, CPU kernel and autograd.

The packed tensors of one weight travel as separate arguments (an op cannot take a class), here and below as one
`PackedMatrix`.
"""

import torch

from . import layout, lloyd, native, reference
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


def check_packed(packed: PackedMatrix) -> None:
    """Raises where the tensors of a packed weight do not fit one another (`torch._check`)."""
    rows, in_features = packed.rows, packed.in_features
    codes, scales, levels = packed.codes, packed.scales, packed.levels
    _check_rows(rows, packed.row_order, packed.rows_4bit, packed.rows_2bit, packed.group_size)
    size = layout.codes_size(rows, packed.rows_4bit, packed.rows_2bit, in_features)
    torch._check(
        codes.dtype == torch.uint8 and codes.numel() == size,
        lambda: f"codes must be {size} bytes (uint8) for in_features={in_features}, got {codes.numel()} {codes.dtype}",
    )
    groups = layout.group_count(in_features, packed.group_size)
    torch._check(
        scales.numel() == rows * groups,
        lambda: f"scales must be [{rows}, {groups}], got {tuple(scales.shape)}",
    )
    steps = packed.scale_steps
    if scales.dtype == torch.uint8:
        blocks = layout.scale_step_count(rows, in_features, packed.group_size)
        torch._check(
            steps is not None and steps.dtype == torch.float32 and steps.numel() == blocks,
            lambda: f"8-bit scales need scale_steps float32 [{blocks}]",
        )
    else:
        torch._check(
            scales.dtype in (torch.float32, torch.float16) and steps is None,
            lambda: f"scales must be float32, float16 or (with scale_steps) uint8, got {scales.dtype}",
        )
    entries = layout.levels_size(rows, packed.rows_4bit, packed.rows_2bit)
    torch._check(
        levels.dtype == torch.float16 and levels.numel() == entries,
        lambda: f"levels must be {entries} float16 values, got {levels.numel()} of {levels.dtype}",
    )


_checked = set()


def _check_packed_once(packed: PackedMatrix) -> None:
    """`check_packed` for kernels: known sizes pass at once, since the checks take longer than a launch."""
    codes, row_order, scales, scale_steps, levels = packed.tensors
    steps = (None, None) if scale_steps is None else (scale_steps.numel(), scale_steps.dtype)
    key = tuple((tensor.numel(), tensor.dtype) for tensor in (codes, row_order, scales, levels)) + steps + packed.sizes
    if key not in _checked:
        check_packed(packed)
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
def _(*arguments):
    *packed, dtype = arguments
    packed = PackedMatrix(*packed)
    check_packed(packed)
    torch._check(dtype in _FLOATS, lambda: f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return packed.codes.new_empty(packed.rows, packed.in_features, dtype=dtype)


def _part_of(arguments) -> tuple[PackedMatrix, tuple[int, int, int, int], torch.dtype]:
    """The arguments of `lowra_dequantize_part`: a weight, (first row, rows, first column, columns) and a dtype.

    Raises:
        RuntimeError: the part does not lie within the weight; kernels begin with a group, whatever its size.
    """
    *packed, first_row, rows, first_column, columns, dtype = arguments
    packed = PackedMatrix(*packed)
    inside = 0 <= first_row and 0 <= rows and first_row + rows <= packed.rows
    inside = inside and 0 <= first_column and 0 <= columns and first_column + columns <= packed.in_features
    torch._check(
        inside and first_column % 256 == 0,
        lambda: (
            f"a part must lie within {[packed.rows, packed.in_features]} and its columns begin at a multiple of 256, "
            f"got {rows} rows from {first_row} on, {columns} columns from {first_column} on"
        ),
    )
    return packed, (first_row, rows, first_column, columns), dtype


@torch.library.register_fake("bitsandbytes::lowra_dequantize_part")
def _(*arguments):
    packed, (_, rows, _, columns), dtype = _part_of(arguments)
    check_packed(packed)
    return packed.codes.new_empty(rows, columns, dtype=dtype)


@torch.library.register_kernel("bitsandbytes::lowra_dequantize_part", None)
def _(*arguments):
    packed, (first_row, rows, first_column, columns), dtype = _part_of(arguments)
    whole = torch.ops.bitsandbytes.lowra_dequantize(*packed, dtype)
    return whole[first_row : first_row + rows, first_column : first_column + columns].clone()


def _operands_of(arguments) -> tuple[torch.Tensor, PackedMatrix, torch.Tensor | None]:
    """The arguments of `lowra_linear` as x, the weight and the bias."""
    x, codes, row_order, scales, scale_steps, levels, bias, rows_4bit, rows_2bit, group_size = arguments
    sizes = rows_4bit, rows_2bit, x.shape[-1], group_size
    return x, PackedMatrix(codes, row_order, scales, scale_steps, levels, *sizes), bias


def linear(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`bitsandbytes::lowra_linear`: x [..., K] times the transposed weight [N, K], plus bias: [..., N], as x."""
    return torch.ops.bitsandbytes.lowra_linear(
        x, *packed.tensors, bias, packed.rows_4bit, packed.rows_2bit, packed.group_size
    )


@torch.library.register_fake("bitsandbytes::lowra_linear")
def _(*arguments):
    x, packed, _ = _operands_of(arguments)
    check_packed(packed)
    return x.new_empty(*x.shape[:-1], packed.rows)


@torch.library.register_kernel("bitsandbytes::lowra_quantize", None)
def _(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size):
    _check_quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)
    return reference.quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)


@torch.library.register_kernel("bitsandbytes::lowra_dequantize", None)
def _(*arguments):
    *packed, dtype = arguments
    packed = PackedMatrix(*packed)
    check_packed(packed)
    return reference.dequantize(packed, dtype)


@torch.library.register_kernel("bitsandbytes::lowra_linear", None)
def _(*arguments):
    x, packed, bias = _operands_of(arguments)
    return torch.nn.functional.linear(x, torch.ops.bitsandbytes.lowra_dequantize(*packed, x.dtype), bias)


if native.cpu_available():

    @torch.library.register_kernel("bitsandbytes::lowra_quantize", "cpu")
    def _(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size):
        _check_quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)
        return native.cpu_quantize(weight, row_order, thresholds, rows_4bit, rows_2bit, group_size)

    @torch.library.register_kernel("bitsandbytes::lowra_dequantize", "cpu")
    def _(*arguments):
        *packed, dtype = arguments
        packed = PackedMatrix(*packed)
        _check_packed_once(packed)
        return native.cpu_dequantize(packed, dtype)

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
    def _(*arguments):
        *packed, dtype = arguments
        packed = PackedMatrix(*packed)
        _check_packed_once(packed)
        return native.cuda_dequantize(packed, dtype)

    @torch.library.register_kernel("bitsandbytes::lowra_dequantize_part", "cuda")
    def _(*arguments):
        packed, part, dtype = _part_of(arguments)
        _check_packed_once(packed)
        return native.cuda_dequantize(packed, dtype, part)

    @torch.library.register_kernel("bitsandbytes::lowra_linear", "cuda")
    def _(*arguments):
        x, packed, bias = _operands_of(arguments)
        _check_packed_once(packed)
        tokens = x.shape[:-1].numel()
        fused = tokens > 0 and x.dtype in _FUSED_TYPES
        if fused and native.product_is_quicker(x.device, tokens, packed.rows, packed.in_features):
            out = native.cuda_product(x, packed, bias)
            if out is not None:
                return out
        rows = _at_once(packed.rows, packed.in_features * x.element_size())
        if rows < packed.rows:
            return product_by_rows(x, packed, bias, rows)
        return torch.nn.functional.linear(x, native.cuda_dequantize(packed, x.dtype), bias)

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


def product_by_rows(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None, rows: int) -> torch.Tensor:
    """x [..., K] times the transposed packed weight [N, K], plus bias, with so many rows of the weight dense at a time.

    Not differentiable.
    """
    flat = x.reshape(-1, packed.in_features)
    out = x.new_empty(flat.shape[0], packed.rows)
    for first in range(0, packed.rows, rows):
        block = slice(first, min(first + rows, packed.rows))
        part = (first, block.stop - first, 0, packed.in_features)
        weight = torch.ops.bitsandbytes.lowra_dequantize_part(*packed, *part, x.dtype).t()
        if bias is None:
            torch.mm(flat, weight, out=out[:, block])
        else:
            torch.addmm(bias[block], flat, weight, out=out[:, block])
        del weight  # or two parts would be held while the next is made
    return out.view(*x.shape[:-1], packed.rows)


def product_by_columns(gradient: torch.Tensor, packed: PackedMatrix, columns: int) -> torch.Tensor:
    """gradient [..., N] times the packed weight [N, K], with so many columns of the weight dense at a time.

    Not differentiable. columns: a multiple of 256.
    """
    flat = gradient.reshape(-1, packed.rows)
    out = gradient.new_empty(flat.shape[0], packed.in_features)
    for first in range(0, packed.in_features, columns):
        block = slice(first, min(first + columns, packed.in_features))
        part = (0, packed.rows, first, block.stop - first)
        weight = torch.ops.bitsandbytes.lowra_dequantize_part(*packed, *part, gradient.dtype)
        torch.mm(flat, weight, out=out[:, block])
        del weight
    return out.view(*gradient.shape[:-1], packed.in_features)


def gradient_of_input(gradient: torch.Tensor, packed: PackedMatrix) -> torch.Tensor:
    """gradient [..., N] times the packed weight [N, K]: [..., K], the backward of `lowra_linear` in x."""
    columns = _at_once(packed.in_features, packed.rows * gradient.element_size())
    in_parts = columns < packed.in_features and gradient.is_cuda and native.cuda_available()
    # A product into a part of a tensor has no gradient of its own, and compiled code plans its memory itself.
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not in_parts:
        return gradient @ torch.ops.bitsandbytes.lowra_dequantize(*packed, gradient.dtype)
    return product_by_columns(gradient, packed, columns)


def _save_for_backward(ctx, packed: PackedMatrix, bias: torch.Tensor | None) -> None:
    # Packed tensors only: a dense weight kept for backward would undo the saving.
    ctx.save_for_backward(*packed.tensors)
    ctx.sizes = packed.sizes
    ctx.needs_bias = bias is not None and bias.requires_grad


def _gradients(ctx, grad) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Those of x and of the bias."""
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = gradient_of_input(grad, PackedMatrix(*ctx.saved_tensors, *ctx.sizes))
    if ctx.needs_bias:
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return of_x, of_bias


def _op_setup_context(ctx, inputs, output):
    _, packed, bias = _operands_of(inputs)
    _save_for_backward(ctx, packed, bias)


def _op_backward(ctx, grad):
    of_x, of_bias = _gradients(ctx, grad)
    return of_x, None, None, None, None, None, of_bias, None, None, None


torch.library.register_autograd("bitsandbytes::lowra_linear", _op_backward, setup_context=_op_setup_context)


class PackedLinear(torch.autograd.Function):
    """`linear` with the same backward, by a shorter way than an op's registered autograd takes on the host.

    A training step of a 7B model calls it 448 times; the registered way costs about twice as much a call, and there the
    host, not the GPU, is the limit.
    """

    @staticmethod
    def forward(x, packed, bias):
        return linear(x, packed, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, packed, bias = inputs
        _save_for_backward(ctx, packed, bias)

    @staticmethod
    def backward(ctx, grad):
        of_x, of_bias = _gradients(ctx, grad)
        return of_x, None, of_bias
