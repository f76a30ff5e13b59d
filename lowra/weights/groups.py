"""Groups of consecutive weights of a channel that share a scale."""

import torch


def widen(scales: torch.Tensor, group_size: int, columns: int) -> torch.Tensor:
    """Each group's scale at each of its weights: [N, groups] to [N, columns]."""
    return scales.repeat_interleave(group_size, dim=1)[:, :columns]


def group_sums(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """The sum over each group: [N, K] to [N, groups]."""
    padding = -values.shape[1] % group_size
    return torch.nn.functional.pad(values, (0, padding)).view(values.shape[0], -1, group_size).sum(dim=2)
