"""Memory through which graphs get and give tensors: a graph has fixed its addresses, and everything is copied there."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch


class Buffers:
    """Memory through which the graphs of all layers get and give tensors of one signature.

    Args:
        inputs: of a call, hidden states first; their values are not kept.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]):
        self.inputs = [torch.empty_like(tensor) for tensor in inputs]
        self._copied: list[tuple[weakref.ref, int] | None] = [None for _ in inputs]  # from what, and its version
        self.of_hidden = torch.empty_like(inputs[0])
        self._of_outputs: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self._of_leaves: dict[torch.dtype, torch.Tensor] = {}

    def fill(self, inputs: Sequence[torch.Tensor], gradient: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Copies inputs, but for those that lie there since `forget`: most layers share all but their hidden states.

        Args:
            inputs: of a call.
            gradient: something else to be copied, into the first from the second.
        """
        into, given = [self.inputs[0]], [inputs[0]]
        if gradient is not None:
            into.append(gradient[0])
            given.append(gradient[1])
        for place in range(1, len(inputs)):
            tensor, copied = inputs[place], self._copied[place]
            version = None if tensor.is_inference() else tensor._version  # where changes are not counted
            if version is None or copied is None or copied[0]() is not tensor or copied[1] != version:
                into.append(self.inputs[place])
                given.append(tensor)
                self._copied[place] = None if version is None else (weakref.ref(tensor), version)
        with torch.no_grad():
            torch._foreach_copy_(into, given)

    def forget(self) -> None:
        """What lies there may be something else now, as where somebody writes past the version of a tensor."""
        self._copied = [None for _ in self.inputs]

    def of_output(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For an output like this one, and for its gradient."""
        kind = output.shape, output.dtype
        if kind not in self._of_outputs:
            self._of_outputs[kind] = torch.empty_like(output), torch.empty_like(output)
        return self._of_outputs[kind]

    def of_leaves(self, leaves: Sequence[torch.Tensor]) -> dict[torch.dtype, torch.Tensor]:
        """A row of numbers for the gradients of the leaves of each dtype."""
        rows = {}
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            count = sum(leaf.numel() for leaf in leaves if leaf.dtype == dtype)
            if dtype not in self._of_leaves or self._of_leaves[dtype].numel() < count:
                self._of_leaves[dtype] = self.inputs[0].new_empty(count, dtype=dtype)
            rows[dtype] = self._of_leaves[dtype][:count]
        return rows
