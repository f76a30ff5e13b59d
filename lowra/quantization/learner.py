"""Learner of levels and thresholds (P1): weighted Lloyd-Max per output channel, data-free (LowRA, section 5)."""

import torch

from bitsandbytes.backends.lowra.lloyd import LEVELS, THRESHOLDS

from ..config import LowRAConfig
from ..weights.codebook import PRECISIONS, Codebook, initial_tables


def learn_codebook(weight: torch.Tensor, config: LowRAConfig) -> Codebook:
    """Levels and thresholds of every channel at 4, 2 and 1 bits, and the error each precision would leave.

    Args:
        weight: floating point [N, K], finite; on a GPU the search runs there.
        config: `codebook`, `iterations`, `block_weight`, `thresholds` and `group_size` decide.

    With `thresholds="matrix"` the thresholds found for the channels are averaged over the matrix and the levels
    refitted to them per channel. With `codebook="normal_float"` the initial tables stay, so only errors are measured.
    """
    levels, thresholds = initial_tables(weight.device)
    iterations = 0 if config.codebook == "normal_float" else config.iterations
    squared = config.block_weight == "absmax_squared"
    codebook = Codebook(
        *torch.ops.bitsandbytes.lowra_lloyd_max(
            weight, levels, thresholds, None, config.group_size, iterations, squared
        )
    )
    if config.thresholds == "matrix" and iterations > 0:
        return _share_thresholds(weight, codebook, config)
    return codebook


def _share_thresholds(weight: torch.Tensor, codebook: Codebook, config: LowRAConfig) -> Codebook:
    """Averages the thresholds over the channels and sets each level to the centroid of its cell under them."""
    shared = codebook.thresholds.mean(dim=0)
    rows, in_features = weight.shape
    padding = -in_features % config.group_size
    groups = torch.nn.functional.pad(weight.float(), (0, padding)).view(rows, -1, config.group_size)
    absmax = groups.abs().amax(dim=2, keepdim=True)
    normal = torch.where(absmax > 0, groups / absmax, torch.zeros_like(groups)).view(rows, -1)[:, :in_features]
    scale = absmax.expand(-1, -1, config.group_size).reshape(rows, -1)[:, :in_features]
    importance = scale.square() if config.block_weight == "absmax_squared" else scale

    levels, errors = codebook.levels.clone(), torch.empty_like(codebook.errors)
    for place, bits in enumerate(PRECISIONS):
        code = torch.bucketize(normal.contiguous(), shared[THRESHOLDS[bits]].contiguous())
        table = levels[:, LEVELS[bits]]
        mass = torch.zeros_like(table).scatter_add_(1, code, importance)
        first = torch.zeros_like(table).scatter_add_(1, code, importance * normal)
        table = torch.where(mass > 0, first / mass.clamp(min=torch.finfo(mass.dtype).tiny), table)
        levels[:, LEVELS[bits]] = table
        errors[:, place] = ((weight.float() - scale * table.gather(1, code)).square()).sum(dim=1)
    return Codebook(levels, shared.repeat(rows, 1), errors)
