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
_EQUIVALENT = "liger_kernel."
_WATCHING = "transformers."  # hooks of it look on: inputs that require gradients, states that are asked for


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The adapter of each sequence, while PEFT's `adapter_names=` holds; empty where the active ones are for all.

    Raises:
        Unsupported: a module has another hook.
    """
    names: tuple[str, ...] = ()
    for owner, hook in _hooks(model):
        if _names_adapters(hook):
            names = tuple(hook.keywords["adapter_names"])
        elif not str(getattr(hook, "__module__", "")).startswith(_WATCHING):
            raise Unsupported(f"{owner} has a hook")
    for module in model.modules():
        forward = vars(module).get("forward")
        # Liger's functions compute the same; Accelerate's hooks stand in the place of a forward
        if forward is not None and not str(getattr(forward, "__module__", "")).startswith(_EQUIVALENT):
            raise Unsupported(f"the forward of {type(module).__name__} has been replaced")
    return names


def forget_adapter_names(model: nn.Module) -> None:
    """Removes PEFT's hooks, which an exception in `generate` leaves behind: the next call would go by them."""
    for module in model.modules():
        for number in [number for number, hook in module._forward_pre_hooks.items() if _names_adapters(hook)]:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def _names_adapters(hook: Any) -> bool:
    return isinstance(hook, functools.partial) and getattr(hook.func, "__name__", "") == _OF_NAMES


def _hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Forward hooks, and who has them."""
    for of_all in (all_modules._global_forward_pre_hooks, all_modules._global_forward_hooks):
        yield from (("every module", hook) for hook in of_all.values())
    for module in model.modules():
        if module._forward_pre_hooks or module._forward_hooks:
            owner = type(module).__name__
            yield from ((owner, hook) for hook in module._forward_pre_hooks.values())
            yield from ((owner, hook) for hook in module._forward_hooks.values())
