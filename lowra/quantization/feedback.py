"""Codes and levels chosen for a layer's outputs: error feedback over the columns, then levels by least squares.

Rounding to the nearest level makes the weight's error small; what a model feels is that of the outputs, e H e^T for a
row's error e and the inputs' second moment H. GPTQ (Frantar et al. 2022) carries each column's error on to the columns
that still can make up for it; here it rounds to a row's own table instead of a grid. For given codes the best levels of
a row are the solution of a system as small as its table. Bits and format stay as they are.
"""

import dataclasses

import torch

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.reference import decode_scales, pack_codes

from ..weights.groups import widen
from ..weights.packed import PackedWeight

_BLOCK = 128
# Levels stay where no output of the calibration pulls at them: share of the mean diagonal of a row's system.
_RIDGE = 1e-4
_SLICE_VALUES = 1 << 22
_WIDEST = 16


def with_feedback(weight: torch.Tensor, packed: PackedWeight, moment: torch.Tensor | None, rounds: int) -> PackedWeight:
    """`recode` as often as asked; `moment` may be None where that is 0."""
    for _ in range(rounds):
        if moment is None:
            raise ValueError("Feedback needs the second moment of the layer's inputs.")
        packed = recode(weight, packed, moment)
    return packed


def recode(weight: torch.Tensor, packed: PackedWeight, moment: torch.Tensor) -> PackedWeight:
    """The packed weight with codes by error feedback under its tables, and then levels fitted to these codes.

    A row that comes out worse, as greedy rounding may leave it, stays as it was.

    Args:
        weight: float32 [N, K], what the packed weight is to stand for.
        packed: a quantisation of it, or of something near it.
        moment: float32 [K, K], positive definite, second moment of the inputs.
    """
    order = layout.row_order(packed.row_bits).long()
    weight, moment = weight[order], moment.to(weight)
    wide = widen(decode_scales(packed.scales, packed.scale_steps), packed.group_size, packed.in_features)
    before = padded_levels(packed)
    codes = feed_back(weight, before, wide, moment)
    levels, codes = fit_levels(weight, before, codes, wide, moment)
    better = _output_error(weight - levels.gather(1, codes) * wide, moment) < _output_error(
        weight - packed.dequantize()[order], moment
    )
    levels = torch.where(better[:, None], levels, before)
    tables, stream = [], []
    for segment in packed.segments():
        first, end = segment.first, segment.end
        own = packed.weight[segment.codes_of(first, end)].view(end - first, segment.row_bytes)
        new = pack_codes(codes[first:end].to(torch.uint8), segment.bits, segment.row_bytes)
        stream.append(torch.where(better[first:end, None], new, own).reshape(-1))
        tables.append(levels[first:end, : 2**segment.bits].reshape(-1))
    return dataclasses.replace(packed, weight=torch.cat(stream), levels=torch.cat(tables).half())


def _output_error(left: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """[N]: mean squared error of each output."""
    return ((left @ moment) * left).sum(dim=1)


def padded_levels(packed: PackedWeight) -> torch.Tensor:
    """Levels of each row, float32 [N, 16] in packed row order; infinite behind a row's own."""
    levels = torch.full((packed.row_bits.numel(), _WIDEST), torch.inf, device=packed.levels.device)
    for segment in packed.segments():
        first, end, count = segment.first, segment.end, 2**segment.bits
        levels[first:end, :count] = packed.levels[segment.levels_of(first, end)].view(-1, count).float()
    return levels


def feed_back(weight: torch.Tensor, levels: torch.Tensor, wide: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Codes, int64 [N, K], by falling input energy of the columns, each column's error carried to the later ones.

    Args:
        weight: float32 [N, K].
        levels: float32 [N, 16], ascending, infinite behind a row's own.
        wide: float32 [N, K], scale of each weight.
        moment: float32 [K, K], positive definite.
    """
    rows, columns = weight.shape
    order = moment.diagonal().argsort(descending=True)
    rest, wide = weight[:, order], wide[:, order]
    cuts = (levels[:, 1:] + levels[:, :-1]) / 2
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment[order][:, order].double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty(rows, columns, dtype=torch.int64, device=weight.device)
    for first in range(0, columns, _BLOCK):
        end = min(first + _BLOCK, columns)
        errors = torch.empty(rows, end - first, device=weight.device)
        for column in range(first, end):
            scale, value = wide[:, column : column + 1], rest[:, column : column + 1]
            code = (value > cuts * scale).sum(dim=1, keepdim=True)  # infinity times a scale of 0 is no cut either
            error = (value - levels.gather(1, code) * scale) / upper[column, column]
            rest[:, column + 1 : end].addmm_(error, upper[column : column + 1, column + 1 : end], alpha=-1)
            codes[:, column : column + 1], errors[:, column - first : column - first + 1] = code, error
        rest[:, end:].addmm_(errors, upper[first:end, end:], alpha=-1)
    return torch.empty_like(codes).scatter_(1, order.expand_as(codes), codes)


def fit_levels(
    weight: torch.Tensor, levels: torch.Tensor, codes: torch.Tensor, wide: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels that leave the least error in the outputs with these codes, in float16's values; ascending, with the codes
    renumbered where two of them have changed places.

    Args: see `feed_back`.
    """
    fitted, codes = levels.clone(), codes.clone()
    own = levels.isfinite().sum(dim=1)
    for count in own.unique().tolist():
        step = max(1, _SLICE_VALUES // (count * weight.shape[1]))
        for rows in (own == count).nonzero()[:, 0].split(step):
            hot = torch.nn.functional.one_hot(codes[rows], count) * wide[rows][:, :, None]  # [n, K, count]
            seen = (moment @ hot.transpose(0, 1).reshape(len(moment), -1)).view(len(moment), -1, count)
            system = torch.einsum("nkl,knm->nlm", hot, seen)
            wanted = torch.einsum("knl,nk->nl", seen, weight[rows])
            ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None].clamp(min=1e-20)
            system = system + torch.diag_embed(ridge.expand(-1, count))
            table = torch.linalg.solve(system, wanted + ridge * levels[rows, :count])
            places = table.argsort(dim=1)
            fitted[rows, :count] = table.gather(1, places).half().float()
            codes[rows] = places.argsort(dim=1).gather(1, codes[rows])
    return fitted, codes
