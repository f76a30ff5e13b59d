"""Gradient checkpointing by the name that the installed Transformers has for it."""

from typing import Any

from torch import nn


def enable_checkpointing(model: nn.Module) -> None:
    """Lets a model of Transformers compute the activations of its layers again in the backward pass."""
    bare: Any = model
    # From 5.23 on the other name is deprecated, and 6 drops it.
    newer = getattr(bare, "activation_checkpointing_enable", None)
    (newer or bare.gradient_checkpointing_enable)({"use_reentrant": False})
