"""Which adapter each sequence of a batch goes through, as PEFT says it to the layers: by hooks.

A decoding step reads the layers' tensors and calls no module, so whatever else hangs on the modules would be passed by.
"""

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as all_modules

from .projections import Unsupported

NO_ADAPTER = "__base__"  # PEFT's name for a sequence that has none

_OF_NAMES = "_adapter_names_pre_forward_hook"
_WATCHING = "transformers."  # hooks of it look on: inputs that require gradients, states that are asked for


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The adapter of each sequence, while PEFT's `adapter_names=` holds; empty where the active ones are for all.

    Raises:
        Unsupported: a module has another hook.
    """
    names: tuple[str, ...] = ()
    for owner, hook in _hooks(model):
        function: Any = hook.func if isinstance(hook, functools.partial) else hook
        if getattr(function, "__name__", "") == _OF_NAMES:
            names = tuple(hook.keywords["adapter_names"])
        elif not str(getattr(function, "__module__", "")).startswith(_WATCHING):
            raise Unsupported(f"{owner} has a hook")
    return names


def _hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Forward hooks, and who has them."""
    for of_all in (all_modules._global_forward_pre_hooks, all_modules._global_forward_hooks):
        yield from (("every module", hook) for hook in of_all.values())
    for module in model.modules():
        if module._forward_pre_hooks or module._forward_hooks:
            owner = type(module).__name__
            yield from ((owner, hook) for hook in module._forward_pre_hooks.values())
            yield from ((owner, hook) for hook in module._forward_hooks.values())
