"""A packed weight while it is trained: codes, levels and scales, and the low-rank product beside it.

Codes are the levels nearest to a dense weight that gradients reach as if nothing had been rounded (straight-through).
Levels and scales take part as they will be stored, so that what was trained is what is packed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.layout import Segment
from bitsandbytes.backends.lowra.reference import decode_scales, pack_codes, rows_of_codes

from ..weights.groups import group_sums, widen
from ..weights.packed import STORAGES, PackedWeight, store_scales
from .loftq import LowRank

# How far inside its code's cell a weight begins, in units of its group's scale: rounding must not move it at once.
_MARGIN = 1e-3
# Numbers of the one-hot form of codes that are in memory at a time: a GPU waits for launches, a CPU for its cache.
_ONE_HOT_CPU, _ONE_HOT_GPU = 2**22, 2**26


class TrainedWeight(nn.Module):
    """W + scaling * B A [N, K] with W in packed format 1.

    Attributes:
        start: packed, where the training starts.
        order: int64 [N], the row of W at each packed place.
        segments: its rows by precision, without precisions that have none.
        scales: float32 [N, groups], of the start.
        scaling: by which the product of A and B counts.
        dense: float32 [N, K] in packed row order, what the codes are rounded from.
        level_change: float32 [entries], added to the levels.
        scale_change: float32 [N, groups], relative change of each scale.
        lora_A, lora_B: float32 [r, K] and [N, r], or None; not trained where their product is zero, because an
            adapter that is to start from nothing shall do so.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, weight: torch.Tensor, packed: PackedWeight, factors: LowRank | None, scaling: float):
        """
        Args:
            weight: float32 [N, K], what the sum stands for.
            packed: where the training starts, codes included.
            factors: of the adapter, or None.
            scaling: by which their product counts.
        """
        super().__init__()
        self.start, self.scaling = packed, scaling
        self.order = layout.row_order(packed.row_bits).long()
        self.segments = [segment for segment in packed.segments() if segment.end > segment.first]
        self.scales = decode_scales(packed.scales, packed.scale_steps)
        if factors is not None:
            weight = weight - scaling * factors.lora_B @ factors.lora_A
        self.dense = nn.Parameter(self._inside_cells(weight[self.order]))
        self.level_change = nn.Parameter(torch.zeros_like(packed.levels, dtype=torch.float32))
        self.scale_change = nn.Parameter(torch.zeros_like(self.scales))
        for name in ("lora_A", "lora_B"):
            factor = None if factors is None else nn.Parameter(getattr(factors, name).clone())
            self.register_parameter(name, factor)
        self.trains_product = factors is not None and bool(factors.lora_B.any()) and bool(factors.lora_A.any())

    def forward(self) -> torch.Tensor:
        """The sum, float32 [N, K], rows in the order of W."""
        levels, scales = self._tables()
        stored = Rounded.apply(self.dense, levels, scales, self.segments, self.start.group_size)
        weight = torch.empty_like(stored).index_copy(0, self.order, stored)
        if self.lora_A is None or self.lora_B is None:
            return weight
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scaling)

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels [entries] and scales [N, groups] in the values that are stored of them."""
        levels = stored_levels(self.start.levels.float() + self.level_change, self.segments)
        scales = self._changed_scales()
        return levels, AsStored.apply(scales, decode_scales(*self._kept(scales)))

    def _kept(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return store_scales(scales.detach(), STORAGES[self.start.scales.dtype])

    def _changed_scales(self) -> torch.Tensor:
        return changed_scales(self.scales, self.scale_change)

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """W as it is now."""
        levels, scales = self._tables()
        codes = _codes(self.dense, levels, scales, self.segments, self.start.group_size)
        stream = [pack_codes(codes[s.first : s.end], s.bits, s.row_bytes).reshape(-1) for s in self.segments]
        stored, steps = self._kept(self._changed_scales())
        return dataclasses.replace(
            self.start, weight=torch.cat(stream), scales=stored, scale_steps=steps, levels=levels.half()
        )

    def factors(self) -> LowRank | None:
        """A and B as they are now."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return LowRank(self.lora_A.detach(), self.lora_B.detach())

    def _inside_cells(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest to `weight` [N, K], packed row order, whose rounding gives the codes of the start."""
        inside = torch.empty_like(weight)
        for bits, rows, entries, codes in rows_of_codes(self.start.matrix()):
            levels = self.start.levels[entries].view(-1, 2**bits).float()
            edge = torch.full((len(levels), 1), torch.inf, device=levels.device)
            cuts = torch.cat([-edge, (levels[:, 1:] + levels[:, :-1]) / 2, edge], dim=1)
            low, high = cuts.gather(1, codes.long()), cuts.gather(1, codes.long() + 1)
            margin = ((high - low) / 2).clamp(max=_MARGIN)
            wide = widen(self.scales[rows], self.start.group_size, self.start.in_features)
            own = weight[rows]
            nearest = torch.minimum(torch.maximum(own, (low + margin) * wide), (high - margin) * wide)
            inside[rows] = torch.where(wide > 0, nearest, own)  # a group of scale 0 has no cells
        return inside


def stored_levels(levels: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Levels [entries] in the values that are stored of them: ascending in every row, because codes are found by the
    midpoints, and in float16.
    """
    parts = [levels[s.levels_of(s.first, s.end)].view(-1, 2**s.bits).cummax(dim=1).values for s in segments]
    levels = torch.cat([part.reshape(-1) for part in parts])
    return AsStored.apply(levels, levels.half().float())


def changed_scales(scales: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Scales [N, groups] after a relative change."""
    return scales * (1 + change).clamp(min=0)  # one below zero has no storage


class AsStored(torch.autograd.Function):
    """The second argument, with the gradient of the first: what is stored of a table stands for the table."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return stored.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class Rounded(torch.autograd.Function):
    """The packed weight [N, K] in packed row order: of each dense weight the nearest level, times its group's scale.

    `cells`: levels and scales by which the nearest is found, in place of the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        dense: torch.Tensor,
        levels: torch.Tensor,
        scales: torch.Tensor,
        segments: Sequence[Segment],
        group_size: int,
        cells: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        codes = _codes(dense, *(cells or (levels, scales)), segments, group_size)
        ctx.save_for_backward(codes, levels, scales)
        ctx.segments, ctx.group_size = segments, group_size
        return _normal(codes, levels, segments) * widen(scales, group_size, dense.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, levels, scales = ctx.saved_tensors
        scaled = gradient * widen(scales, ctx.group_size, gradient.shape[1])
        for_levels = torch.empty_like(levels)
        for s in ctx.segments:
            rows = slice(s.first, s.end)
            for_levels[s.levels_of(s.first, s.end)] = _sums_by_code(scaled[rows], codes[rows], 2**s.bits).view(-1)
        for_scales = group_sums(gradient * _normal(codes, levels, ctx.segments), ctx.group_size)
        return gradient, for_levels, for_scales, None, None, None


def _codes(
    dense: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, segments: Sequence[Segment], group_size: int
) -> torch.Tensor:
    """uint8 [N, K], packed row order: what `nearest_codes` finds, in fewer kernels, for which small layers wait."""
    wide = widen(scales, group_size, dense.shape[1])
    normal = (dense / wide).masked_fill_(wide <= 0, -torch.inf)  # a group of scale 0 has code 0
    codes = torch.empty(dense.shape, dtype=torch.uint8, device=dense.device)
    for s in segments:
        own = levels[s.levels_of(s.first, s.end)].view(-1, 2**s.bits)
        cuts = (own[:, 1:] + own[:, :-1]) / 2
        codes[s.first : s.end] = torch.searchsorted(cuts, normal[s.first : s.end], out_int32=True)
    return codes


def _sums_by_code(values: torch.Tensor, codes: torch.Tensor, count: int) -> torch.Tensor:
    """[n, count]: of each row the sum of the values at each code; always in the same order."""
    sums = torch.empty(len(values), count, device=values.device)
    known = torch.arange(count, dtype=torch.uint8, device=values.device)[:, None]
    most = _ONE_HOT_CPU if values.device.type == "cpu" else _ONE_HOT_GPU
    step = max(1, most // (count * values.shape[1]))
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        one_hot = (codes[rows, None] == known).to(values.dtype)
        sums[rows] = torch.bmm(one_hot, values[rows, :, None])[..., 0]
    return sums


def _normal(codes: torch.Tensor, levels: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """float32 [N, K]: the level of each code."""
    parts = [
        levels[s.levels_of(s.first, s.end)].view(-1, 2**s.bits).gather(1, codes[s.first : s.end].long())
        for s in segments
    ]
    return torch.cat(parts)
