"""How many weights share a scale, where a true budget lets scales and codes compete for the same bits."""

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from tqdm import tqdm

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.targets import Target
from ..config import LowRAConfig
from .calibration import Calibration
from .planning import Planner, check_budget

# Scales of 8 bits cost 0.125, 0.063 and 0.031 bits a weight. What larger groups save goes into codes. Any runs in every
# kernel, but those of generation have a form of their own for 64 (csrc/cuda/product_small.cu).
GROUP_SIZES = (64, 128, 256)
# Matrices that decide for all: learning every one three times would take minutes for a large model.
_MOST = 16


def best_group_size(
    sizes: Sequence[int],
    config: LowRAConfig,
    source: DenseCheckpoint,
    targets: dict[str, Target],
    calibration: Calibration | None,
    device: torch.device,
    progress: bool,
) -> int:
    """Of some group sizes the one whose plan at the budget leaves the least error, the smallest of equals.

    Args:
        sizes: to choose from.
        config: recipe and budget.
        source: the dense checkpoint.
        targets: its weights to pack; up to 16 of them, spread over the model, are looked at.
        calibration: for sensitivity "fisher".
        device: where the arithmetic runs.
        progress: show a progress bar.

    Raises:
        ValueError: the budget cannot be met with any of them.
    """
    sizes = check_budget(config, targets, sorted(sizes))
    names = [name for name in source.names() if name in targets]
    if len(names) > _MOST:
        names = [names[round(place * (len(names) - 1) / (_MOST - 1))] for place in range(_MOST)]
    configs = [dataclasses.replace(config, group_size=size, assigner="exact") for size in sizes]
    planners = [Planner(config, None, calibration) for config in configs]
    for name in tqdm(names, desc="choosing the group size", unit="matrix", disable=not progress):
        weight = targets[name].as_matrix(source.load(name)[name]).to(device)
        for planner in planners:
            planner.add(name, targets[name], weight)
    errors: dict[int, float] = {}
    for planner in planners:
        # those that are looked at may be narrower than the rest, and cost more than the budget by themselves
        with contextlib.suppress(ValueError):
            errors[planner.config.group_size] = planner.assign().assignment.error
    return min(errors, key=lambda size: errors[size], default=sizes[-1])
