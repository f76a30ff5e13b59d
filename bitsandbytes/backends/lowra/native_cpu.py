"""Calls the functions of the CPU library on tensors."""

import ctypes
import os
from collections.abc import Sequence

import torch

from . import native
from .layout import PackedMatrix
from .libraries import Packed, Part

MOST_TOKENS = 16
# best first, as the library takes them
_INSTRUCTIONS = ("avx512vnni", "avx512", "avxvnni", "avx2", "neondot", "neon", "generic")


def quantize(
    weight: torch.Tensor,
    row_order: torch.Tensor,
    thresholds: torch.Tensor,
    rows_4bit: int,
    rows_2bit: int,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.quantize` on the CPU library."""
    shape, codes, absmax = native.room_for_codes(weight, rows_4bit, rows_2bit, group_size)
    weight, row_order, thresholds = weight.contiguous(), row_order.contiguous(), thresholds.contiguous()
    status = native.call_cpu(
        "lowra_cpu_quantize",
        ctypes.byref(shape),
        weight.data_ptr(),
        native.TYPES[weight.dtype],
        row_order.data_ptr(),
        thresholds.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    native.check(status, "quantisation", shape)
    return codes, absmax


def dequantize(packed: PackedMatrix, dtype: torch.dtype, part: tuple[int, int, int, int] | None = None) -> torch.Tensor:
    """`reference.dequantize` on the CPU library, or a part (first row, rows, first column, columns) of it."""
    struct = native.packed_of(packed)
    part = (0, packed.rows, 0, packed.in_features) if part is None else part
    out = torch.empty(part[1], part[3], dtype=dtype)
    status = native.call_cpu(
        "lowra_cpu_dequantize",
        ctypes.byref(struct),
        ctypes.byref(Part(*part)),
        out.data_ptr(),
        native.TYPES[dtype],
        torch.get_num_threads(),
    )
    native.check(status, "dequantisation", struct.shape)
    return out


def product(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    """`ops.linear` without a dense weight, on the CPU library; up to `MOST_TOKENS` tokens."""
    struct = native.packed_of(packed)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], packed.rows)
    status = native.call_cpu(
        "lowra_cpu_product",
        ctypes.byref(struct),
        x.data_ptr(),
        x.numel() // packed.in_features,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        native.TYPES[x.dtype],
        torch.get_num_threads(),
    )
    native.check(status, "product", struct.shape)
    return out


class CpuGroup:
    """Packed weights that are multiplied with one x on the CPU library, `reference.linear_in_integers`.

    Made once for weights that stay where they are: filling the structs takes as long as a small product.
    """

    def __init__(self, weights: Sequence[tuple[PackedMatrix, torch.Tensor | None]]):
        first, self._count = weights[0][0], len(weights)
        self._covered = self._count <= native.MOST_GROUPED and all(p.sizes[2:] == first.sizes[2:] for p, _ in weights)
        self._tensors = [packed for packed, _ in weights]
        self._biases = [None if bias is None else bias.contiguous() for _, bias in weights]
        self._rows = [packed.rows for packed, _ in weights]
        self._structs = (Packed * self._count)(*(native.packed_of(packed) for packed, _ in weights))
        self._addresses = ctypes.c_void_p * self._count
        self._of_biases = self._addresses(*(None if bias is None else bias.data_ptr() for bias in self._biases))

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        """Products of x [tokens, K]; None where this processor has no kernels for them."""
        if not self._covered:
            return None
        x = x.contiguous()
        tokens = len(x)
        outs = [x.new_empty((tokens, rows)) for rows in self._rows]
        status = native.call_cpu(
            "lowra_cpu_product_group",
            self._structs,
            self._count,
            x.data_ptr(),
            tokens,
            self._of_biases,
            self._addresses(*[out.data_ptr() for out in outs]),
            native.TYPES[x.dtype],
            torch.get_num_threads(),
        )
        if status == native.UNSUPPORTED:
            return None
        native.check(status, "product", self._structs[0].shape)
        return outs


def dense_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [tokens, K] times the transposed dense weight [N, K] of the same type, sums in float32; up to
    `MOST_TOKENS` tokens. PyTorch takes up to twice as long in 16 bits."""
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty(len(x), len(weight))
    status = native.call_cpu(
        "lowra_cpu_dense_product",
        weight.data_ptr(),
        *weight.shape,
        x.data_ptr(),
        len(x),
        out.data_ptr(),
        native.TYPES[x.dtype],
        torch.get_num_threads(),
    )
    native.check_status(status, f"a product of {list(x.shape)} and {list(weight.shape)}")
    return out


def lloyd_max(
    weight: torch.Tensor,
    initial_levels: torch.Tensor,
    initial_thresholds: torch.Tensor,
    group_size: int,
    iterations: int,
    squared: bool,
) -> tuple[torch.Tensor, ...]:
    """`lloyd.lloyd_max` on the CPU library."""
    weight = weight.contiguous()
    search = native.search_of(weight, initial_levels, initial_thresholds, group_size, iterations, squared)
    found = [torch.empty(len(weight), width, dtype=torch.float32) for width in (22, 19, 3)]
    status = native.call_cpu(
        "lowra_cpu_lloyd_max",
        ctypes.byref(search),
        weight.data_ptr(),
        native.TYPES[weight.dtype],
        *(tensor.data_ptr() for tensor in found),
        torch.get_num_threads(),
    )
    native.check(
        status, "the Lloyd-Max search", native.shape_of(len(weight), len(weight), 0, weight.shape[1], group_size)
    )
    return tuple(found)


def choose_instructions(name: str | None) -> None:
    """Has the CPU library use the kernels of one instruction set, or of the best there is.

    Args:
        name: "avx512vnni", "avx512", "avxvnni", "avx2", "neondot", "neon" or "generic".

    Raises:
        OSError: this processor, or the library, has none of that name.
    """
    if _asked_for(name) == native.UNSUPPORTED:
        raise OSError(f"LOWRA_CPU={name} names no kernels of this processor: {', '.join(_INSTRUCTIONS)} are known.")


def _asked_for(name: str | None) -> int:
    return native.call_cpu("lowra_cpu_instructions", None if name is None else name.encode())


def instructions() -> list[str]:
    """The instruction sets whose kernels run on this processor, the one in use first."""
    names = [name for name in _INSTRUCTIONS if _asked_for(name) != native.UNSUPPORTED]
    chosen = os.environ.get("LOWRA_CPU")
    choose_instructions(chosen)
    return sorted(names, key=lambda name: name != chosen)


if native.cpu_available() and "LOWRA_CPU" in os.environ:
    choose_instructions(os.environ["LOWRA_CPU"])
