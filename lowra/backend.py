"""Loads bitsandbytes, which registers the ops of its lowra backend."""

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """On some CPUs upstream warns at every import that a kernel for NF4 cannot be had, which concerns nothing here."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _compiling_when_called() -> Iterator[None]:
    """Upstream wraps four of its functions in `torch.compile` while it is imported, which imports the whole compiler.

    That is a fifth of `import lowra`, for functions that most programs never call: within, a function is compiled when
    it is called first.
    """
    compile_now = torch.compile

    def compile_later(model: Any = None, **options: Any) -> Any:
        if not isinstance(model, types.FunctionType):
            return compile_now(model, **options)
        compiled: list[Callable] = []

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(model, **options))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


with _quiet(), _compiling_when_called():
    import bitsandbytes  # noqa: F401
