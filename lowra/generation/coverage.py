"""Whether a model computes what its classes say: who wrote its forwards and its attention, dropout, autocast and modes.

A decoding step calls no module of a model's layers, so whatever somebody has put into them would be passed by.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..nn.authors import called_by, home_of, is_by, parts_of
from ..nn.hooks import mode_around
from .mixed_batches import EQUIVALENT
from .projections import Unsupported

_KNOWN = ("transformers.", "torch.", "peft.", "lowra.")  # whose modules are known here
_CALLS = ("__call__", "_call_impl")
_ATTENTION = ("transformers.", "functools")  # partials of theirs
_OF_GENERATE = ("_sample", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


def check_mode(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if not module.training:
            continue
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "attention_dropout", 0.0)
        if rate > 0:
            raise Unsupported("the model is in training mode, with dropout: call model.eval() first")


def check_surroundings(device: str, dtype: torch.dtype) -> None:
    """
    Args:
        device, dtype: of the model.

    Raises:
        Unsupported: what the call stands in has its own way with functions of torch.
    """
    if (mode := mode_around()) is not None:
        raise Unsupported(f"{mode}, in which the model is called, is to see what it calls")
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
    kinds = list(kinds)
    methods = [(name, kind) for name in ("forward", *_CALLS) for kind in kinds]
    for name, kind in [*methods, *((name, model) for name in _OF_GENERATE)]:
        owner = next(base for base in kind.__mro__ if name in vars(base))
        function = vars(owner)[name]
        if is_by(function, EQUIVALENT):
            continue
        is_own = is_by(function, _KNOWN) and home_of(parts_of(function)[-1]) == owner.__module__
        if not is_own:
            others = [home_of(part) for part in parts_of(function) if not is_by(part, _KNOWN)]
            raise Unsupported(f"the {name} of {kind.__name__} is by {(others or [home_of(function)])[0]}")
        if name != "forward":
            continue
        for part in called_by(function):
            if not home_of(part).startswith((*_KNOWN, *EQUIVALENT, "builtins")):
                raise Unsupported(f"{part.__name__}, which {kind.__name__} calls, is by {home_of(part)}")


def written(kinds: Iterable[Any]) -> set[Any]:
    """What changes with what the forwards of classes do: functions, and their code."""
    functions = {id(part): part for kind in kinds for part in called_by(kind.forward)}.values()
    own = {(kind, kind.forward, kind.__call__, kind._call_impl) for kind in kinds}
    return own | {(function, getattr(function, "__code__", None)) for function in functions}


def check_parts(model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
    """
    Args:
        modules: of the model.

    Raises:
        Unsupported: what a module calls by a name is not the module of that name, or has another configuration.
    """
    config = model.config
    for module in modules:
        own = vars(module)
        below, parameters, buffers = own["_modules"], own["_parameters"], own["_buffers"]
        alone = own.keys().isdisjoint(below) and own.keys().isdisjoint(parameters)
        if not (alone and below.keys().isdisjoint(parameters) and below.keys().isdisjoint(buffers)):
            raise Unsupported(f"{type(module).__name__} has something else in the place of a module or a parameter")
        other = own.get("config", config)
        if other is not config and isinstance(other, PreTrainedConfig) and not _are_same(other, config):
            raise Unsupported(f"{type(module).__name__} has another configuration than the model")


def check_attention(config: PreTrainedConfig) -> None:
    """
    Raises:
        Unsupported: a function of somebody else computes attention, or its mask.
    """
    name = config._attn_implementation
    # None for "eager", which is the architecture's own
    attention, mask = (known.get(name, None) for known in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS))
    for function in (attention, type(ALL_ATTENTION_FUNCTIONS).get_interface):
        if function is not None and not is_by(function, _ATTENTION):
            raise Unsupported(f"attention is computed by a function of its own ({name})")
    if mask is not None and not is_by(mask, _ATTENTION):
        raise Unsupported(f"the mask of attention is made by a function of its own ({name})")


def _are_same(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    return one._attn_implementation == other._attn_implementation and one.to_dict() == other.to_dict()
