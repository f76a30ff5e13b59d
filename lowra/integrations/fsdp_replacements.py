"""What FSDP2 does otherwise for packed tensors: it shards integers with any PyTorch, and casts none of their bytes."""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..nn.packed_module import PackedModule
from ..weights.packed import TENSOR_NAMES

SHARDS_INTEGERS = torch.__version__ >= "2.12"


def integers_without_gradients(original: Callable) -> Callable:
    """For `FSDPParam._init_sharded_param`: as PyTorch 2.12 does, a share of a frozen tensor is frozen from the start.

    Before, it is an `nn.Parameter` with gradients first, and told afterwards that it has none.
    """
    if SHARDS_INTEGERS:
        return original
    module: Any = sys.modules[original.__module__]

    @functools.wraps(original)
    def _init_sharded_param(self: Any, param: nn.Parameter, *args: Any, **kwargs: Any) -> None:
        if param.is_floating_point() or param.is_complex():
            original(self, param, *args, **kwargs)
            return
        former = module.nn
        frozen = functools.partial(nn.Parameter, requires_grad=False)
        module.nn = types.SimpleNamespace(Module=nn.Module, Parameter=frozen)  # all that it knows of torch.nn
        try:
            original(self, param, *args, **kwargs)
        finally:
            module.nn = former

    return _init_sharded_param


def packed_as_they_are(original: Callable) -> Callable:
    """For `FSDPParam.init_dtype_attrs`, which says to what type a parameter is cast when it is gathered."""

    @functools.wraps(original)
    def init_dtype_attrs(self: Any, mp_policy: Any) -> None:
        place = self._module_info
        if isinstance(place.module, PackedModule) and place.param_name in TENSOR_NAMES:
            mp_policy = type(mp_policy)()
        original(self, mp_policy)

    return init_dtype_attrs
