"""Many `TrainedWeight`s of one number of columns as one: their rows stand below each other, sorted by precision.

A weight that is made costs a hundred small kernels whatever its size. A model of 36 million weights is two stacks, and
a step of its training a fortieth of the launches.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.reference import decode_scales

from ..weights.packed import STORAGES, store_scales
from .block_training import RATES, rate_factor
from .trained_weight import AsStored, Rounded, TrainedWeight, changed_scales, stored_levels

# Weights of one stack: temporaries while it is made are no larger than those of the largest matrix of a 7B.
MOST = 2**25
_BETAS, _SMALL = (0.9, 0.95), 1e-12


def stacked(weights: dict[str, TrainedWeight], most: int = MOST, fixed_cells: bool = True) -> list["Stack"]:
    """Stacks of all weights, which are empty until `Stack.unstack` gives them back what was trained.

    Args:
        weights: by name.
        most: weights of one stack.
        fixed_cells: see `Stack`.
    """
    stacks: list[Stack] = []
    open_ones: dict[tuple, dict[str, TrainedWeight]] = {}
    for name, weight in weights.items():
        key = weight.dense.shape[1], weight.start.group_size, weight.start.scales.dtype
        members = open_ones.setdefault(key, {})
        if members and sum(other.dense.numel() for other in members.values()) + weight.dense.numel() > most:
            stacks.append(Stack(members, fixed_cells))
            members = open_ones[key] = {}
        members[name] = weight
    return stacks + [Stack(members, fixed_cells) for members in open_ones.values()]


class Stack(nn.Module):
    """W + scaling * B A of several matrices, by name.

    What is trained of each is as `TrainedWeight` says, but that with `fixed_cells` codes are found by the tables of the
    start, however those move. Otherwise weights at a border of two cells change their codes with a level, of which no
    gradient knows: where all blocks are trained together tables did more harm than good (docs/lab/accuracy.md).

    Attributes:
        weights: by name.
        dense: float32 [rows of all, K].
        level_change: float32 [entries].
        scale_change: float32 [rows of all, groups].
        factors: A and B of the weights whose product is trained, by name and side.
    """

    def __init__(self, weights: dict[str, TrainedWeight], fixed_cells: bool):
        super().__init__()
        self.weights = weights
        members = list(weights.values())
        self._group_size, self._columns = members[0].start.group_size, members[0].dense.shape[1]
        self._storage = STORAGES[members[0].start.scales.dtype]
        rows, sizes = {}, {bits: 0 for bits in layout.PRECISIONS}
        for bits in layout.PRECISIONS:
            for name, weight in weights.items():
                for segment in weight.segments:
                    if segment.bits == bits:
                        first = sum(sizes.values())
                        sizes[bits] += segment.end - segment.first
                        rows[name, bits] = segment, slice(first, sum(sizes.values()))
        self._rows = rows
        whole = layout.segments(sum(sizes.values()), sizes[4], sizes[2], self._columns)
        self._segments = [segment for segment in whole if segment.end > segment.first]
        self._order, self._place, self._padded = self._places()
        self._scales = self.gathered(weight.scales for weight in members)
        self._levels = torch.cat(
            [weights[name].start.levels[_entries(s)] for (name, _), (s, _) in rows.items()]
        ).float()
        self.dense = nn.Parameter(self.gathered(weight.dense.detach() for weight in members))
        self.level_change = nn.Parameter(
            torch.cat([weights[name].level_change.detach()[_entries(s)] for (name, _), (s, _) in rows.items()])
        )
        self.scale_change = nn.Parameter(self.gathered(weight.scale_change.detach() for weight in members))
        with torch.no_grad():
            self._cells = self._tables() if fixed_cells else None
        trained = {name: weight for name, weight in weights.items() if weight.trains_product}
        self.factors = {
            (name, side): getattr(weight, side) for name, weight in trained.items() for side in ("lora_A", "lora_B")
        }
        for weight in members:
            for parameter in (weight.dense, weight.level_change, weight.scale_change):
                parameter.data = parameter.new_empty(0)

    def gathered(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Rows of tensors [N, ...] in packed row order, one for each weight, in the stack's order."""
        by_name = dict(zip(self.weights, tensors, strict=True))
        return torch.cat([by_name[name][s.first : s.end] for (name, _), (s, _) in self._rows.items()])

    def of_rows(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """[rows of all, 1]: of each row the number of its matrix."""
        return torch.cat([values[name].expand(s.end - s.first, 1) for (name, _), (s, _) in self._rows.items()])

    def _places(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The row of the matrices below each other at each row of the stack; where its scales lie when those of each
        matrix begin a block of scales of their own, and the length of that.
        """
        orders, places, first, begin = {}, {}, 0, 0
        for name, weight in self.weights.items():
            orders[name] = weight.order + first
            count = weight.scales.numel()
            places[name] = torch.arange(begin, begin + count, device=weight.order.device).view(weight.scales.shape)
            first += len(weight.order)
            begin += -(-count // layout.SCALE_BLOCK) * layout.SCALE_BLOCK
        return self.gathered(orders.values()), self.gathered(places.values()).view(-1), begin

    def forward(self) -> dict[str, torch.Tensor]:
        """The sums by name, float32 [N, K] each, rows in the order of W."""
        stored = self._rounded()
        whole = torch.empty_like(stored).index_copy(0, self._order, stored)
        parts = whole.split([len(weight.order) for weight in self.weights.values()])
        return {name: self._with_product(name, part) for name, part in zip(self.weights, parts, strict=True)}

    def _rounded(self) -> torch.Tensor:
        return Rounded.apply(self.dense, *self._tables(), self._segments, self._group_size, self._cells)

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels [entries] and scales [rows of all, groups] in the values that are stored of them."""
        scales = changed_scales(self._scales, self.scale_change)
        levels = stored_levels(self._levels + self.level_change, self._segments)
        return levels, AsStored.apply(scales, self._kept(scales.detach()))

    def _with_product(self, name: str, part: torch.Tensor) -> torch.Tensor:
        if (name, "lora_A") not in self.factors:
            return part
        return torch.addmm(
            part, self.factors[name, "lora_B"], self.factors[name, "lora_A"], alpha=self.weights[name].scaling
        )

    def _kept(self, scales: torch.Tensor) -> torch.Tensor:
        """What is stored of the scales."""
        if self._storage != "double_quant":
            return decode_scales(*store_scales(scales, self._storage))
        padded = scales.new_zeros(1, self._padded)
        padded[0, self._place] = scales.view(-1)
        return decode_scales(*store_scales(padded, self._storage)).view(-1)[self._place].view(scales.shape)

    def parts(self) -> dict[str, nn.Parameter]:
        """All that is trained."""
        factors = {f"{side}.{name}": factor for (name, side), factor in self.factors.items()}
        return {**dict(self.named_parameters()), **factors}

    def rates(self, rates: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rates of the parts, of those of each weight (`rates_of`): rows learn each at the rate of their matrix."""
        some = next(iter(self.weights))
        found = {key: rates[some][key] for key in ("level_change", "scale_change")}
        found["dense"] = self.of_rows({name: rates[name]["dense"] for name in self.weights})
        return found | {f"{side}.{name}": rates[name][side] for name, side in self.factors}

    @torch.no_grad()
    def unstack(self) -> None:
        """Gives the weights what was trained of them."""
        if self._cells is not None:
            self.dense.copy_(self._rounded())  # which is nearest to itself by the tables of the end too
        for name, weight in self.weights.items():
            pieces = [(s, rows) for (owner, _), (s, rows) in self._rows.items() if owner == name]
            entries = [self._entries_of(bits, rows) for (owner, bits), (_, rows) in self._rows.items() if owner == name]
            weight.dense.data = torch.cat([self.dense[rows] for _, rows in pieces])
            weight.scale_change.data = torch.cat([self.scale_change[rows] for _, rows in pieces])
            weight.level_change.data = torch.cat([self.level_change[own] for own in entries])

    def _entries_of(self, bits: int, rows: slice) -> slice:
        """Entries of the levels of rows of one precision."""
        segment = next(segment for segment in self._segments if segment.bits == bits)
        return segment.levels_of(rows.start, rows.stop)


def _entries(segment: layout.Segment) -> slice:
    return segment.levels_of(segment.first, segment.end)


def rates_of(weight: TrainedWeight, shares: dict[str, float]) -> dict[str, torch.Tensor]:
    """Rate of each part of a weight: shares of `block_training.RATES`, of tables absolute, of others over their root
    mean square.
    """
    found = {}
    for name, parameter in weight.named_parameters():
        rate = torch.tensor(shares[name] * RATES[name], device=parameter.device)
        tables = name in ("level_change", "scale_change")
        found[name] = rate if tables else rate * parameter.detach().square().mean().sqrt()
    return found


class Adam:
    """Adam, which a CUDA graph can hold."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], rates: Mapping[str, torch.Tensor]):
        """
        Args:
            parameters: what learns, by name; there are some.
            rates: of each.
        """
        self._parameters, self._rates = parameters, rates
        self._first = {key: torch.zeros_like(tensor.detach()) for key, tensor in self._parameters.items()}
        self._second = {key: torch.zeros_like(tensor.detach()) for key, tensor in self._parameters.items()}
        device = next(iter(parameters.values())).device
        self._factor, self._correction = torch.zeros((), device=device), torch.zeros((), device=device)

    def at(self, step: int, steps: int) -> None:
        """Sets what depends on the step: the rates, and the moments' bias."""
        self._factor.fill_(rate_factor(step, steps) / (1 - _BETAS[0] ** (step + 1)))
        self._correction.fill_((1 - _BETAS[1] ** (step + 1)) ** -0.5)

    def step(self, made: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """
        Args:
            made: of the parameters.
            gradients: of the loss with respect to them.
        """
        found = torch.autograd.grad(made, list(self._parameters.values()), gradients)
        with torch.no_grad():
            for (key, parameter), gradient in zip(self._parameters.items(), found, strict=True):
                first, second = self._first[key], self._second[key]
                first.lerp_(gradient, 1 - _BETAS[0])
                second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
                size = second.sqrt().mul_(self._correction).add_(_SMALL)
                parameter.sub_(torch.div(first, size, out=size).mul_(self._factor).mul_(self._rates[key]))

    def state(self) -> dict[str, torch.Tensor]:
        kinds: dict[str, Mapping[str, torch.Tensor]]
        kinds = {"now": self._parameters, "first": self._first, "second": self._second}
        return {f"{kind}.{key}": tensor.detach() for kind, own in kinds.items() for key, tensor in own.items()}
