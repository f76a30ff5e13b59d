"""Whether a model computes what its classes say: who wrote its forwards and its attention, dropout and autocast.

A decoding step calls no module of a model's layers, so whatever somebody has put into them would be passed by.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .mixed_batches import EQUIVALENT
from .projections import Unsupported

_KNOWN = ("transformers.", "torch.", "peft.", "lowra.")  # whose modules are known here
_OF_GENERATE = ("_sample", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


def check_mode(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if not module.training:
            continue
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "attention_dropout", 0.0)
        if rate > 0:
            raise Unsupported("the model is in training mode, with dropout: call model.eval() first")


def check_autocast(device: str, dtype: torch.dtype) -> None:
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype:
        raise Unsupported(f"autocast computes in {torch.get_autocast_dtype(device)} and the model is {dtype}")


def check_written(model: type, kinds: Iterable[Any]) -> None:
    """
    Args:
        model: its class.
        kinds: classes of its modules but those that this path calls, embeddings and head.

    Raises:
        Unsupported: one does what somebody else has written.
    """
    methods = [*(("forward", kind) for kind in kinds), *((name, model) for name in _OF_GENERATE)]
    for name, kind in methods:
        owner = next(base for base in kind.__mro__ if name in vars(base))
        module = str(getattr(vars(owner)[name], "__module__", ""))
        is_own = module == owner.__module__ and module.startswith(_KNOWN)
        if not is_own and not module.startswith(EQUIVALENT):
            raise Unsupported(f"the {name} of {kind.__name__} is by {module}")


def check_attention(config: PreTrainedConfig) -> None:
    """
    Raises:
        Unsupported: a function of somebody else computes attention.
    """
    name = config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name, None)  # None for "eager", which is the architecture's own
    while isinstance(function, functools.partial):
        function = function.func
    if function is not None and not str(getattr(function, "__module__", "")).startswith("transformers."):
        raise Unsupported(f"attention is computed by a function of its own ({name})")
