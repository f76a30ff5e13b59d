"""Which adapter each sequence of a batch goes through, as PEFT says it to the layers: by hooks.

A decoding step reads the layers' tensors and calls no module, so whatever else hangs on the modules would be passed by.
"""

import functools
from typing import Any

from torch import nn

from ..nn.authors import is_by
from ..nn.hooks import COMPILED, FORWARD_HOOKS, REPLACING, hooks_of_all
from .projections import Unsupported

NO_ADAPTER = "__base__"  # PEFT's name for a sequence that has none

_OF_NAMES = "_adapter_names_pre_forward_hook"
EQUIVALENT = ("liger_kernel.", "lowra.")  # whose forwards compute the same, such as those of tiled MLPs


def adapter_names(modules: list[nn.Module]) -> tuple[str, ...]:
    """The adapter of each sequence, while PEFT's `adapter_names=` holds; empty where the active ones are for all.

    Args:
        modules: of a model, but for those that have neither hooks nor another forward than their class.

    Raises:
        Unsupported: a module has another hook, or the names are none.
    """
    names: tuple[str, ...] = ()
    if any(not _looks_on(hook) for hooks in hooks_of_all(FORWARD_HOOKS) for hook in hooks.values()):
        raise Unsupported("every module has a hook")
    before, after = FORWARD_HOOKS  # no others are called without gradients
    for module, own in zip(modules, map(vars, modules), strict=True):
        if not own[before] and not own[after] and own.keys().isdisjoint(REPLACING):  # some thousand
            continue
        for hook in (*own[before].values(), *own[after].values()):
            if _names_adapters(hook):
                names = tuple(hook.keywords["adapter_names"])
                if not names:
                    raise Unsupported("the batch names no adapters")
            elif not _looks_on(hook):
                raise Unsupported(f"{type(module).__name__} has a hook")
        for name in REPLACING:  # such as Accelerate's hooks do
            if own.get(name) is None or is_by(own[name], EQUIVALENT):
                continue
            if name == COMPILED and is_by(own[name], "torch."):
                continue
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


def _looks_on(hook: Any) -> bool:
    """Transformers' own hooks do: inputs that require gradients, states that are asked for."""
    return is_by(hook, "transformers.")
