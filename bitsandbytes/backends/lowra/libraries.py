"""The native libraries: the structures and functions of their C interface, and how they are found and loaded.

A library that is missing or of another format version is left aside with one log line.
"""

import contextlib
import ctypes
import logging
import os
import pathlib
from collections.abc import Callable

import torch

from . import layout

logger = logging.getLogger(__name__)

_CUDA_LINES = (12, 13)
_INTERFACE_VERSION = 3


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows4", "rows2", "rows1", "in_features", "group_size")]


class Packed(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("codes", ctypes.c_void_p),
        ("row_order", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("scale_steps", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("scale_type", ctypes.c_int32),
    ]


class Part(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("first_row", "rows", "first_column", "columns")]


class Lloyd(ctypes.Structure):
    _fields_ = [
        ("initial_levels", ctypes.c_void_p),
        ("initial_thresholds", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("iterations", ctypes.c_int32),
        ("squared", ctypes.c_int32),
    ]


# Arguments of the functions: addresses travel as plain integers, which ctypes converts by these types.
_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_CPU_SIGNATURES = {
    "lowra_cpu_quantize": [ctypes.POINTER(Shape), _P, _I, _P, _P, _P, _P, _I],
    "lowra_cpu_dequantize": [ctypes.POINTER(Packed), ctypes.POINTER(Part), _P, _I, _I],
    "lowra_cpu_product": [ctypes.POINTER(Packed), _P, _L, _P, _P, _I, _I],
    "lowra_cpu_product_group": [ctypes.POINTER(Packed), _I, _P, _L, _P, _P, _I, _I],
    "lowra_cpu_dense_product": [_P, _L, _L, _P, _L, _P, _I, _I],
    # of native_decoding.py
    "lowra_cpu_add_norm": [_P, _I],
    "lowra_cpu_attention": [_P, _I, _I],
    "lowra_cpu_lloyd_max": [ctypes.POINTER(Lloyd), _P, _I, _P, _P, _P, _I],
    "lowra_cpu_instructions": [ctypes.c_char_p],
}
_CUDA_SIGNATURES = {
    "lowra_cuda_quantize": [ctypes.POINTER(Shape), _P, _I, _P, _P, _P, _P, _P],
    "lowra_cuda_encode_scales": [_P, _L, _P, _P, _P],
    "lowra_cuda_dequantize": [ctypes.POINTER(Packed), ctypes.POINTER(Part), _P, _I, _P],
    "lowra_cuda_product": [ctypes.POINTER(Packed), _P, _L, _P, _P, _I, _P],
    "lowra_cuda_product_is_quicker": [_L, _L, _L],
    "lowra_cuda_lloyd_max": [ctypes.POINTER(Lloyd), _P, _I, _P, _P, _P, _P],
    "lowra_cuda_table_gradients": [ctypes.POINTER(Packed), _P, _I, _P, _P, _P],
    # of native_shared.py
    "lowra_cuda_shared_tables": [ctypes.POINTER(Packed), _P, _P, _P, _P, _P, _P],
    "lowra_cuda_group_sums": [_P, _P, _I, _L, _L, _L, _P, _P, _L, _P],
    "lowra_cuda_channel_sums": [_P, _I, _P, _I, _L, _L, _P, _L, _P],
    "lowra_cuda_shared_gradients": [_P, _P],
    "lowra_cuda_code": [ctypes.POINTER(ctypes.c_int32)],
    # of native_decoding.py
    "lowra_cuda_product_group": [_P, _I, _P, _L, _P, _P, _P, _I, _P],
    "lowra_cuda_add_norm": [_P, _I, _P],
    "lowra_cuda_gate": [_P, _P, _P, _L, _I, _I, _P],
    "lowra_cuda_attention": [_P, _I, _P],
}


def installed_library(name: str) -> pathlib.Path:
    return pathlib.Path(__file__).with_name(f"lib{name}.so")


# Why a library serves nothing, by "cpu" and "cuda"; for the warning at the first slow product, and `lowra env`.
left_aside: dict[str, str] = {}


def load(path: pathlib.Path, kind: str) -> ctypes.CDLL | None:
    if not path.exists():
        left_aside[kind] = f"{path.name} was not built"
        logger.info("lowra: %s; the PyTorch reference is used in its place", left_aside[kind])
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        left_aside[kind] = f"{path.name} cannot be loaded ({error})"
        logger.warning("lowra: %s; the PyTorch reference is used in its place", left_aside[kind])
        return None
    versions = [getattr(library, f"lowra_{what}_version", lambda: None)() for what in ("format", "interface")]
    signatures = _CPU_SIGNATURES if kind == "cpu" else _CUDA_SIGNATURES
    complete = all(hasattr(library, name) for name in signatures)
    if versions != [layout.FORMAT_VERSION, _INTERFACE_VERSION] or not complete:
        left_aside[kind] = f"{path.name} was built from another version"
        logger.warning("lowra: %s; rebuild with `make build`", left_aside[kind])
        return None
    for name, types in signatures.items():
        getattr(library, name).argtypes = types
    return library


def load_cuda() -> ctypes.CDLL | None:
    if torch.version.cuda is None:
        left_aside["cuda"] = "this PyTorch is built without CUDA"
        return None
    # another build than the installed one, of which two can be compared so (docs/lab/kernels)
    named = os.environ.get("LOWRA_CUDA_LIBRARY")
    lines = [line for line in _CUDA_LINES if installed_library(f"bitsandbytes_lowra_cuda{line}").exists()]
    line = cuda_line(int(torch.version.cuda.split(".")[0]), lines, _driver_line)
    installed = installed_library(f"bitsandbytes_lowra_cuda{line}")
    library = load(pathlib.Path(named) if named else installed, "cuda")
    if named and library is None:
        raise OSError(f"LOWRA_CUDA_LIBRARY={named} is no CUDA library of lowra's format {layout.FORMAT_VERSION}.")
    if library is not None:
        library.lowra_cuda_error.restype = ctypes.c_char_p
    elif lines and line not in lines:
        left_aside["cuda"] += f", and for that of CUDA {max(lines)} the driver is too old"
    return library


def cuda_line(of_torch: int, installed: list[int], driver_line: Callable[[], int]) -> int:
    """Which CUDA library to load: each has the runtime of its line of CUDA in it, which older drivers refuse.

    PyTorch's own line comes first: where PyTorch runs, the driver serves it. Else the newest that the driver serves.

    Args:
        driver_line: asked for the newest line that the driver serves, 0 without one; only where it matters.
    """
    if of_torch in installed or not installed:
        return of_torch
    return max((line for line in installed if line <= driver_line()), default=of_torch)


def _driver_line() -> int:
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):  # there is no driver
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000
