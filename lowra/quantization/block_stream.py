"""The blocks of a model that lies on disk, one at a time in memory, each called as the model itself calls it."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.matching import count_and_names
from ..checkpoints.targets import Target
from ..device import has_bfloat16


def block_names(model: nn.Module, targets: dict[str, Target]) -> list[str]:
    """The blocks, in their order, of a model that is one stack of them.

    Raises:
        ValueError: it is not, or its blocks hold other packed weights than linear layers.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    inside = [target for target in targets.values() if target.in_block]
    stacks = [stack for stack in stacks if any(target.name.startswith(f"{stack}.") for target in inside)]
    if len(stacks) != 1 or any(target.experts is not None for target in inside):
        found = "experts" if len(stacks) == 1 else f"{len(stacks)} stacks of blocks ({', '.join(stacks)})"
        raise ValueError(
            "Blocks are trained in a model that is one stack of them, with linear layers alone; "
            f"{type(model).__name__} has {found}: use reconstruct=0 and end_to_end=0."
        )
    return [f"{stacks[0]}.{number}" for number, _ in model.get_submodule(stacks[0]).named_children()]


@dataclasses.dataclass
class _Call:
    """What a block is called with beside its hidden states, for a batch of `batch` sequences."""

    args: tuple
    kwargs: dict[str, Any]
    batch: int


class Block:
    """One block in memory, as a function of hidden states [B, T, H] and of weights in place of its own."""

    def __init__(self, name: str, module: nn.Module, call: _Call, targets: dict[str, Target]):
        self.name, self._module, self._call = name, module, call
        self.targets = targets

    def weight(self, name: str) -> torch.Tensor:
        """The dense weight of a target, float32 [N, K]."""
        target = self.targets[name]
        return target.as_matrix(self._module.get_parameter(self._local(name))).detach()

    def __call__(self, hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            hidden: [B, T, H].
            weights: [N, K] by the names of the targets; of the others its own are taken.
        """
        own = {self._local(name): self.targets[name].as_matrix(weight) for name, weight in weights.items()}
        args, kwargs = _for_batch((self._call.args, self._call.kwargs), self._call.batch, len(hidden))
        out = torch.func.functional_call(self._module, own, (hidden, *args), kwargs)
        return _first_of(out)

    def _local(self, name: str) -> str:
        return name.removeprefix(f"{self.name}.")


class BlockStream:
    """The blocks of a dense checkpoint and the hidden states before the first.

    Attributes:
        names: of the blocks, in their order.
        sequences: token ids [count, T] of the text.
        count: of sequences.
    """

    def __init__(
        self,
        source: DenseCheckpoint,
        targets: dict[str, Target],
        sequences: torch.Tensor,
        batch: int,
        device: torch.device,
    ):
        """Runs the model once, a block at a time in memory, over one batch.

        Args:
            source: the checkpoint.
            targets: its weights to pack.
            sequences: token ids [count, T].
            batch: sequences of a call at most.
            device: where the blocks are computed.

        Raises:
            ValueError: a model whose blocks do not simply follow one another.
        """
        self._source, self._targets, self._device = source, targets, device
        self.names = block_names(source.model, targets)
        own = copy.deepcopy(source.model.config)  # Transformers writes the dtype into it; the packed model's is another
        with init_empty_weights(include_buffers=False):  # rotary tables are in no checkpoint
            self._model: Any = type(source.model)._from_config(own, dtype=torch.float32)
        self._model.eval()
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._of_block: dict[str, list[str]] = {name: [] for name in self.names}
        rest: list[str] = []
        for name in source.names():
            block = next((block for block in self.names if name.startswith(f"{block}.")), None)
            (rest if block is None else self._of_block[block]).append(name)
        inner = {id(tensor) for tensor in self._model.base_model.state_dict(keep_vars=True).values()}
        head = {key for key, tensor in self._model.state_dict(keep_vars=True).items() if id(tensor) not in inner}
        self._load([name for name in rest if name not in head])
        self.sequences, self.count = sequences, len(sequences)
        self._calls = self._watch(sequences[:batch])
        self._batch = batch

    def inputs(self) -> torch.Tensor:
        """Hidden states [count, T, H] before the first block; in bfloat16 on a GPU that has it."""
        found: list[torch.Tensor] = []
        halved = self._device.type != "cpu" and has_bfloat16(self._device)
        kept = torch.bfloat16 if halved else torch.float32

        def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.append(_hidden_of(args, kwargs)[0].to(kept))
            raise _Stop

        handle = self._model.get_submodule(self.names[0]).register_forward_pre_hook(stop, with_kwargs=True)
        for part in self.sequences.split(self._batch):
            with contextlib.suppress(_Stop):
                self._run(part)
        handle.remove()
        return torch.cat(found)

    @contextlib.contextmanager
    def block(self, name: str) -> Iterator[Block]:
        """A block with its dense weights, which leave the memory afterwards."""
        self._load(self._of_block[name])
        try:
            own = {key: target for key, target in self._targets.items() if key.startswith(f"{name}.")}
            yield Block(name, self._model.get_submodule(name), self._calls[name], own)
        finally:
            self._free(name)

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> None:
        self._model.base_model(input_ids=ids.to(self._device), use_cache=False)

    def _watch(self, ids: torch.Tensor) -> dict[str, _Call]:
        """What each block is called with."""
        calls: dict[str, _Call] = {}
        last: list[torch.Tensor] = []
        handles = []
        for name in self.names:

            def before(module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str = name) -> None:
                hidden, args, kwargs = _hidden_of(args, kwargs)
                if name in calls or last and not torch.equal(last.pop(), hidden):
                    raise ValueError(
                        f"{type(self._model).__name__} does more than to hand the output of one block to the next "
                        f"({name}), so that its blocks cannot be reconstructed: use reconstruct=0."
                    )
                calls[name] = _Call(args, kwargs, len(ids))
                self._load(self._of_block[name])

            def after(module: nn.Module, args: tuple, out: Any, name: str = name) -> None:
                last.append(_first_of(out))
                self._free(name)

            block = self._model.get_submodule(name)
            handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
        self._run(ids)
        for handle in handles:
            handle.remove()
        if list(calls) != self.names:
            left_out = count_and_names(set(self.names) - set(calls))
            raise ValueError(f"{type(self._model).__name__} does not run all of its blocks in turn ({left_out}).")
        return calls

    def _load(self, names: list[str]) -> None:
        for name in names:
            for key, tensor in self._source.load(name).items():
                path, _, leaf = key.rpartition(".")
                module = self._model.get_submodule(path)
                tensor = tensor.to(self._device, torch.float32 if tensor.is_floating_point() else None)
                if leaf in module._buffers:
                    module._buffers[leaf] = tensor
                else:
                    module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _free(self, name: str) -> None:
        for module in self._model.get_submodule(name).modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class _Stop(Exception):  # noqa: N818 - no error
    """Ends a run of the model before its first block."""


def _hidden_of(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple, dict[str, Any]]:
    """The hidden states of a call, and the rest of it."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _first_of(out: Any) -> torch.Tensor:
    """The hidden states that a block puts out, most often with attention weights behind them."""
    return out[0] if isinstance(out, (tuple, list)) else out


def _for_batch(value: Any, was: int, now: int) -> Any:
    """What a call of `was` sequences was given, for the first `now` of them."""
    if isinstance(value, torch.Tensor):
        return value[:now] if value.dim() > 1 and len(value) == was else value
    if isinstance(value, (tuple, list)):
        return type(value)(_for_batch(entry, was, now) for entry in value)
    if isinstance(value, dict):
        return {key: _for_batch(entry, was, now) for key, entry in value.items()}
    return value
