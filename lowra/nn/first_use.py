"""What has to happen before the packed tensors of a model are used for the first time, and not while it is loaded."""

import itertools
import threading
import weakref
from collections.abc import Callable

import torch

_numbers = itertools.count()
_waiting: "weakref.WeakValueDictionary[int, FirstUse]" = weakref.WeakValueDictionary()  # compiled code knows numbers


class FirstUse:
    """Calls a function once, for whichever layer of a model is used first; where it raises, at every use again.

    Args:
        function: without arguments.
    """

    def __init__(self, function: Callable[[], None]):
        self._function: Callable[[], None] | None = function
        self._lock = threading.Lock()
        self.number = next(_numbers)
        _waiting[self.number] = self

    def __call__(self) -> None:
        if torch.compiler.is_compiling():
            _call_while_compiling(self.number)
        else:
            self.call()

    def call(self) -> None:
        """Calls the function unless that has been done."""
        with self._lock:
            if self._function is not None:
                self._function()
                self._function = None


@torch.compiler.assume_constant_result
def _call_while_compiling(number: int) -> None:
    """Runs once, while a forward is being compiled, and leaves nothing in the compiled code."""
    if (waiting := _waiting.get(number)) is not None:
        waiting.call()
