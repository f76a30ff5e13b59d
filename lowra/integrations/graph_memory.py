"""Whether a GPU has room for graphs, which work in memory that nothing else gets.

What a step needs without graphs has been seen: a shape is captured when it comes the second time. On a card that it
just fits, a step with graphs would stop half way, in whatever happens to ask for memory next.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from bitsandbytes.backends.lowra.ops import DENSE_BYTES

from ..nn.captured import NotCapturable, keeping_as_it_is
from ..nn.linear import LowRALinear

ROOM_BETWEEN = 0.03  # share of what is allocated that is lost between blocks
_GRADIENTS = 0.3  # of what a layer keeps for backward: gradients of the widest of it that live at once
_BUFFERS = 4  # of the hidden states' size: these, what comes out, and the gradients of both
_OPTIMIZER = 12  # bytes a trained number: AdamW's two moments, and its gradient


def check_room(needed: float, trained: Iterable[torch.Tensor], device: torch.device) -> None:
    """
    Args:
        needed: bytes of the graphs.
        trained: parameters whose gradients and optimiser states may not be there yet.
        device: a GPU.

    Raises:
        NotCapturable: beside the largest step so far there is no room for them.
    """
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    available = min(free, allowed - reserved) + reserved - allocated
    step = torch.cuda.max_memory_allocated(device) - allocated
    to_come = _OPTIMIZER * sum(parameter.numel() for parameter in trained)
    if (step + needed + to_come) * (1 + ROOM_BETWEEN) > available:
        raise NotCapturable("the GPU has no room for graphs beside a step")


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
