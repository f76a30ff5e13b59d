"""Who waits for a module's own forward: whatever computes in its place would leave them out."""

from typing import Any

from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
COMPILED = "_compiled_call_impl"  # what `module.compile()` makes of the forward
REPLACING = ("forward", "_call_impl", COMPILED)  # of a module's own attributes: called in place of its class's
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")


def hooks_of_all(kinds: tuple[str, ...] = HOOKS) -> list[dict[int, Any]]:
    """Dictionaries of the hooks that every module has."""
    return [vars(nn.modules.module)[f"_global{kind}"] for kind in kinds]


_OF_ALL = hooks_of_all()


def is_awaited(module: nn.Module) -> bool:
    """Whether hooks wait for the module's forward, or something stands in its place, as Accelerate's offloading."""
    own = vars(module)
    return not own.keys().isdisjoint(REPLACING) or any(own[kind] for kind in HOOKS) or any(_OF_ALL)


def mode_around() -> str | None:
    """The class of a mode of torch that sees, and may change, each call of a function or an operation, or None.

    Not of one that says where tensors are made (`with torch.device(...)`).
    """
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return next((type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)), None)
