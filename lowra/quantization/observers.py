"""What calibration sees where hooks on linear layers see nothing: fused experts and embeddings.

The projections of fused experts are no modules. While an experts module runs, its own eager forward is watched: it
takes one expert out of a fused weight [E, N, K] and hands it to `F.linear`, and that call has the inputs of the expert
and gives the outputs whose gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from .calibration import Calibration


class ExpertStatistics:
    """Sums over the tokens that each expert of one fused weight saw.

    Attributes:
        squares: float64 [E, K], squared inputs.
        seen: float64 [E], tokens.
        gradients: float64 [E, N], squared gradients of the outputs.
        tokens: tokens of the whole model whose gradients were seen.
    """

    def __init__(self, weight: torch.Tensor):
        experts, rows, columns = weight.shape
        self.squares = torch.zeros(experts, columns, dtype=torch.float64)
        self.seen = torch.zeros(experts, dtype=torch.float64)
        self.gradients = torch.zeros(experts, rows, dtype=torch.float64)
        self.tokens = 0

    def add(self, expert: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """One product y = x W^T of an expert, before its backward."""
        self.squares[expert] += x.detach().float().square().sum(dim=0).cpu()
        self.seen[expert] += x.shape[0]
        if y.requires_grad:
            y.register_hook(lambda gradient: self._add_gradient(expert, gradient))

    def _add_gradient(self, expert: int, gradient: torch.Tensor) -> None:
        self.gradients[expert] += gradient.float().square().sum(dim=0).cpu()

    def inputs(self) -> torch.Tensor:
        """float32 [K]: mean squared input over all experts."""
        return (self.squares.sum(dim=0) / self.seen.sum().clamp(min=1)).float()

    def channel_gradients(self, damping: float) -> torch.Tensor:
        """float32 [E * N]: mean squared gradients over all tokens, so that an expert counts by its share of them.

        Relative to the inputs of all experts, as `inputs` gives them: an expert with larger inputs counts for more.
        An expert that saw next to nothing keeps `damping` times the mean.
        """
        own = self.squares.mean(dim=1) / self.seen.clamp(min=1)
        share = own / self.inputs().double().mean().clamp(min=torch.finfo(torch.float32).tiny)
        gradients = self.gradients / max(self.tokens, 1) * share[:, None]
        return (gradients + damping * gradients.mean()).reshape(-1).float()


class ExpertObserver:
    """Watches one experts module until `close`."""

    def __init__(self, module: nn.Module, leaves: dict[str, str]):
        """
        Args:
            module: of Transformers' common form, see `targets`, with the "eager" implementation: the others multiply
                all experts at once.
            leaves: keys of the statistics by the names of the module's fused weights.
        """
        self.statistics = {key: ExpertStatistics(module.get_parameter(leaf)) for leaf, key in leaves.items()}
        self._module, self._leaves = module, leaves
        self._watches: list[_Watch] = []
        self._handles = [
            module.register_forward_pre_hook(self._on_start),
            module.register_forward_hook(self._on_end, always_call=True),  # after an error too
        ]

    def close(self) -> None:
        """Leaves the module as it was."""
        for handle in self._handles:
            handle.remove()

    def add_to(self, calibration: Calibration, damping: float) -> None:
        """Puts the statistics in a calibration."""
        for key, statistics in self.statistics.items():
            calibration.inputs[key] = statistics.inputs()
            calibration.gradients[key] = statistics.channel_gradients(damping)

    def _on_start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        weights = [(module.get_parameter(leaf), self.statistics[key]) for leaf, key in self._leaves.items()]
        self._watches.append(_Watch(weights))
        self._watches[-1].__enter__()

    def _on_end(self, module: nn.Module, args: tuple[Any, ...], out: torch.Tensor | None) -> None:
        self._watches.pop().__exit__(None, None, None)
        if out is not None and out.requires_grad:
            out.register_hook(self._count_tokens)

    def _count_tokens(self, gradient: torch.Tensor) -> None:
        for statistics in self.statistics.values():
            statistics.tokens += gradient.shape[:-1].numel()


class _Watch(TorchFunctionMode):
    """Finds `F.linear(x, weight[expert])` for the given weights."""

    def __init__(self, weights: Sequence[tuple[torch.Tensor, ExpertStatistics]]):
        super().__init__()
        self._weights = weights
        self._taken: list[tuple[torch.Tensor, int, ExpertStatistics]] = []

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.__getitem__:
            for weight, statistics in self._weights:
                if args[0] is weight:
                    self._taken = [taken for taken in self._taken if taken[2] is not statistics]
                    self._taken.append((result, int(args[1]), statistics))
        elif function is nn.functional.linear:
            for expert_weight, expert, statistics in self._taken:
                if args[1] is expert_weight:
                    statistics.add(expert, args[0], result)
        return result


class EmbeddingObserver:
    """Sums over the lookups in embeddings [V, K] that share one weight, until `close`."""

    def __init__(self, key: str, tables: list[nn.Embedding]):
        self._key, self._columns = key, tables[0].embedding_dim
        self._sums = torch.zeros(tables[0].num_embeddings, dtype=torch.float64)
        self._tokens = 0
        self._handles = [table.register_forward_hook(self._on_output) for table in tables]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def add_to(self, calibration: Calibration, damping: float) -> None:
        """Puts the statistics in a calibration, on top of those of a head with the same weight."""
        inputs = calibration.inputs.setdefault(self._key, torch.ones(self._columns))
        rows = self.row_weights(damping) / inputs.mean()
        calibration.gradients[self._key] = calibration.gradients.get(self._key, 0) + rows

    def _on_output(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        out.requires_grad_(True).register_hook(
            lambda gradient: self._add(args[0].reshape(-1), gradient.reshape(-1, gradient.shape[-1]))
        )

    def _add(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        self._sums.index_add_(0, ids.cpu(), gradient.float().square().mean(dim=1).double().cpu())
        self._tokens += len(ids)

    def row_weights(self, damping: float) -> torch.Tensor:
        """float32 [V]: what a unit of squared error costs in each row; rows not met keep `damping` times the mean."""
        weights = self._sums / max(self._tokens, 1)
        return (weights + damping * weights.mean()).float()
