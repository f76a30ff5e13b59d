"""`capture_layers`: the layers of a model that is fine-tuned run as CUDA graphs, below whatever trainer there is.

Transformers calls each checkpointed layer through a function, torch.utils.checkpoint's, that a model may be given. The
one given here replays graphs (`lowra.nn.captured`), which recompute as checkpointing does, and calls the usual one
wherever a graph would not compute the same: in a shape that has come once only, in a layer with hooks, without
gradients. A graph has fixed what the host decided, so before each replay everything that a host decides by is compared
with what it was: where parameters lie, which adapters are active, what is trained, which codes a packed layer has.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..nn.captured import Buffers, CapturedLayer, NotCapturable, Recorder, copy_into
from ..nn.linear import LowRALinear
from ..nn.packed_module import PackedModule
from ..nn.row_layout import is_sharded
from ..nn.trained_tables import TrainedTablesLinear
from .checkpointed_layers import InPlaceOfCheckpoint, put_in_place, replace_checkpointing
from .graph_memory import Room, bytes_of_graphs

logger = logging.getLogger(__name__)

_SHAPES = 4  # captured; each takes seconds, and memory for its graphs
_CHANGES = 3  # of one layer, after which it is left alone
_PLAIN = (torch.Tensor, nn.Parameter)
_PLAIN_VALUES = frozenset((bool, int, float, str, type(None), torch.dtype))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL = [vars(nn.modules.module)[f"_global{name}"] for name in _HOOKS]
_CONTAINERS = (dict, list, tuple, set)
# What every module has for itself, and what a packed one makes of its tensors, which `row_layout` looks after.
_OF_TORCH = {*vars(nn.Module()), "_layout", "_seen", "_watched"} - {"training"}


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
        self._captured: dict[Any, tuple[_Decided, CapturedLayer | None]] = {}
        self._changes = 0

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """What `usual(run, *args)` gives; `run` is the layer's forward with its keywords bound."""
        if not torch.is_grad_enabled() or not isinstance(run, functools.partial) or torch.compiler.is_compiling():
            return self._usual(run, *args)
        try:
            call = _Call(run, args)
            captured = self._of(call)
        except NotCapturable as reason:
            self._shared.say(str(reason))
            captured = None
        return self._usual(run, *args) if captured is None else captured(*call.tensors)

    def _of(self, call: "_Call") -> CapturedLayer | None:
        """The graphs that compute a call; None where they are not to be made yet.

        Raises:
            NotCapturable: there are none.
        """
        key = call.key()
        before = self._captured.get(key)
        if before is None:
            self._shared.begins(key, call, self._layer)
        self._shared.check()
        if hash(key) not in self._seen:
            self._seen.add(hash(key))
            return None
        if before is not None and before[0].is_same():
            return before[1]
        if before is not None:
            del self._captured[key]
            self._changes += 1
        if self._changes > _CHANGES:
            raise NotCapturable("its adapters or parameters change again and again")
        if not self._shared.may_have(key):
            return None
        decided = _Decided(self._layer)
        try:
            place = self._shared.place_for(key, call, self._layer)
            if place is None:
                return None
            self._captured[key] = decided, None  # not tried again if it fails
            buffers, recorder = place
            copy_into(buffers.inputs, call.tensors)
            captured = CapturedLayer(self._layer, call.function, buffers, call.tensors[0].requires_grad, recorder)
        except RuntimeError as error:  # without graphs it may well run
            raise NotCapturable(f"a trial of it failed ({str(error).splitlines()[0]})") from error
        self._captured[key] = decided, captured
        return captured


class _Call:
    """One call of a layer, as tensors and everything else.

    Raises:
        NotCapturable: an argument that a graph cannot get.
    """

    def __init__(self, run: functools.partial, args: tuple):
        self._function = functools.partial(run.func, *run.args)
        self._values, self._spec = tree_flatten((args, run.keywords))
        self._places = [place for place, value in enumerate(self._values) if isinstance(value, torch.Tensor)]
        self.tensors: list[torch.Tensor] = [self._values[place] for place in self._places]
        if not self.tensors or self.tensors[0] is not (args[0] if args else None):
            raise NotCapturable("its first argument is no tensor")
        for tensor in self.tensors:
            if type(tensor) not in _PLAIN or tensor.device != self.tensors[0].device or tensor.is_inference():
                raise NotCapturable("its arguments are sharded, of several devices or of inference mode")
        if any(tensor.requires_grad for tensor in self.tensors[1:]):
            raise NotCapturable("another argument than the hidden states is differentiated")

    def key(self) -> Any:
        """What two calls must have in common for one graph to serve both.

        Raises:
            NotCapturable: an argument that is neither a tensor nor a plain value.
        """
        # with its type, since True is equal to 1
        plain = [(type(value), value) for value in self._values if not isinstance(value, torch.Tensor)]
        if not all(kind in _PLAIN_VALUES for kind, _ in plain):
            raise NotCapturable("an argument is neither a tensor nor a plain value")
        hidden = self.tensors[0]
        kind = hidden.device.type
        stream = torch.cuda.current_stream(hidden.device).cuda_stream if hidden.is_cuda else 0
        shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in self.tensors]
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        sums = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
        kinds = hidden.device, hidden.requires_grad, autocast, stream, *sums
        return self._spec, *self._places, *plain, *shapes, *kinds

    def function(self, *tensors: torch.Tensor) -> Any:
        """The layer, of its tensors alone."""
        values = list(self._values)
        for place, tensor in zip(self._places, tensors, strict=True):
            values[place] = tensor
        args, keywords = tree_unflatten(values, self._spec)
        return self._function(*args, **keywords)


class _Shared:
    """What the graphs of one model have in common: memory, and how many shapes they are made for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._buffers: dict[Any, Buffers] = {}
        self._rooms: dict[torch.device, Room] = {}
        self._recorder: Recorder | None = None
        self._said: set[str] = set()

    def begins(self, key: Any, call: "_Call", layer: nn.Module) -> None:
        """Notes a call without graphs."""
        device = call.tensors[0].device
        if device.type == "cuda":
            if device not in self._rooms:
                self._rooms[device] = Room(self._model, device)
            self._rooms[device].begins(key, layer)

    def check(self) -> None:
        """
        Raises:
            NotCapturable: a capture has failed.
        """
        if self._recorder is not None:
            self._recorder.check()

    def may_have(self, key: Any) -> bool:
        """Whether to ask for a place for the graphs of such calls.

        Raises:
            NotCapturable: too many shapes.
        """
        if key in self._buffers:
            return True
        if len(self._buffers) == _SHAPES:
            raise NotCapturable(f"{_SHAPES} shapes of batches have graphs already; blocks of one length need one")
        return all(room.may_have(key) for room in self._rooms.values())

    def place_for(self, key: Any, call: _Call, layer: nn.Module) -> tuple[Buffers, Recorder] | None:
        """Where the graphs of a call take their tensors from, and where they are made; None where that has to wait.

        Raises:
            NotCapturable: no GPU, or the layer draws numbers on the host.
        """
        device = call.tensors[0].device
        if self._recorder is None:
            self._recorder = Recorder(device)
        if key not in self._buffers:
            if device in self._rooms and not self._has_room(key, call, layer, self._recorder):
                return None
            self._buffers[key] = Buffers(call.tensors)
        return self._buffers[key], self._recorder

    def _has_room(self, key: Any, call: _Call, layer: nn.Module, recorder: Recorder) -> bool:
        def bytes_needed() -> float:
            with recorder.without_chance():
                return bytes_of_graphs(call.function, call.tensors, layer.modules())

        lacking = self._rooms[call.tensors[0].device].lacking(key, bytes_needed)
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


class _Decided:
    """Everything but tensors' values that decides what a layer computes, as it was when this was made.

    It is compared at every step of every layer, hence one pass over lists that were made beforehand.

    Raises:
        NotCapturable: see `is_same`.
        ValueError: the codes of a packed layer were written into.
    """

    def __init__(self, layer: nn.Module):
        self._modules = list(layer.modules())
        self._own = [vars(module) for module in self._modules]
        self._named = [own[kind] for own in self._own for kind in ("_modules", "_parameters", "_buffers")]
        self._hooks = [own[kind] for own in self._own for kind in _HOOKS] + _HOOKS_OF_ALL
        # Rates, factors, names of adapters, functions: also those of which nobody here has heard.
        places = [(own, name) for own in self._own for name in own if name not in _OF_TORCH]
        self._values = [(own, name) for own, name in places if not isinstance(own[name], _CONTAINERS)]
        self._containers = [own[name] for own, name in places if isinstance(own[name], _CONTAINERS)]
        self._packed = [module for module in self._modules if isinstance(module, PackedModule)]
        self._linears = [module for module in self._modules if isinstance(module, LowRALinear)]
        self._training_tables = [module for module in self._modules if isinstance(module, TrainedTablesLinear)]
        self._configs = [own["config"] for own in self._own if "config" in own]
        self._tensors = [*layer.parameters(), *layer.buffers()]
        if any(map(is_sharded, self._tensors)):
            raise NotCapturable("it has sharded parameters")
        # kept, because an identity is one only while its object lives
        self._kept = [own[name] for own, name in self._values] + [list(_entries(held)) for held in self._containers]
        self._was = self._read()

    def is_same(self) -> bool:
        """Whether it still is as it was.

        Raises:
            NotCapturable: something waits for a forward of the layer's modules, or has put itself in its place.
            ValueError: the codes of a packed layer were written into.
        """
        return self._read() == self._was

    def _read(self) -> list[Any]:
        if any(self._hooks):
            raise NotCapturable("it has hooks, which replaying would not call")
        forwards = [own["forward"] for own in self._own if "forward" in own]
        # By a function of the module alone, as Liger does, or by one that does more around it.
        if any("<locals>" in getattr(forward, "__qualname__", "<locals>") for forward in forwards):
            raise NotCapturable("the forward of a module in it has been replaced")
        # Identities stand for tensors and the like, whose comparison would not answer with yes or no.
        found: list[Any] = [id(value) for named in self._named for value in named.values()]
        found += [module.__class__ for module in self._modules]
        found += [len(own) for own in self._own]
        found += map(len, self._containers)
        values = [own.get(name) for own, name in self._values]
        for held in self._containers:
            if held:
                values += _entries(held)
        found += [value if type(value) in _PLAIN_VALUES else id(value) for value in values]
        for tensor in self._tensors:
            found += (tensor.data_ptr(), tensor.requires_grad, tensor.dtype, tensor.shape, tensor.stride())
        found += [module.row_layout() for module in self._packed]
        for linear in self._linears:
            if linear.adapter_tables is not None:
                found += [table.data_ptr() for table in linear.current_tables().values()]
        for training in self._training_tables:
            if training.adapter_tables is not None:
                found += training.adapter_tables.active()
        return [*found, *forwards, *(getattr(config, "_attn_implementation", None) for config in self._configs)]


def _entries(held: Any) -> Iterable[Any]:
    return (*held.keys(), *held.values()) if isinstance(held, dict) else held
