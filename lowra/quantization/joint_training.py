"""All blocks of a packed model trained together towards the dense model's logits: codes, tables and the adapter, and
embeddings and head beside them.

What a block learned by itself (`block_training`) makes its own output right; here every weight learns what the whole
model makes of it, as long as its text is new (docs/lab/accuracy.md). Each weight takes some 36 bytes: what its code is
rounded from, Adam's two moments, the weight that is made of it with its gradient, and the dense model beside it.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers import PreTrainedModel

from ..checkpoints.targets import Target
from ..device import has_bfloat16
from ..nn.recording import aside, record, side_stream
from .block_stream import block_names
from .token_tables import TokenTables
from .trained_stack import Adam, rates_of, stacked
from .trained_weight import TrainedWeight

logger = logging.getLogger(__name__)

# Sequences of a step, and those by which the training is judged.
BATCH, HELD_OUT = 16, 16
# Sequences that a model writes for it at most. base-36m went five times over half as many, and was 1 to 3 % nearer to
# the dense model on them than on others; twice the steps on twice the text paid (docs/lab/accuracy.md).
MOST_WRITTEN = 2**15
# Of the rates of the blocks' training, where each step sees one block's error alone (docs/lab/accuracy.md).
SHARES = {"dense": 0.1, "level_change": 1.0, "scale_change": 1.0, "lora_A": 0.1, "lora_B": 0.1, "token_tables": 0.3}
# Logits that are in memory at a time, a few times over.
_LOGITS = 2**27
# Steps before the others are recorded as a CUDA graph: libraries choose their kernels in the first.
_UNRECORDED = 3
# Fewer steps are over before what compiling takes, some 15 s, is saved (docs/lab/accuracy.md).
WORTH_COMPILING = 500
# Of blocks of all models that a process trains; PyTorch counts them together, and compiles no more than 8.
_COMPILED_FORMS = 256


class JointTraining:
    """A training that can be left after any step and go on from its state.

    Attributes:
        done: steps so far.
        token_tables: embeddings and head, as they are now.
        steps: of all.
        recorded: whether steps are replayed from a CUDA graph; None before the first that could be.
        compiled: whether blocks and loss are, so that norms, rotations and gates go through memory once; None before
            the first step that could be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: dict[str, Target],
        weights: dict[str, TrainedWeight],
        sequences: torch.Tensor,
        steps: int,
        *,
        batch: int = BATCH,
        shares: dict[str, float] | None = None,
        seed: int = 0,
        fixed: dict[str, torch.Tensor] | None = None,
        token_tables: dict[str, torch.dtype] | None = None,
    ):
        """
        Args:
            model: the dense one, in float32 on the device of the weights.
            targets: its weights that are packed.
            weights: what is trained of them; empty until `finish`.
            sequences: token ids [count, T].
            steps: of the training.
            batch: sequences of a step.
            shares: in place of those of `SHARES`.
            seed: of the order of the sequences.
            fixed: packed weights that are not trained, [N, K] by name.
            token_tables: embeddings and head that are trained too, by name, and the type that each is stored in.
        """
        self._fixed = fixed or {}
        self._model, self._targets = model, targets
        model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self._sequences = sequences.to(self.device, torch.int32)
        self.steps, self.done = steps, 0
        generator, passes = torch.Generator().manual_seed(seed), math.ceil(steps * batch / len(sequences))
        order = [torch.randperm(len(sequences), generator=generator) for _ in range(passes)]
        self._order = torch.cat(order)[: steps * batch].view(steps, batch).to(self.device)
        length, vocabulary = sequences.shape[1], model.get_input_embeddings().get_parameter("weight").shape[0]
        self._part = max(
            size for size in range(1, batch + 1) if batch % size == 0 and size <= _most(length, vocabulary)
        )
        shares = {**SHARES, **(shares or {})}
        rates = {name: rates_of(weight, shares) for name, weight in weights.items()}
        self._stacks = stacked(weights)
        self._adam = [Adam(stack.parts(), stack.rates(rates)) for stack in self._stacks]
        self.token_tables = TokenTables(dict(model.named_parameters()), token_tables or {})
        self._learning: list[Callable[[], dict[str, torch.Tensor]]] = list(self._stacks)
        if token_tables:
            self._learning.append(self.token_tables)
            self._adam.append(Adam(self.token_tables.now, self.token_tables.rates(shares["token_tables"])))
        self._ids = torch.zeros(batch, length, dtype=torch.long, device=self.device)
        self._loss = torch.zeros((), device=self.device)
        self.recorded: bool | None = None if self.device.type == "cuda" else False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._unrecorded = 0
        self._calls: dict[str, tuple[tuple, dict[str, Any]]] = {}
        self._forwards = {name: model.get_submodule(name).forward for name in block_names(model, targets)}
        self._compared = _compared
        worth = self.device.type == "cuda" and steps >= WORTH_COMPILING and has_triton()
        self.compiled: bool | None = None if worth else False

    def run(self, until: int) -> torch.Tensor:
        """Trains up to a number of steps.

        Returns:
            the loss of each step, float32, on the device: mean KL divergence of its tokens.
        """
        losses = []
        with contextlib.ExitStack() as scope:
            if self.device.type == "cuda":
                scope.enter_context(aside(side_stream(self.device)))
                scope.enter_context(self._calls_of_first())
            while self.done < until:
                self._ids.copy_(self._sequences[self._order[self.done]])
                for adam in self._adam:
                    adam.at(self.done, self.steps)
                self._advance()
                losses.append(self._loss.clone())
                self.done += 1
        return torch.stack(losses) if losses else torch.empty(0, device=self.device)

    def _advance(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        if self.recorded is False or self._unrecorded < _UNRECORDED:
            self._unrecorded += 1
            self._unrecorded_step()
            return
        torch.cuda.synchronize(self.device)
        try:
            self._graph = record(self._step)
        except RuntimeError as error:  # slower, and no less right
            logger.warning("lowra: steps are not recorded as a CUDA graph: %s", str(error).splitlines()[0])
            self.recorded = False
            self._step()
            return
        self.recorded = True
        self._graph.replay()

    def _unrecorded_step(self) -> None:
        if self.compiled is None:
            self.compiled, self._compared = True, torch.compile(_compared, dynamic=False)
            for name, forward in self._forwards.items():
                self._model.get_submodule(name).forward = torch.compile(forward, dynamic=False)
        many: Any = contextlib.nullcontext()
        if self.compiled:
            many = torch._dynamo.config.patch(recompile_limit=_COMPILED_FORMS)
        try:
            with many:
                self._step()
        except RuntimeError as error:
            if not self.compiled or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            # Without a C compiler, say: slower, and no less right.
            logger.warning("lowra: blocks are not compiled: %s", str(error).splitlines()[0])
            self._as_written()
            self._step()

    def _as_written(self) -> None:
        """Blocks and loss are computed by PyTorch's own kernels from here on."""
        self.compiled, self._compared = False, _compared
        for name, forward in self._forwards.items():
            self._model.get_submodule(name).forward = forward

    def _step(self) -> None:
        """One step of Adam on `_ids`, without waiting for the device."""
        made = [learning() for learning in self._learning]
        leaves = {name: weight.detach().requires_grad_() for own in made for name, weight in own.items()}
        sums: list[torch.Tensor] = []
        total = torch.zeros_like(self._loss)
        parts = self._ids.split(self._part)
        for ids in parts:
            value = self._divergence(ids, leaves | self._fixed) / len(parts)
            gradients = torch.autograd.grad(value, list(leaves.values()))
            sums = [a.add_(b) for a, b in zip(sums, gradients, strict=True)] if sums else list(gradients)
            total += value.detach()
        self._loss.copy_(total)
        with_gradient = dict(zip(leaves, sums, strict=True))
        for own, adam in zip(made, self._adam, strict=True):
            adam.step(list(own.values()), [with_gradient.pop(name) for name in own])

    def _divergence(self, ids: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return _Divergence.apply(self._logits(ids, weights), self._logits(ids, {}), self._compared)

    def _logits(self, ids: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the model with these weights, or without any as it is, which is the dense one."""
        own = {
            name: self._targets[name].as_matrix(weight) if name in self._targets else weight
            for name, weight in weights.items()
        }
        with torch.set_grad_enabled(bool(weights) and torch.is_grad_enabled()), self._computing():
            return torch.func.functional_call(self._model, own, (), {"input_ids": ids, "use_cache": False}).logits

    def _computing(self) -> contextlib.AbstractContextManager:
        """On a GPU bfloat16 products, where it has them."""
        halved = self.device.type != "cpu" and has_bfloat16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, halved)

    @contextlib.contextmanager
    def _calls_of_first(self) -> Iterator[None]:
        """Blocks are called with the mask and the positions of the steps before while a step is recorded: Transformers
        makes masks then that it leaves out otherwise, and with them attention takes another kernel.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str) -> tuple[tuple, dict[str, Any]]:
            if not torch.cuda.is_current_stream_capturing():
                kept = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                self._calls[name] = args[1:], kept
                return args, kwargs
            known_args, known = self._calls[name]
            return (*args[:1], *known_args), {**kwargs, **known}

        handles = []
        for name in self._forwards:

            def named(module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str = name) -> Any:
                return hook(module, args, kwargs, name)

            handles.append(self._model.get_submodule(name).register_forward_pre_hook(named, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def divergence(self, sequences: torch.Tensor) -> float:
        """Mean KL divergence from the dense model, over the tokens of sequences [count, T], as the weights are."""
        weights = {name: weight for own in self._learning for name, weight in own().items()} | self._fixed
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        plain: Any = contextlib.nullcontext()
        if self.compiled:  # for other shapes than these
            plain = torch.compiler.set_stance("force_eager")
        with plain:
            for ids in sequences.to(self.device, torch.long).split(self._part):
                total += self._divergence(ids, weights) * len(ids)
        return float(total) / len(sequences)

    def state(self) -> dict[str, torch.Tensor]:
        """All that a run goes on from, by name, not copied; the number of steps is not in it."""
        return {
            f"{number}.{key}": tensor for number, adam in enumerate(self._adam) for key, tensor in adam.state().items()
        }

    @torch.no_grad()
    def restore(self, state: dict[str, torch.Tensor], done: int) -> None:
        """Goes on from a state after so many steps.

        Raises:
            ValueError: it is not one of this training, of which nothing is changed then.
        """
        own = self.state()
        odd = sorted(own.keys() ^ state.keys())
        odd += [name for name in own.keys() & state.keys() if _kind_of(own[name]) != _kind_of(state[name])]
        if odd or not 0 <= done <= self.steps:
            what = f"{len(odd)} tensors ({odd[0]})" if odd else f"{done} steps of {self.steps}"
            raise ValueError(f"A state of this training was expected, and one came that differs in {what}: begin anew.")
        for name, tensor in state.items():
            own[name].copy_(tensor)
        self.done = done

    def finish(self) -> None:
        """Gives the weights what was trained of them."""
        self._graph = None
        self._calls.clear()
        self._as_written()
        for stack in self._stacks:
            stack.unstack()


def _kind_of(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def sequences_of(steps: int) -> int:
    """Sequences of a text that steps go through once, with those that are held out."""
    return steps * BATCH + HELD_OUT if steps else 0


def _most(length: int, vocabulary: int) -> int:
    """Sequences whose logits are in memory at a time."""
    return max(1, _LOGITS // (length * vocabulary))


def _compared(out: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean KL divergence of logits [B, T, V] from those that are wanted, and its gradient in their type."""
    tokens = out.shape[0] * out.shape[1]
    wanted, found = wanted.float().log_softmax(dim=-1), out.float().log_softmax(dim=-1)
    shares = wanted.exp()
    value = wanted.sub_(found).mul_(shares).sum() / tokens
    return value, found.exp_().sub_(shares).div_(tokens).to(out.dtype)


class _Divergence(torch.autograd.Function):
    """What `compared` finds."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, wanted: torch.Tensor, compared: Callable) -> torch.Tensor:
        value, slope = compared(out, wanted)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * gradient, None, None
