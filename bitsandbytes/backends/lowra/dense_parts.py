"""Products with packed weights of which a part at a time is dense: for more tokens than fused kernels take."""

import platform
from typing import Any

import torch

from . import checks, native, native_cpu
from .layout import PackedMatrix

# Dense bytes of a weight that a product on a GPU holds at once. What a 13B has stays whole: parts of 24 MiB took 1 %
# off a 7B's peak, for 35 launches a layer (docs/lab/log.md). A 70B's widest weight is 448 MiB.
DENSE_BYTES = 256 << 20
# On the CPU, what stays in its caches between its decoding and its product (docs/lab/kernels/cpu.md).
CPU_DENSE_BYTES = 4 << 20


def at_once(count: int, across: int, x: torch.Tensor) -> int:
    """Rows (or columns) of a weight to be dense at a time: as equal as multiples of 256 can be.

    Args:
        count: that there are.
        across: how many numbers each has.
        x: what they are multiplied with.
    """
    bytes_of_all = count * across * factor_type(x).itemsize
    parts = max(1, -(-bytes_of_all // (CPU_DENSE_BYTES if x.is_cpu else DENSE_BYTES)))
    return -(-count // parts // 256) * 256


def factor_type(tensor: torch.Tensor) -> torch.dtype:
    """In which type a dense part of a weight is multiplied with this tensor."""
    if tensor.is_cuda or torch.cpu._is_avx512_bf16_supported():
        return tensor.dtype
    return torch.float32  # a CPU that multiplies nothing narrower takes three times as long for bfloat16


# PyTorch has MKL multiply float32, which leaves AVX-512 unused on AMD's processors; oneDNN, which it has multiply
# bfloat16, takes half the time there (docs/lab/kernels/cpu.md).
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")
_onednn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _HAS_ONEDNN else None


def _dense_part(packed: PackedMatrix, part: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """`lowra_dequantize_part`; on a CPU without the dispatcher, which takes half as long as decoding a small weight."""
    plain = type(packed.codes) in (torch.Tensor, torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0
    if plain and packed.codes.is_cpu and native.cpu_available():
        checks.check_packed_once(packed, dtype)
        checks.check_memory(*packed.tensors)
        return native_cpu.dequantize(packed, dtype, part)
    return torch.ops.bitsandbytes.lowra_dequantize_part(*packed, *part, dtype)


def _multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Puts x [T, K] times weight [K, N], plus bias, into out [T, N], all of one type."""
    for_onednn = _onednn_linear is not None and x.is_cpu and x.dtype == torch.float32 and len(x) > 0
    if for_onednn and torch.backends.mkldnn.enabled:
        out.copy_(_onednn_linear(x, weight.t(), bias, "none", [], ""))
    elif bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def product_by_rows(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None, rows: int) -> torch.Tensor:
    """x [..., K] times the transposed packed weight [N, K], plus bias, with so many rows of the weight dense at a time.

    Not differentiable.
    """
    dtype = factor_type(x)
    flat = x.reshape(-1, packed.in_features).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    whole = flat.new_empty(*x.shape[:-1], packed.rows)  # returned as it is: a view could not be written into afterwards
    out = whole.view(flat.shape[0], packed.rows)
    for first in range(0, packed.rows, rows):
        block = slice(first, min(first + rows, packed.rows))
        part = (first, block.stop - first, 0, packed.in_features)
        weight = _dense_part(packed, part, dtype).t()
        _multiply(flat, weight, out[:, block], None if bias is None else bias[block])
        del weight  # or two parts would be held while the next is made
    return whole.to(x.dtype)


def product_by_columns(gradient: torch.Tensor, packed: PackedMatrix, columns: int) -> torch.Tensor:
    """gradient [..., N] times the packed weight [N, K], with so many columns of the weight dense at a time.

    Not differentiable. columns: a multiple of 256.
    """
    dtype = factor_type(gradient)
    flat = gradient.reshape(-1, packed.rows).to(dtype)
    out = flat.new_empty(flat.shape[0], packed.in_features)
    for first in range(0, packed.in_features, columns):
        block = slice(first, min(first + columns, packed.in_features))
        part = (0, packed.rows, first, block.stop - first)
        weight = _dense_part(packed, part, dtype)
        _multiply(flat, weight, out[:, block])
        del weight
    return out.to(gradient.dtype).view(*gradient.shape[:-1], packed.in_features)
