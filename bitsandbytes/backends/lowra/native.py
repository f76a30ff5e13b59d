"""Calls the functions of the CUDA library on tensors, and what all calls of native libraries have in common.

Where a library was left aside its `…_available` answers False; a status other than OK becomes an exception that names
the shapes.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from . import layout, libraries
from .layout import PackedMatrix
from .libraries import Lloyd, Packed, Part, Shape

logger = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
_STATUS = {
    1: "the shape is not supported (group sizes are multiples of 8 up to 256; sizes must fit into 64 bits)",
    2: "the element type is not supported (float32, float16 and bfloat16 are)",
    3: "a tensor has no memory",
    4: "the CUDA launch failed",
    5: "this kernel does not cover the shape",
    6: (
        f"LOWRA_PRODUCT={os.environ.get('LOWRA_PRODUCT')} names no kernel that covers it. small takes 1 to 8 tokens, "
        "tensor and wgmma 1 to 64, many any number (K a multiple of 64, N of 4, groups of 64 and more); wgmma and many "
        "need Hopper, tensor Ampere for bfloat16; all of them K a multiple of 32 and group sizes 32, 64, 128 or 256. "
        "dense takes everything"
    ),
    7: "a tensor begins where the kernels cannot load from it (codes on a GPU: at a multiple of 16): pass its clone()",
    8: "row_order must name every row once",
    9: "there is not enough memory",
}
UNSUPPORTED = 5
_NO_CODE = 10
AMPERE = 80  # as `cuda_code` counts
MOST_GROUPED = 3  # weights of a group, csrc/lowra.h


# Any: what is called on them is asked for only where they are there.
_cpu: Any = libraries.load(libraries.installed_library("bitsandbytes_lowra_cpu"), "cpu")
_cuda: Any = libraries.load_cuda()


def cpu_available() -> bool:
    return _cpu is not None


def cuda_available() -> bool:
    return _cuda is not None


def by_reference(function: Callable, device: torch.device, *arguments: Any) -> Any:
    """What the PyTorch reference answers, and where that is not on a CPU a warning, once: there it is for tests."""
    if device.type not in ("cpu", "meta"):
        _warn_of_reference(device.type)
    return function(*arguments)


@functools.cache
def _warn_of_reference(kind: str) -> None:
    otherwise = "no kernel covers this shape" if kind == "cuda" else "lowra has no kernels for it"
    logger.warning(
        "lowra: a tensor on %s takes the PyTorch reference, which is many times slower: %s. See `lowra env`.",
        kind,
        libraries.left_aside.get(kind, otherwise),
    )


def shape_of(rows: int, rows_4bit: int, rows_2bit: int, in_features: int, group_size: int) -> Shape:
    return Shape(rows_4bit, rows_2bit, rows - rows_4bit - rows_2bit, in_features, group_size)


def packed_of(packed: PackedMatrix) -> Packed:
    steps = packed.scale_steps
    return _packed(
        (packed.rows, *packed.sizes),
        packed.codes.data_ptr(),
        packed.row_order.data_ptr(),
        packed.scales.data_ptr(),
        None if steps is None else steps.data_ptr(),
        packed.levels.data_ptr(),
        TYPES[packed.scales.dtype],
    )


@functools.lru_cache(maxsize=4096)
def _packed(shape: tuple[int, int, int, int, int], *addresses_and_type: int | None) -> Packed:
    """A function of numbers alone, kept for the weights of a model: filling the struct takes longer than a launch."""
    return Packed(shape_of(*shape), *addresses_and_type)


def check(status: int, what: str, shape: Shape) -> None:
    if status != 0:
        check_status(
            status,
            f"{what} of a weight [{shape.rows4 + shape.rows2 + shape.rows1}, {shape.in_features}] with "
            f"{shape.rows4}/{shape.rows2}/{shape.rows1} rows of 4/2/1 bits and group size {shape.group_size}",
        )


def covered(status: int) -> bool:
    """Whether a CUDA function did something; else the caller takes another way: not this shape, or not this GPU."""
    if status == _NO_CODE:
        reason = _cuda.lowra_cuda_error().decode()
        libraries.left_aside["cuda"] = f"lowra's CUDA library has no code for this GPU ({reason})"
    return status not in (UNSUPPORTED, _NO_CODE)


def check_status(status: int, what: str) -> None:
    """Raises RuntimeError for a status other than OK."""
    if status != 0:
        detail = f" ({_cuda.lowra_cuda_error().decode()})" if status == 4 else ""
        raise RuntimeError(f"lowra: {what} failed: {_STATUS.get(status, f'status {status}')}{detail}")


def type_of(x: torch.Tensor) -> int:
    """An element type as the libraries take it; 3 for one that they refuse."""
    return TYPES.get(x.dtype, TYPES[torch.uint8])


def call_cpu(name: str, *arguments: Any) -> int:
    """Calls a function of the CPU library."""
    return getattr(_cpu, name)(*arguments)


def search_of(
    weight: torch.Tensor,
    levels: torch.Tensor,
    thresholds: torch.Tensor,
    group_size: int,
    iterations: int,
    squared: bool,
) -> Lloyd:
    """The arguments of a Lloyd-Max search; it keeps levels and thresholds, of which the struct has the addresses."""
    levels, thresholds = levels.float().contiguous(), thresholds.float().contiguous()
    search = Lloyd(levels.data_ptr(), thresholds.data_ptr(), *weight.shape, group_size, iterations, squared)
    search.tensors = levels, thresholds
    return search


def address_of(tensor: torch.Tensor | None) -> int | None:
    """As ctypes takes it: none for a tensor that is left out."""
    return None if tensor is None else tensor.data_ptr()


def stream_of(tensor: torch.Tensor) -> int:
    """The current stream of the tensor's device, on which the kernels run."""
    return torch._C._cuda_getCurrentRawStream(tensor.device.index)


def call_cuda(name: str, device: torch.device, *arguments: Any) -> int:
    """Calls a function of the CUDA library with `device` current; switching costs time and is rarely needed."""
    if torch.cuda.current_device() == device.index:
        return getattr(_cuda, name)(*arguments)
    with torch.cuda.device(device):
        return getattr(_cuda, name)(*arguments)


@functools.cache
def cuda_code(device: torch.device) -> tuple[int, bool]:
    """What runs on this GPU: the compute capability its code was compiled for, and whether Hopper's own kernels do.

    The capability is 75 for 7.5, and 0 where the library has no code for the GPU. It may be below the GPU's own.
    """
    hopper = ctypes.c_int32()
    code = call_cuda("lowra_cuda_code", device, ctypes.byref(hopper))
    return code, bool(hopper.value)


def room_for_codes(
    weight: torch.Tensor, rows_4bit: int, rows_2bit: int, group_size: int
) -> tuple[Shape, torch.Tensor, torch.Tensor]:
    """Of a dense weight [N, K] that is quantised: its shape, and memory for codes and absmax on its device."""
    rows, in_features = weight.shape
    codes = weight.new_empty(layout.codes_size(rows, rows_4bit, rows_2bit, in_features), dtype=torch.uint8)
    absmax = weight.new_empty(rows, layout.group_count(in_features, group_size), dtype=torch.float32)
    return shape_of(rows, rows_4bit, rows_2bit, in_features, group_size), codes, absmax


def cuda_quantize(
    weight: torch.Tensor,
    row_order: torch.Tensor,
    thresholds: torch.Tensor,
    rows_4bit: int,
    rows_2bit: int,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`reference.quantize` on the CUDA library; None where it does not cover the group size."""
    shape, codes, absmax = room_for_codes(weight, rows_4bit, rows_2bit, group_size)
    weight, row_order, thresholds = weight.contiguous(), row_order.contiguous(), thresholds.contiguous()
    status = call_cuda(
        "lowra_cuda_quantize",
        weight.device,
        ctypes.byref(shape),
        weight.data_ptr(),
        TYPES[weight.dtype],
        row_order.data_ptr(),
        thresholds.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        stream_of(weight),
    )
    if not covered(status):
        return None
    check(status, "quantisation", shape)
    return codes, absmax


def cuda_encode_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`reference.encode_scales` on the CUDA library; None where it has no code for the GPU."""
    absmax = absmax.contiguous()
    count = absmax.numel()
    blocks = (count + layout.SCALE_BLOCK - 1) // layout.SCALE_BLOCK
    scales = torch.empty_like(absmax, dtype=torch.uint8)
    steps = absmax.new_empty(blocks)
    status = call_cuda(
        "lowra_cuda_encode_scales",
        absmax.device,
        absmax.data_ptr(),
        count,
        scales.data_ptr(),
        steps.data_ptr(),
        stream_of(absmax),
    )
    if not covered(status):
        return None
    check(status, "encoding of scales", shape_of(1, 0, 0, count, 8))
    return scales, steps


def cuda_dequantize(
    packed: PackedMatrix, dtype: torch.dtype, part: tuple[int, int, int, int] | None = None
) -> torch.Tensor | None:
    """`reference.dequantize` on the CUDA library, or a part (first row, rows, first column, columns) of it; None
    where it has no code for the GPU."""
    struct = packed_of(packed)
    part = (0, packed.rows, 0, packed.in_features) if part is None else part
    codes = packed.codes
    out = codes.new_empty(part[1], part[3], dtype=dtype)
    status = call_cuda(
        "lowra_cuda_dequantize",
        codes.device,
        ctypes.byref(struct),
        ctypes.byref(Part(*part)),
        out.data_ptr(),
        TYPES[dtype],
        stream_of(codes),
    )
    if not covered(status):
        return None
    check(status, "dequantisation", struct.shape)
    return out


@functools.cache
def _warn_of_bfloat16() -> None:
    logger.warning(
        "lowra: a product of bfloat16 with code for Turing, which multiplies float16 alone: beyond 8 tokens the weight "
        "is made dense, and such a GPU emulates bfloat16, many times slower. Load the model with dtype=torch.float16 "
        "and train with fp16=True."
    )


@functools.lru_cache(4096)
def product_is_quicker(device: torch.device, dtype: torch.dtype, tokens: int, rows: int, in_features: int) -> bool:
    """Whether `cuda_product` is quicker on this GPU than a dense product after `cuda_dequantize`."""
    if dtype == torch.bfloat16 and 0 < cuda_code(device)[0] < AMPERE:
        _warn_of_bfloat16()
    return bool(call_cuda("lowra_cuda_product_is_quicker", device, tokens, rows, in_features))


def cuda_product(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`ops.linear` without a dense weight, on the CUDA library; None where it does not cover the shape."""
    struct = packed_of(packed)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], packed.rows)
    status = call_cuda(
        "lowra_cuda_product",
        x.device,
        ctypes.byref(struct),
        x.data_ptr(),
        x.numel() // packed.in_features,
        None if bias is None else bias.contiguous().data_ptr(),
        out.data_ptr(),
        TYPES[x.dtype],
        stream_of(x),
    )
    if not covered(status):
        return None
    check(status, "product", struct.shape)
    return out


def cuda_lloyd_max(
    weight: torch.Tensor,
    initial_levels: torch.Tensor,
    initial_thresholds: torch.Tensor,
    group_size: int,
    iterations: int,
    squared: bool,
) -> tuple[torch.Tensor, ...] | None:
    """`lloyd.lloyd_max` on the CUDA library; None where a row does not fit into shared memory."""
    weight = weight.contiguous()
    search = search_of(weight, initial_levels, initial_thresholds, group_size, iterations, squared)
    found = tuple(weight.new_empty(len(weight), width, dtype=torch.float32) for width in (22, 19, 3))
    status = call_cuda(
        "lowra_cuda_lloyd_max",
        weight.device,
        ctypes.byref(search),
        weight.data_ptr(),
        TYPES[weight.dtype],
        *(tensor.data_ptr() for tensor in found),
        stream_of(weight),
    )
    if not covered(status):
        return None
    check(status, "the Lloyd-Max search", shape_of(len(weight), len(weight), 0, weight.shape[1], group_size))
    return found


def cuda_table_gradients(
    gradient: torch.Tensor, packed: PackedMatrix, with_scales: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`table_gradients.table_gradients` on the CUDA library; None where a row has too many groups."""
    struct = packed_of(packed)
    gradient = gradient.contiguous()
    for_levels = torch.empty_like(packed.levels, dtype=torch.float32)
    scales = packed.scales
    for_scales = torch.empty_like(scales, dtype=torch.float32) if with_scales else scales.new_empty(0).float()
    status = call_cuda(
        "lowra_cuda_table_gradients",
        gradient.device,
        ctypes.byref(struct),
        gradient.data_ptr(),
        TYPES[gradient.dtype],
        for_levels.data_ptr(),
        for_scales.data_ptr() if with_scales else None,
        stream_of(gradient),
    )
    if not covered(status):
        return None
    check(status, "gradients of the tables", struct.shape)
    return for_levels, for_scales
