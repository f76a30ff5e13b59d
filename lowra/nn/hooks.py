"""Who waits for a module's own forward: whatever computes in its place would leave them out."""

from typing import Any

from torch import nn

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")


def hooks_of_all(kinds: tuple[str, ...] = HOOKS) -> list[dict[int, Any]]:
    """Dictionaries of the hooks that every module has."""
    return [vars(nn.modules.module)[f"_global{kind}"] for kind in kinds]


_OF_ALL = hooks_of_all()


def is_awaited(module: nn.Module) -> bool:
    """Whether hooks wait for the module's forward, or something stands in its place, as Accelerate's offloading."""
    own = vars(module)
    return "forward" in own or any(own[kind] for kind in HOOKS) or any(_OF_ALL)
