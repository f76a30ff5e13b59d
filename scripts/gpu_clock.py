"""Clocks of the benchmarks: of the host, and of how long the GPU works; and what the GPU's memory held at most."""

import time
from collections.abc import Callable

import torch
from torch.profiler import profile

PREPARING = 3  # steps: the first of a shape makes what lasts, the second captures


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], None]) -> float:
    """Milliseconds between two synchronisations."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - started)


def busy(profiler: profile) -> tuple[float, int]:
    """Milliseconds in which the GPU works, and its kernels."""
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = last = 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total / 1e3, len(spans)


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory() -> dict[str, float]:
    """GiB: the peaks of PyTorch, and what the device has given away to all."""
    if not torch.cuda.is_available():
        return {}
    free, whole = torch.cuda.mem_get_info()
    sizes = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {f"{name}_gib": size / 2**30 for name, size in (sizes | {"device": whole - free}).items()}
