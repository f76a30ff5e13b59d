"""Calls of layers: tensors that a graph is given anew each time, and a key of everything else that it was made for.

All layers of a pass are called with the same objects beside their hidden states, mostly. What follows from those is
found out once, and at the next layer it is only asked whether they are the same.
"""

import functools
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..nn.captured import NotCapturable

_PLAIN = (torch.Tensor, nn.Parameter)
PLAIN_VALUES = frozenset((bool, int, float, str, type(None), torch.dtype))
_REMEMBERED = 4  # kinds of arguments in one pass: layers with full and with sliding attention have their own masks


class Key:
    """What two calls must have in common for one graph to serve both; hashed once."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, *parts: Any):
        self._parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self._parts == other._parts)


class Call:
    """One call of a layer.

    Attributes:
        tensors: among its arguments, hidden states first.
        key: of everything else.
        opens_pass: whether the layer has come before since the last call of which this was true.
    """

    def __init__(self, run: functools.partial, arguments: "_Arguments", hidden: torch.Tensor, opens_pass: bool):
        self._run, self._arguments = run, arguments
        self.tensors = [hidden, *arguments.tensors]
        self.key = arguments.key_with(hidden)
        self.opens_pass = opens_pass

    def function(self, *tensors: torch.Tensor) -> Any:
        """The layer, of its tensors alone."""
        args, keywords = self._arguments.with_tensors(tensors)
        return self._run.func(*self._run.args, *args, **keywords)


class Calls:
    """Those of all layers of a model."""

    def __init__(self) -> None:
        self._layers: set[int] = set()
        self._known: list[_Arguments] = []
        self._kept: dict[Key, Key] = {}

    def next(self, layer: nn.Module, run: functools.partial, args: tuple) -> Call:
        """The call `run(*args)` of a layer.

        Raises:
            NotCapturable: an argument that a graph cannot get.
        """
        opens_pass = id(layer) in self._layers
        if opens_pass:
            self._layers.clear()
            self._known.clear()  # objects that come again may hold something else by now
        self._layers.add(id(layer))
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor):
            raise NotCapturable("its first argument is no tensor")
        names, others = tuple(run.keywords), (*args[1:], *run.keywords.values())
        for known in self._known:
            if known.are(names, others):
                return Call(run, known, hidden, opens_pass)
        arguments = _Arguments(args, run.keywords, self._kept)
        if arguments.stay:
            self._known = [arguments, *self._known[: _REMEMBERED - 1]]
        return Call(run, arguments, hidden, opens_pass)

    def keep(self, key: Key) -> None:
        """From now on equal keys are this one, so that none has to be compared."""
        self._kept[key] = key


class _Arguments:
    """What a layer is called with beside hidden states.

    Attributes:
        tensors: among them.
        stay: whether they are what they are while they are the same objects, and tensors have the same version.

    Raises:
        NotCapturable: one that a graph cannot get.
    """

    def __init__(self, args: tuple, keywords: dict[str, Any], kept: dict[Key, Key]):
        hidden = args[0]
        self._names, self._others = tuple(keywords), (*args[1:], *keywords.values())
        self.stay = all(map(_stays, self._others))
        self._values, self._spec = tree_flatten((args, keywords))
        self._values[0] = None
        self._places = [place for place, value in enumerate(self._values) if isinstance(value, torch.Tensor)]
        self.tensors: list[torch.Tensor] = [self._values[place] for place in self._places]
        if not all(type(t) in _PLAIN and t.device == hidden.device and not t.is_inference() for t in self.tensors):
            raise NotCapturable("its arguments are sharded, of several devices or of inference mode")
        if any(tensor.requires_grad for tensor in self.tensors):
            raise NotCapturable("another argument than the hidden states is differentiated")
        # with its type, since True is equal to 1
        plain = [(type(value), value) for value in self._values if not isinstance(value, torch.Tensor)]
        if not all(kind in PLAIN_VALUES for kind, _ in plain):
            raise NotCapturable("an argument is neither a tensor nor a plain value")
        shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in self.tensors]
        self._parts = self._spec, *self._places, *plain, *shapes
        self._versions = [tensor._version for tensor in self.tensors]
        self._kept = kept
        self._last: tuple[Any, Key] | None = None

    def are(self, names: tuple[str, ...], others: tuple) -> bool:
        """Whether a call has these arguments."""
        return (
            names == self._names
            and len(others) == len(self._others)
            and all(map(is_, others, self._others))
            and [tensor._version for tensor in self.tensors] == self._versions
        )

    def key_with(self, hidden: torch.Tensor) -> Key:
        """The key of a call with these hidden states, as it is now on the host.

        Raises:
            NotCapturable: such hidden states are not for graphs.
        """
        if type(hidden) not in _PLAIN or hidden.is_inference():
            raise NotCapturable("its arguments are sharded, of several devices or of inference mode")
        device = hidden.device
        kind = device.type
        own = (
            *(hidden.shape, hidden.stride(), hidden.dtype, device, hidden.requires_grad),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            torch.cuda.current_stream(device).cuda_stream if kind == "cuda" else 0,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        )
        if self._last is None or self._last[0] != own:
            key = Key(*self._parts, *own)
            self._last = own, self._kept.get(key, key)
        return self._last[1]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Any:
        """These arguments and keywords with other tensors in the places of its own, hidden states first."""
        values = list(self._values)
        for place, tensor in zip((0, *self._places), tensors, strict=True):
            values[place] = tensor
        return tree_unflatten(values, self._spec)


def _stays(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_stays, value))
    return type(value) in _PLAIN or type(value) in PLAIN_VALUES
