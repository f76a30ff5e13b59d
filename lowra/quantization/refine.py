"""Group scales and levels fitted to the weight together, by least squares: no more bits, less squared error.

Lloyd-Max leaves the scale of a group at its absmax. For given codes the best scale is a quotient of two sums, and for
given scales so is each level; `refine` alternates codes, scales and levels, none of which can raise the squared error.
On base-30m that takes off 6 % of it at 1.5 bits (docs/lab/accuracy.md).
"""

import torch

from ..weights.groups import group_sums, widen


def refine(
    weight: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, group_size: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and scales whose nearest codes leave no more squared error than those given.

    Args:
        weight: float32 [N, K].
        levels: float32 [N, L], ascending.
        scales: float32 [N, groups], not negative.
        group_size: weights that share a scale.
        iterations: rounds of codes, scales and levels.
    """
    for _ in range(iterations):
        codes = nearest_codes(weight, levels, scales, group_size)
        value = levels.gather(1, codes.long())
        numerator = group_sums(weight * value, group_size)
        denominator = group_sums(value.square(), group_size)
        # a scale below zero has no storage; where all codes sit on a level of zero any scale is as good
        scales = torch.where((denominator > 0) & (numerator > 0), numerator / denominator, scales)
        wide = widen(scales, group_size, weight.shape[1])
        energy, product = wide.square(), wide * weight
        fitted = []
        for code in range(levels.shape[1]):
            cell = codes == code
            mass, first = (energy * cell).sum(dim=1), (product * cell).sum(dim=1)
            fitted.append(torch.where(mass > 0, first / mass.clamp(min=torch.finfo(mass.dtype).tiny), levels[:, code]))
        levels = torch.stack(fitted, dim=1).cummax(dim=1).values  # empty cells may lie behind their neighbours
    return levels, scales


def nearest_codes(weight: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """uint8 [N, K]: index of the level nearest to each weight in units of its group's scale; 0 where that is 0."""
    wide = widen(scales, group_size, weight.shape[1])
    cuts = (levels[:, 1:] + levels[:, :-1]) / 2
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    for cut in cuts.T:
        codes += weight > cut[:, None] * wide
    return torch.where(wide > 0, codes, torch.zeros_like(codes))
