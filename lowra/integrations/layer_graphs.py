"""`capture_layers`: the layers of a model that is fine-tuned run as CUDA graphs, below whatever trainer there is.

Transformers calls each checkpointed layer through a function, torch.utils.checkpoint's, that a model may be given. The
one given here replays graphs (`lowra.nn.captured`), which recompute as checkpointing does, and calls the usual one
wherever a graph would not compute the same: in a shape that has come once only, in a layer with hooks, without
gradients. A graph has fixed what the host decided, so before each replay everything that a host decides by is compared
with what it was (`decided`), and so is all that a layer is called with but for tensors' values (`layer_calls`).
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..nn.buffers import Buffers
from ..nn.captured import CapturedLayer, NotCapturable, Recorder
from ..nn.hooks import mode_around
from .checkpointed_layers import InPlaceOfCheckpoint, put_in_place, replace_checkpointing
from .decided import Decided
from .graph_memory import Room, bytes_of_graphs
from .layer_calls import Call, Calls, Key

logger = logging.getLogger(__name__)

_SHAPES = 4  # captured; each takes seconds, and memory for its graphs
_CHANGES = 3  # of one layer, after which it is left alone


def capture_layers(model: nn.Module) -> None:
    """Lets the layers of a model run as CUDA graphs while it is trained, with gradient checkpointing.

    From the second batch of a shape on, a layer's kernels are launched at once, forward and backward. Losses are those
    without it. What cannot be captured runs as before, and one warning says why. Holds until the model is loaded anew;
    a copy of the model, or one that is pickled, is without it.

    Args:
        model: a model of Transformers, or a PeftModel on one; its adapters may come later. Gradient checkpointing is
            turned on if it is not.

    Raises:
        ValueError: its architecture has no layers that Transformers checkpoints one by one, or their inputs wait on the
            host (`lowra.offload_activations`).
    """
    replace_checkpointing(model, _install, "capture")


def _install(bare: Any) -> None:
    shared = _Shared(bare)
    put_in_place(bare, lambda layer, usual: _Checkpointing(layer, usual, shared))


class _Checkpointing(InPlaceOfCheckpoint):
    """In the place of torch.utils.checkpoint for one layer.

    Args:
        layer: whose calls come here.
        usual: the function that was there.
        shared: by all layers of a model.
    """

    def __init__(self, layer: nn.Module, usual: Callable[..., Any], shared: "_Shared"):
        super().__init__(usual)
        self._layer, self._shared = layer, shared
        self._seen: set[int] = set()  # hashes of keys, which are long
        self._captured: dict[Key, tuple[Decided, CapturedLayer | None]] = {}
        self._changes = 0
        self._function: Any = None  # of the layer, which is one that all graphs are of

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """What `usual(run, *args)` gives; `run` is the layer's forward with its keywords bound."""
        if not torch.is_grad_enabled() or not isinstance(run, functools.partial) or torch.compiler.is_compiling():
            return self._usual(run, *args)
        try:
            self._check(run)
            call = self._shared.next_call(self._layer, run, args)
            captured = self._of(call)
        except NotCapturable as reason:
            self._shared.say(str(reason))
            captured = None
        return self._usual(run, *args) if captured is None else captured(*call.tensors)

    def _check(self, run: functools.partial) -> None:
        """
        Raises:
            NotCapturable: it is not one function of all that the layer is called with, or not all that is to be seen.
        """
        if (mode := mode_around()) is not None:
            raise NotCapturable(f"{mode}, in which the model is called, is to see what it calls")
        self._function = self._function or run.func
        if run.func != self._function or any(bound is not self._layer for bound in run.args):
            raise NotCapturable("it is checkpointed in parts, or by a function of its own")

    def _of(self, call: Call) -> CapturedLayer | None:
        """The graphs that compute a call; None where they are not to be made yet.

        Raises:
            NotCapturable: there are none.
        """
        key = call.key
        self._shared.check()
        before = self._captured.get(key)
        if before is None:
            self._shared.begins(call, self._layer)
        elif before[0].is_same():
            return before[1]
        if hash(key) not in self._seen:
            self._seen.add(hash(key))
            return None
        if before is not None:
            del self._captured[key]
            self._changes += 1
        if self._changes > _CHANGES:
            raise NotCapturable("its adapters or parameters change again and again")
        if not self._shared.may_have(key):
            return None
        decided = Decided(self._layer)
        try:
            place = self._shared.place_for(call, self._layer)
            if place is None:
                return None
            self._captured[key] = decided, None  # not tried again if it fails
            buffers, recorder = place
            buffers.fill(call.tensors)
            captured = CapturedLayer(self._layer, call.function, buffers, call.tensors[0].requires_grad, recorder)
        except RuntimeError as error:  # without graphs it may well run
            raise NotCapturable(f"a trial of it failed ({str(error).splitlines()[0]})") from error
        self._captured[key] = decided, captured
        return captured


class _Shared:
    """What the graphs of one model have in common: memory, and how many shapes they are made for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls = Calls()
        self._buffers: dict[Key, Buffers] = {}
        self._rooms: dict[torch.device, Room] = {}
        self._recorder: Recorder | None = None
        self._said: set[str] = set()

    def next_call(self, layer: nn.Module, run: functools.partial, args: tuple) -> Call:
        """The call `run(*args)` of a layer.

        Raises:
            NotCapturable: an argument that a graph cannot get.
        """
        call = self._calls.next(layer, run, args)
        if call.opens_pass:
            for buffers in self._buffers.values():
                buffers.forget()
        return call

    def begins(self, call: Call, layer: nn.Module) -> None:
        """Notes a call without graphs."""
        device = call.tensors[0].device
        if device.type == "cuda":
            if device not in self._rooms:
                self._rooms[device] = Room(self._model, device)
            self._rooms[device].begins(call.key, layer)

    def check(self) -> None:
        """
        Raises:
            NotCapturable: a capture has failed.
        """
        if self._recorder is not None:
            self._recorder.check()

    def may_have(self, key: Key) -> bool:
        """Whether to ask for a place for the graphs of such calls.

        Raises:
            NotCapturable: too many shapes.
        """
        if key in self._buffers:
            return True
        if len(self._buffers) == _SHAPES:
            raise NotCapturable(f"{_SHAPES} shapes of batches have graphs already; blocks of one length need one")
        return all(room.may_have(key) for room in self._rooms.values())

    def place_for(self, call: Call, layer: nn.Module) -> tuple[Buffers, Recorder] | None:
        """Where the graphs of a call take their tensors from, and where they are made; None where that has to wait.

        Raises:
            NotCapturable: no GPU, or the layer draws numbers on the host.
        """
        key, device = call.key, call.tensors[0].device
        if self._recorder is None:
            self._recorder = Recorder(device)
        if key not in self._buffers:
            if device in self._rooms and not self._has_room(call, layer, self._recorder):
                return None
            self._buffers[key] = Buffers(call.tensors)
            self._calls.keep(key)
        return self._buffers[key], self._recorder

    def _has_room(self, call: Call, layer: nn.Module, recorder: Recorder) -> bool:
        def bytes_needed() -> float:
            with recorder.without_chance():
                return bytes_of_graphs(call.function, call.tensors, layer.modules())

        lacking = self._rooms[call.tensors[0].device].lacking(call.key, bytes_needed)
        if lacking:
            self.say(lacking)
            return False
        torch.cuda.empty_cache()  # what launched layers worked in, the graphs will need in memory of their own
        return True

    def say(self, reason: str) -> None:
        """Warns, once for each reason."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("A layer is not captured as a CUDA graph, and runs as without: %s.", reason)
