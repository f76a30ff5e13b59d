"""Whether dictionaries were changed, and tensors' kinds and sizes: what compiled code is guarded by, if PyTorch has it.

A dictionary has a number that is another one after every change, so thousands of them are compared in a millisecond.
"""

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

_GUARDS: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


@functools.cache
def are_changes_told() -> bool:
    """Whether PyTorch has what the others here ask, and knows of attributes that are set as this Python sets them."""
    try:
        are_alike = alike([torch.zeros(2)])
        if not are_alike(torch.zeros(2)) or are_alike(torch.zeros(3)):
            return False
        versions([{}])
    except (AttributeError, TypeError, RuntimeError):  # another PyTorch's
        return False
    return all(map(_is_told_of, (nn.Module(), types.SimpleNamespace(), types.ModuleType("told"), _Plain())))


def versions(dictionaries: Iterable[dict[Any, Any]]) -> list[int]:
    """The number that each has until it is changed, and how many entries: from Python 3.12 on an empty one that becomes
    a copy of another (`update`) keeps its number, since PyTorch does not listen to that.
    """
    every = list(dictionaries)
    return [*map(_GUARDS.dict_version, every), *map(len, every)]


def alike(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A function of as many tensors: whether types, devices, sizes, strides and `requires_grad` are those of these."""
    sizes = [list(tensor.shape) for tensor in tensors]
    strides = [list(tensor.stride()) for tensor in tensors]
    return _GUARDS.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


class _Plain:
    pass


def _is_told_of(changing: Any) -> bool:
    found = versions([vars(changing)])
    for value in range(100):  # by then the interpreter has its own way for it
        changing.value = value
        before, found = found, versions([vars(changing)])
        if before == found:
            return False
    return True
