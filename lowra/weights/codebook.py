"""Levels and thresholds: those that every search starts from, and the codebook learned for one matrix."""

import dataclasses

import torch

from bitsandbytes.backends.lowra.layout import PRECISIONS  # order of a codebook's columns
from bitsandbytes.backends.lowra.lloyd import LEVELS, THRESHOLDS

NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.09105, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
NF2 = (-1.0, 0.0, 0.3379, 1.0)
BINARY = (-1.0, 1.0)
NF2_THRESHOLDS = (-0.5, 0.16895762, 0.66895762)


@dataclasses.dataclass
class Codebook:
    """Levels and thresholds of one matrix, columns in the order 4, 2, 1 bits (LowRA, T2 of figure 1).

    Attributes:
        levels: float32 [N, 22], in normalised space, ascending within a precision.
        thresholds: float32 [N, 19].
        errors: float32 [N, 3], squared error of each channel in the dequantised domain at 4, 2 and 1 bits.
    """

    levels: torch.Tensor
    thresholds: torch.Tensor
    errors: torch.Tensor

    def pack(self, row_order: torch.Tensor, row_bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Thresholds float32 and levels float16 of the assigned precisions in packed order, both flat."""
        order = row_order.long()
        bits = row_bits[order]
        thresholds, levels = [], []
        for precision in PRECISIONS:
            rows = order[bits == precision]
            thresholds.append(self.thresholds[rows, THRESHOLDS[precision]].reshape(-1))
            levels.append(self.levels[rows, LEVELS[precision]].reshape(-1))
        return torch.cat(thresholds), torch.cat(levels).half()

    def error_at(self, row_bits: torch.Tensor) -> torch.Tensor:
        """Squared error of each channel at its precision, float32 [N]."""
        column = (row_bits == 2).long() + 2 * (row_bits == 1).long()
        return self.errors.gather(1, column[:, None])[:, 0]

    def to(self, device: torch.device | str) -> "Codebook":
        return Codebook(self.levels.to(device), self.thresholds.to(device), self.errors.to(device))


def initial_tables(device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels [22] and thresholds [19] every search starts from (LowRA, appendix F)."""
    nf4_midpoints = [(low + high) / 2 for low, high in zip(NF4, NF4[1:], strict=False)]
    levels = torch.tensor([*NF4, *NF2, *BINARY], dtype=torch.float32, device=device)
    thresholds = torch.tensor([*nf4_midpoints, *NF2_THRESHOLDS, 0.0], dtype=torch.float32, device=device)
    return levels, thresholds
