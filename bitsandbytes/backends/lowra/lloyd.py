"""Weighted Lloyd-Max for all precisions of every row, the specification of `lowra_lloyd_max` (LowRA, section 5 and
appendix G).

Each row is sorted once; prefix sums of weight, weight * x and weight * x^2 then give the sums of any cell as a
difference of two numbers, so a further iteration costs a binary search per threshold instead of a pass over the row.
(The direct form, comparing every weight with every threshold, costs as much per iteration as the whole sort.)
"""

import torch

from . import layout

LEVELS = {4: slice(0, 16), 2: slice(16, 20), 1: slice(20, 22)}  # columns of a row's levels [22]
THRESHOLDS = {4: slice(0, 15), 2: slice(15, 18), 1: slice(18, 19)}  # columns of a row's thresholds [19]

_SLICE_WEIGHTS = 1 << 21


def lloyd_max(
    weight: torch.Tensor,
    initial_levels: torch.Tensor,
    initial_thresholds: torch.Tensor,
    group_size: int,
    iterations: int,
    squared: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codebooks of every row at 4, 2 and 1 bits, and the error each would leave.

    With x = w / absmax of the group and v = absmax^2 (`squared`) or absmax, an iteration sets each level to the
    v-weighted mean of its cell (an empty cell keeps its level) and each threshold to the midpoint of its neighbours. It
    stops after `iterations`, or for a row whose error no longer falls; the best codebook seen is returned.

    Args:
        weight: floating point [N, K], finite.
        initial_levels: float32 [22]: 16 levels for 4 bits, 4 for 2, 2 for 1, each ascending.
        initial_thresholds: float32 [19]: 15, 3 and 1, each between its two levels; kernels may differ on others.

    Returns:
        levels float32 [N, 22], thresholds float32 [N, 19], and errors float32 [N, 3] for 4, 2 and 1 bits: the sum over
        the row of (w - absmax * level)^2, whichever weight the search used.
    """
    rows, in_features = weight.shape
    levels = torch.empty(rows, 22, dtype=torch.float32, device=weight.device)
    thresholds = torch.empty(rows, 19, dtype=torch.float32, device=weight.device)
    errors = torch.empty(rows, 3, dtype=torch.float32, device=weight.device)
    step = max(1, _SLICE_WEIGHTS // max(1, in_features))
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        sums = _SortedRows(weight[part].float(), group_size, squared)
        for place, bits in enumerate(layout.PRECISIONS):
            table, cuts, error = _iterate(
                sums, initial_levels[LEVELS[bits]], initial_thresholds[THRESHOLDS[bits]], iterations
            )
            levels[part, LEVELS[bits]] = table.float()
            thresholds[part, THRESHOLDS[bits]] = cuts.float()
            errors[part, place] = error.float()
    return levels, thresholds, errors


class _SortedRows:
    """Rows of normalised weights in ascending order with prefix sums in double precision."""

    def __init__(self, weight: torch.Tensor, group_size: int, squared: bool):
        rows, in_features = weight.shape
        groups = layout.group_count(in_features, group_size)
        padded = torch.nn.functional.pad(weight, (0, groups * group_size - in_features)).view(rows, groups, group_size)
        absmax = padded.abs().amax(dim=2, keepdim=True)
        normal = torch.where(absmax > 0, padded / absmax, torch.zeros_like(padded)).view(rows, -1)[:, :in_features]
        absmax = absmax.expand(-1, -1, group_size).reshape(rows, -1)[:, :in_features].double()
        self.x, order = normal.sort(dim=1)
        x = self.x.double()
        absmax = torch.gather(absmax, 1, order)
        self.true = _prefix_sums(absmax.square(), x)
        self.search = self.true if squared else _prefix_sums(absmax, x)

    def cells(self, thresholds: torch.Tensor, sums: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Sums over each cell [rows, cells] of weight, weight * x and weight * x^2."""
        edge = torch.searchsorted(self.x, thresholds.float().contiguous(), right=True)
        edge = torch.nn.functional.pad(edge, (1, 0))
        edge = torch.nn.functional.pad(edge, (0, 1), value=self.x.shape[1])
        return tuple(torch.gather(total, 1, edge).diff(dim=1) for total in sums)


def _prefix_sums(importance: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    moments = (importance, importance * x, importance * x * x)
    return tuple(torch.nn.functional.pad(moment.cumsum(dim=1), (1, 0)) for moment in moments)


def _error(cells: tuple[torch.Tensor, ...], levels: torch.Tensor) -> torch.Tensor:
    mass, first, second = cells
    return (second - 2 * levels * first + levels.square() * mass).sum(dim=1).clamp(min=0)


def _iterate(
    sums: _SortedRows, initial_levels: torch.Tensor, initial_thresholds: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = sums.x.shape[0]
    levels = initial_levels.double().repeat(rows, 1)
    thresholds = initial_thresholds.double().repeat(rows, 1)
    cells = sums.cells(thresholds, sums.search)
    error = _error(cells, levels)
    active = torch.ones(rows, 1, dtype=torch.bool, device=levels.device)
    for _ in range(iterations):
        mass, first, _ = cells
        candidate = torch.where(mass > 0, first / mass.clamp(min=torch.finfo(mass.dtype).tiny), levels)
        midpoints = (candidate[:, :-1] + candidate[:, 1:]) / 2
        new_cells = sums.cells(midpoints, sums.search)
        new_error = _error(new_cells, candidate)
        active = active & (new_error < error)[:, None]
        levels = torch.where(active, candidate, levels)
        thresholds = torch.where(active, midpoints, thresholds)
        cells = tuple(torch.where(active, new, old) for new, old in zip(new_cells, cells, strict=True))
        error = torch.where(active[:, 0], new_error, error)
        if not active.any():
            break
    return levels, thresholds, _error(sums.cells(thresholds, sums.true), levels)
