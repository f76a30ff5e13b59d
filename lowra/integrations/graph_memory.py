"""Whether a GPU has room for graphs, which work in memory that nothing else gets.

On a card that a step just fits, one with graphs would stop half way, in whatever happens to ask for memory next. What a
step needs without graphs can be seen: how much was allocated when a pass began, and the most that ever was. Gradients
and an optimiser's states come with the first steps and are in both from then on, so it matters which passes were seen.
"""

import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from bitsandbytes.backends.lowra.dense_parts import DENSE_BYTES

from ..nn.captured import keeping_as_it_is
from ..nn.linear import LowRALinear

ROOM_BETWEEN = 0.03  # share of what is allocated that is lost between blocks
_GRADIENTS = 0.3  # of what a layer keeps for backward: gradients of the widest of it that live at once
_BUFFERS = 4  # of the hidden states' size: these, what comes out, and the gradients of both
_OPTIMIZER = 12  # bytes a trained number: AdamW's two moments, and its gradient


class Room:
    """What passes of one model need beside graphs, from what is seen of them: forward and backward are one pass here.

    Args:
        model: that is trained.
        device: a GPU.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device = model, device
        self._passes: dict[int, _Passes] = {}  # by hashes of keys, which are long
        self._peak = 0
        self._steps = 0
        self._with_states = sys.maxsize  # passes after so many steps had all states beside them that there are
        # Of each optimiser that has stepped: the model's parameters without a gradient yet; None if it has none of them
        self._stateless: weakref.WeakKeyDictionary[Optimizer, list | None] = weakref.WeakKeyDictionary()
        self._stepped_with: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        this = weakref.ref(self)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: _tell(this(), optimizer))
        weakref.finalize(self, handle.remove)

    def begins(self, key: Hashable, layer: nn.Module) -> None:
        """Notes what is allocated where a pass begins, which is in the layer that such passes were first seen in.

        Args:
            key: what passes have in common that need the same.
            layer: that is about to run, without graphs.
        """
        passes = self._passes.setdefault(hash(key), _Passes(layer))
        if passes.opener is layer:
            passes.begin(self._steps, torch.cuda.memory_allocated(self._device))
            self._look_at_peak()

    def may_have(self, key: Hashable) -> bool:
        """Whether it is worth asking for: not again before the optimiser's next step, when more is known."""
        passes = self._passes.get(hash(key))
        return passes is None or passes.asked != self._steps

    def lacking(self, key: Hashable, bytes_needed: Callable[[], float]) -> str:
        """Why there are to be no graphs, for now; nothing where there may be.

        Args:
            key: of passes that they are to be made for, one of which `begins` has seen.
            bytes_needed: gives the size of the graphs; called once for each key.
        """
        passes = self._passes[hash(key)]
        if passes.needed is None:
            passes.needed = bytes_needed()
        now = torch.cuda.memory_allocated(self._device)
        self._look_at_peak()
        seen = passes.whole(self._with_states, self._steps)
        trained = self._trained()
        if seen is None:  # the peak may be of one without states, or without the gradients that others accumulated
            to_come = _OPTIMIZER * sum(parameter.numel() for parameter in trained)
        else:
            met = self._stepped_with
            without = sum(parameter.numel() for parameter in trained if met.get(id(parameter)) is not parameter)
            to_come = max(0, now - seen) + _OPTIMIZER * without
        if has_room(passes.needed, self._peak - now + to_come, self._device):
            return ""
        passes.asked = self._steps
        beside = "the GPU has no room for graphs beside a step"
        return f"{beside}, as far as is known before the optimiser has stepped twice" if seen is None else beside

    def after_step(self, optimizer: Optimizer) -> None:
        """Notes that an optimiser has stepped, which then has states of all parameters that had a gradient."""
        if optimizer not in self._stateless:
            own = set(map(id, self._trained()))
            parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
            self._stateless[optimizer] = parameters or None
        waiting = self._stateless[optimizer]
        if waiting is None:
            return  # of another model
        if stepped := {id(parameter): parameter for parameter in waiting if parameter.grad is not None}:
            self._stateless[optimizer] = [parameter for parameter in waiting if id(parameter) not in stepped]
            self._stepped_with.update(stepped)
            self._with_states = self._steps + 1
        if any(passes.began_after(self._steps) for passes in self._passes.values()):
            self._look_at_peak()
        self._steps += 1

    def _look_at_peak(self) -> None:
        """Kept, since whoever measures a run has PyTorch forget it."""
        self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]


class _Passes:
    """Those of one key.

    Attributes:
        opener: the layer that they begin in.
        needed: bytes of their graphs, once known.
        asked: after how many of the optimiser's steps there was no room, if it was asked for.
    """

    def __init__(self, opener: nn.Module):
        self.opener = opener
        self.needed: float | None = None
        self.asked: int | None = None
        # Steps there had been, and bytes allocated, when the first pass between two steps began: of the last two times.
        self._begun: list[tuple[int, int]] = []

    def begin(self, steps: int, allocated: int) -> None:
        """Notes a pass."""
        if not self.began_after(steps):
            self._begun = [*self._begun[-1:], (steps, allocated)]

    def began_after(self, steps: int) -> bool:
        """Whether one has begun since so many steps."""
        return bool(self._begun) and self._begun[-1][0] == steps

    def whole(self, since: int, until: int) -> int | None:
        """Bytes allocated when the latest began that came to its end, after so many steps; None if there was none."""
        return next((allocated for steps, allocated in reversed(self._begun) if since <= steps < until), None)


def _tell(room: Room | None, optimizer: Optimizer) -> None:
    if room is not None:
        room.after_step(optimizer)


def has_room(needed: float, others: float, device: torch.device) -> bool:
    """Whether a GPU has room for more than is allocated now.

    Args:
        needed: bytes of graphs.
        others: bytes that come and go beside them.
        device: a GPU.
    """
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    available = min(free, allowed - reserved) + reserved - allocated
    return (others + needed) * (1 + ROOM_BETWEEN) <= available


def bytes_of_graphs(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], modules: Iterable[torch.nn.Module]
) -> float:
    """What the graphs of a layer will work in, which those of other layers share.

    Args:
        function: the layer's; it is run once.
        inputs: of the function, hidden states first.
        modules: of the layer.
    """
    hidden, *others = inputs
    device = hidden.device
    with torch.random.fork_rng([device]), torch.enable_grad(), keeping_as_it_is():
        before = torch.cuda.memory_allocated(device)
        output = function(hidden.detach().requires_grad_(), *others)
        kept = torch.cuda.memory_allocated(device) - before
        del output
    packed = (module for module in modules if isinstance(module, LowRALinear))
    dense = max((module.in_features * module.out_features * hidden.element_size() for module in packed), default=0)
    return kept * (1 + _GRADIENTS) + min(dense, DENSE_BYTES) + _BUFFERS * hidden.nbytes
