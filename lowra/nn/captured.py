"""A layer's forward pass, and its backward pass with the recomputation before it, as two CUDA graphs.

A packed layer of a 7B runs some 300 small kernels in a step, and a host takes longer to launch them than a GPU to run
them. A graph launches them all at once. It fixes every address and every number that the host decided, so what may
change from step to step goes through `Buffers`: hidden states, masks, positions, gradients. Parameters keep their
addresses; whoever replays a graph makes sure of that (`lowra.integrations.layer_graphs`).

Nothing is kept between forward and backward but the inputs, as with gradient checkpointing: all graphs can then work in
the same memory, one after the other.
"""

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .buffers import Buffers
from .linear import LowRALinear
from .lora import Shortcuts
from .recording import aside, record, side_stream


class Recorder:
    """What the graphs of one model have in common: a stream to be captured on, and memory to run in.

    Raises:
        NotCapturable: no NVIDIA GPU.
    """

    _fault = ""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise NotCapturable(f"it is on {device.type}, and graphs are for NVIDIA GPUs")
        self.generator = torch.cuda.default_generators[device.index or 0]
        self._stream = side_stream(device)  # one, whichever thread a layer is captured in: memory is by streams
        self._pool = torch.cuda.graph_pool_handle()

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """On the stream, between what was launched before and what will be launched after."""
        return aside(self._stream)

    def check(self) -> None:
        """
        Raises:
            NotCapturable: a capture has failed.
        """
        if self._fault:
            raise NotCapturable(self._fault)

    @contextlib.contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Within, what waits for the GPU is an error, as far as PyTorch knows: a capture would fail of it half way.

        Raises:
            NotCapturable: in its place.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            raise NotCapturable("it waits for the GPU, as layers do that read numbers from it") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @contextlib.contextmanager
    def without_chance(self) -> Iterator[None]:
        """Within, no numbers may be drawn on the host: a graph would keep to what they decided.

        Raises:
            NotCapturable: some were.
        """
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            now = torch.get_rng_state(), random.getstate(), np.random.get_state()
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])
            of_numpy = all(np.array_equal(one, other) for one, other in zip(now[2], before[2], strict=True))
            if not (torch.equal(now[0], before[0]) and now[1] == before[1] and of_numpy):
                raise NotCapturable("it draws random numbers on the host")

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """The kernels of a call, run by none yet, and by each call of what this returns.

        Raises:
            NotCapturable: PyTorch could not capture them.
        """
        try:
            return record(call, self._pool).replay
        except RuntimeError as error:
            first = error.__context__ or error  # what was forbidden, rather than that the capture has ended of it
            self._fault = f"PyTorch could not capture it: {str(first).splitlines()[0]}"
            raise NotCapturable(self._fault) from error


class CapturedLayer:
    """A function of tensors, captured.

    Args:
        layer: that has the parameters.
        function: of the tensors in `buffers.inputs`; gives one tensor, and depends on nothing that changes but these
            and the values of parameters.
        buffers: their inputs hold what the function can be tried with.
        differentiable: whether the first input gets a gradient.
        recorder: where graphs are made.

    Raises:
        NotCapturable: the function gives something else, has nothing to train, or waits for the GPU; a capture failed.
    """

    def __init__(
        self,
        layer: nn.Module,
        function: Callable[..., Any],
        buffers: Buffers,
        differentiable: bool,
        recorder: Recorder,
    ):
        self._buffers, self._differentiable = buffers, differentiable
        self._generator = recorder.generator
        before = self._generator.get_state()
        try:
            with recorder.beside(), _autocast_as_now(buffers.inputs[0].device.type), keeping_as_it_is():
                with recorder.without_chance():
                    self._leaves = self._trained_by(function)
                    dtypes = dict.fromkeys(leaf.dtype for leaf in self._leaves)
                    self._alike = {kind: [leaf for leaf in self._leaves if leaf.dtype == kind] for kind in dtypes}
                    self._doubles = Doubles(layer, self._leaves)
                    self._try(function, recorder)
                self._forward = recorder.record(lambda: self._run(function))
                self._backward = recorder.record(lambda: self._differentiate(function, self._unread))
        finally:
            self._generator.set_state(before)

    def _trained_by(self, function: Callable[..., Any]) -> list[torch.Tensor]:
        before = self._generator.get_state()
        versions = [tensor._version for tensor in self._buffers.inputs]
        hidden, output = self._with_graph(function)
        if versions != [tensor._version for tensor in self._buffers.inputs]:
            raise NotCapturable("it writes into its arguments")
        leaves = [leaf for leaf in leaves_of(output) if leaf is not hidden]
        if not leaves and not self._differentiable:
            raise NotCapturable("nothing in it is trained")
        self._is_random = not torch.equal(self._generator.get_state(), before)
        self._output, self._gradient = self._buffers.of_output(output)
        self._of_leaves = self._buffers.of_leaves(leaves)
        return leaves

    def _try(self, function: Callable[..., Any], recorder: Recorder) -> None:
        """Runs everything once: for what is made at first use, and to see what can be left out."""
        kind = self._output.device.type
        rounded = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._shortcuts = Shortcuts(self._doubles.parameters, rounded)
        with self._doubles.in_place(), self._shortcuts.taken():
            self._shortcuts.keep_those_of(leaves_of(self._with_graph(function)[1]))
        self._unread = self._unread_by(function)
        with recorder.without_waiting():
            self._run(function)
            self._differentiate(function, self._unread)

    def _unread_by(self, function: Callable[..., Any]) -> LowRALinear | None:
        """The last packed layer, if no gradient depends on what it puts out: a number that spreads would show it."""
        last = self._shortcuts.last
        if last is None:
            return None
        found = []
        for unread, fill in ((None, None), (last, math.nan)):
            state = self._generator.get_state()
            self._gradient.fill_(1)
            self._differentiate(function, unread, fill)
            self._generator.set_state(state)
            own = [self._buffers.of_hidden] if self._differentiable else []
            found.append(torch.cat([tensor.float().reshape(-1) for tensor in (*own, *self._of_leaves.values())]))
        with_it, without = found
        # kernels that add in any order make them differ a little
        return last if bool((with_it - without).norm() <= 1e-2 * with_it.norm()) else None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What the function gives, differentiable in the first input and the parameters."""
        return _Replayed.apply(self, len(inputs), *inputs, *self._leaves)

    def forward(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and the state of the random numbers that it began with, if it used any."""
        state = self._generator.get_state() if self._is_random else None
        self._buffers.fill(inputs)
        self._forward()
        return self._output.clone(), state

    def backward(
        self, inputs: Sequence[torch.Tensor], gradient: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of the first input and of each leaf."""
        self._buffers.fill(inputs, (self._gradient, gradient))
        if state is None:
            self._backward()
        else:  # the same random numbers as in the forward pass
            now = self._generator.get_state()
            self._generator.set_state(state)
            self._backward()
            self._generator.set_state(now)
        # The next layer's graph writes into the same memory. One copy for all leaves, not one for each.
        of_leaves = self._by_leaf({dtype: row.clone() for dtype, row in self._of_leaves.items()})
        return self._buffers.of_hidden.clone() if self._differentiable else None, of_leaves

    def _by_leaf(self, rows: dict[torch.dtype, torch.Tensor]) -> list[torch.Tensor]:
        """A view for each leaf, of its shape, on the row of numbers of its dtype."""
        parts = {
            dtype: iter(torch._utils._unflatten_dense_tensors(row, self._alike[dtype])) for dtype, row in rows.items()
        }
        return [next(parts[leaf.dtype]) for leaf in self._leaves]

    def _run(self, function: Callable[..., Any]) -> None:
        with torch.no_grad(), self._doubles.in_place(), self._shortcuts.taken():
            self._output.copy_(function(*self._buffers.inputs))

    def _with_graph(self, function: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self._buffers.inputs[0].detach().requires_grad_(self._differentiable)
        with torch.enable_grad():
            output = function(hidden, *self._buffers.inputs[1:])
        if not isinstance(output, torch.Tensor):
            raise NotCapturable(f"it gives {type(output).__name__} and not one tensor")
        return hidden, output

    def _differentiate(
        self, function: Callable[..., Any], unread: LowRALinear | None, fill: float | None = None
    ) -> None:
        shortcuts = self._shortcuts
        with self._doubles.in_place(), shortcuts.taken(), shortcuts.leaving_out(unread, fill):
            hidden, output = self._with_graph(function)
            wanted = [shortcuts.of(double) for double in self._doubles.parameters]
        if self._differentiable:
            wanted.insert(0, hidden)
        with torch.autocast(hidden.device.type, enabled=False):  # as a backward pass runs
            gradients = list(torch.autograd.grad(output, wanted, self._gradient))
        with torch.no_grad():
            if self._differentiable:
                self._buffers.of_hidden.copy_(gradients.pop(0))
            self._keep(gradients)

    def _keep(self, gradients: Sequence[torch.Tensor]) -> None:
        """Puts gradients in the places of their leaves, those of one type at once: a mixed list goes one by one."""
        alike: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for place, gradient in zip(self._by_leaf(self._of_leaves), gradients, strict=True):
            places, found = alike.setdefault(gradient.dtype, ([], []))
            places.append(place)
            found.append(gradient)
        for places, found in alike.values():
            torch._foreach_copy_(places, found)


class Doubles:
    """Other parameters of the same memory, for a layer to be captured with.

    Gradients of a parameter are added up on the stream on which a loss first met it that is still alive, most likely
    the default one, which cannot take part in a capture. Its double has met none.

    Attributes:
        parameters: in the order of the leaves.
    """

    def __init__(self, layer: nn.Module, leaves: Sequence[torch.Tensor]):
        doubles = {id(leaf): leaf for leaf in leaves}  # those that are not the layer's own stay what they are
        self._places: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in doubles:
                    self._places.append((module._parameters, name, parameter))
                    if doubles[id(parameter)] is parameter:
                        doubles[id(parameter)] = nn.Parameter(parameter.detach())
        self._doubles = doubles
        self.parameters = [doubles[id(leaf)] for leaf in leaves]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the layer has them."""
        for named, name, parameter in self._places:
            named[name] = self._doubles[id(parameter)]
        try:
            yield
        finally:
            for named, name, parameter in self._places:
                named[name] = parameter


class NotCapturable(Exception):
    """Why a function cannot be captured; the message goes on from "it"."""


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: CapturedLayer, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.others = layer, count - 1
        ctx.save_for_backward(*tensors[:count])
        output, ctx.state = layer.forward(tensors[:count])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_leaves = ctx.layer.backward(ctx.saved_tensors, gradient, ctx.state)
        return None, None, of_hidden, *[None] * ctx.others, *of_leaves


def leaves_of(output: torch.Tensor) -> list[torch.Tensor]:
    """The tensors whose gradients a backward pass from here would add up, wherever the function found them."""
    found: dict[int, torch.Tensor] = {}
    seen, todo = set(), [output.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        todo.extend(following for following, _ in node.next_functions)
    return list(found.values())


def keeping_as_it_is() -> saved_tensors_hooks:
    """Within, what autograd saves stays where it is, whatever a trainer does with it, as TRL's activation_offloading.

    Those copies would become part of a graph, or make it fail. What a replay saves goes through the trainer's hooks.
    """
    # Detached: what an operation puts out and saves would else keep itself, and its graph, for ever (PyTorch 2.13).
    return saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)


@contextlib.contextmanager
def _autocast_as_now(device_type: str) -> Iterator[None]:
    """Autocast as it is now, without its cache: what a graph casts, it has to cast at each replay."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield
