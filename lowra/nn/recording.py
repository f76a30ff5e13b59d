"""Kernels recorded as a CUDA graph, with what PyTorch leaves to its caller."""

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


class _Streams(threading.local):
    def __init__(self) -> None:
        self.of: dict[int, torch.cuda.Stream] = {}


_own = _Streams()


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of a device on which calls can be recorded: one for each thread.

    cuBLAS keeps memory for each stream that it has seen, on an H200 32 MiB, and PyTorch hands out 32 of them in turn.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _own.of:
        _own.of[index] = torch.cuda.Stream(index)
    return _own.of[index]


@contextlib.contextmanager
def aside(stream: torch.cuda.Stream) -> Iterator[None]:
    """On a stream, between what was launched before and what will be launched after."""
    now = torch.cuda.current_stream(stream.device)
    stream.wait_stream(now)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        now.wait_stream(stream)


def record(call: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """The kernels of a call on the current stream, which none has run yet.

    Args:
        call: what launches them. The stream must not be the default one.
        pool: memory shared with other graphs (`torch.cuda.graph_pool_handle`), or None.

    Raises:
        RuntimeError: PyTorch could not capture them.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with collector_at_rest():
            # Other threads (of a loader, of NCCL) may go on with what a capture forbids.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
    except RuntimeError:
        _end_for_generators()
        raise
    return graph


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Python frees no cycles within: to free another graph, as of a model that has gone, would break the capture."""
    resting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if resting:
            gc.enable()


def _end_for_generators() -> None:
    """After a capture that failed: random numbers wait for its end, and graphs that draw some cannot be replayed.

    The end of another capture, of nothing, is one to them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the graph is empty
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        graph.capture_end()
