"""Random packed weights for the kernel tests: any shape, mix of precisions, group size and scale storage."""

from dataclasses import dataclass

import torch

from bitsandbytes.backends.lowra import layout, reference
from bitsandbytes.backends.lowra.layout import PackedMatrix


@dataclass
class Case:
    """A dense weight, its packed form by the reference, and the arguments of the ops in their order."""

    weight: torch.Tensor  # [N, K]
    row_order: torch.Tensor
    thresholds: torch.Tensor
    rows_4bit: int
    rows_2bit: int
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    scale_steps: torch.Tensor | None
    levels: torch.Tensor

    @property
    def quantize_arguments(self):
        return self.weight, self.row_order, self.thresholds, self.rows_4bit, self.rows_2bit, self.group_size

    @property
    def packed(self) -> PackedMatrix:
        tensors = self.codes, self.row_order, self.scales, self.scale_steps, self.levels
        return PackedMatrix(*tensors, self.rows_4bit, self.rows_2bit, self.weight.shape[1], self.group_size)

    def dequantize_arguments(self, dtype):
        return *self.packed, dtype

    def linear_arguments(self, x, bias=None):
        return x, *self.packed.tensors, bias, self.rows_4bit, self.rows_2bit, self.group_size

    def to(self, device) -> "Case":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Case(**{**vars(self), **moved})


def packed_case(
    rows_4bit: int,
    rows_2bit: int,
    rows_1bit: int,
    in_features: int,
    group_size: int = 64,
    scales: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    *,
    magnitude: float = 1.0,
    seed: int = 0,
) -> Case:
    """A packed weight whose rows of each precision stand at random places of W. Some groups are all zero."""
    random = torch.Generator().manual_seed(seed)
    rows = rows_4bit + rows_2bit + rows_1bit
    weight = torch.randn(rows, in_features, generator=random) * magnitude
    weight[torch.rand(rows, generator=random) < 0.2, : 2 * group_size] = 0
    weight = weight.to(dtype)
    bits = torch.tensor([4] * rows_4bit + [2] * rows_2bit + [1] * rows_1bit, dtype=torch.uint8)
    order = layout.row_order(bits[torch.randperm(rows, generator=random)])
    segments = layout.segments(rows, rows_4bit, rows_2bit, in_features)

    def tables(entries):
        parts = [torch.rand(s.end - s.first, entries(s.bits), generator=random) * 2 - 1 for s in segments]
        return torch.cat([part.sort(dim=1).values.reshape(-1) for part in parts])

    thresholds = tables(lambda b: 2**b - 1)
    codes, absmax = reference.quantize(weight, order, thresholds, rows_4bit, rows_2bit, group_size)
    steps = None
    if scales == torch.uint8:
        absmax, steps = reference.encode_scales(absmax)
    levels = tables(lambda b: 2**b).half()
    return Case(weight, order, thresholds, rows_4bit, rows_2bit, group_size, codes, absmax.to(scales), steps, levels)
