"""The layers that Transformers checkpoints one by one, and another function in the place of torch.utils.checkpoint.

Transformers calls each such layer through a function that a model may be given. Every trainer enables checkpointing
again with its own, which `replace_checkpointing` outlasts.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..nn.checkpointing import enable_checkpointing
from .model_patches import CHECKPOINTING


def checkpointed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that Transformers checkpoints one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def replace_checkpointing(model: nn.Module, install: Callable[[Any], None], what: str) -> None:
    """Enables gradient checkpointing if it is not, and installs something in the layers, now and when enabled anew.

    Args:
        model: a model of Transformers, or a PeftModel on one.
        install: a module's function, called with the model of Transformers: puts what it likes into the place of its
            layers' `_gradient_checkpointing_func`.
        what: would be done to its layers, for messages.

    Raises:
        ValueError: it has no such layers, or something else has been installed in them.
    """
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not checkpointed_layers(bare):
        raise ValueError(
            f"{type(bare).__name__} has no layers that Transformers checkpoints one by one, so there is nothing to "
            f"{what}: train it without."
        )
    CHECKPOINTING.check()
    before = vars(bare).get("_set_gradient_checkpointing")
    if isinstance(before, _Again) and before.install is not install:
        raise ValueError(
            "Layers run as CUDA graphs (capture_layers) or with their inputs on the host (offload_activations), not "
            "both: load the model anew and call one of them."
        )
    if not any(getattr(module, "gradient_checkpointing", False) for module in bare.modules()):
        enable_checkpointing(bare)
    if not isinstance(before, _Again):
        bare._set_gradient_checkpointing = _Again(bare, install)
    install(bare)


class InPlaceOfCheckpoint:
    """In the place of torch.utils.checkpoint for one layer; a copy of the model, or one that is pickled, is without it.

    Args:
        usual: the function that was there.
    """

    def __init__(self, usual: Callable[..., Any]):
        self._usual = usual

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._usual, memo)

    def __reduce__(self) -> tuple:
        return _as_it_is, (self._usual,)


def put_in_place(
    model: nn.Module, make: Callable[[GradientCheckpointingLayer, Callable[..., Any]], InPlaceOfCheckpoint]
) -> None:
    """Each layer that is checkpointed gets what `make(layer, usual)` gives, unless it has such a thing."""
    for layer in checkpointed_layers(model):
        usual: Any = layer._gradient_checkpointing_func if layer.gradient_checkpointing else None
        if usual is not None and not isinstance(usual, InPlaceOfCheckpoint):
            vars(layer)["_gradient_checkpointing_func"] = make(layer, usual)


def _as_it_is(function: Any) -> Any:
    return function


class _Again:
    """In the place of a model's `_set_gradient_checkpointing`: what it put in the layers' places is replaced again."""

    def __init__(self, model: Any, install: Callable[[Any], None]):
        self._usual = model._set_gradient_checkpointing
        self.install = install
        functools.update_wrapper(self, self._usual)  # Transformers asks for its parameters

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._usual(*args, **kwargs)
        self.install(self._usual.__self__)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._usual, memo)

    def __reduce__(self) -> tuple:
        return getattr, (self._usual.__self__, "_set_gradient_checkpointing")
