"""A packed weight: the tensors of packed format 1 (csrc/lowra.h), on disk and in a model alike."""

import dataclasses

import torch

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.layout import PackedMatrix

from ..config import LowRAConfig

# PEFT's k-bit preparation turns float16 into float32, which is exact; such models may have been saved.
TENSOR_DTYPES = {
    "weight": (torch.uint8,),
    "row_bits": (torch.uint8,),
    "scales": (torch.uint8, torch.float16, torch.float32),
    "scale_steps": (torch.float32,),
    "levels": (torch.float16, torch.float32),
}
TENSOR_NAMES = tuple(TENSOR_DTYPES)
STORAGES = {torch.uint8: "double_quant", torch.float16: "float16", torch.float32: "float32"}  # of scales
TABLES = ("levels", "scales", "scale_steps")  # what codes stand for, and what is trained where they are


@dataclasses.dataclass
class PackedWeight:
    """A weight [N, K] in packed format 1; the tensors are those on disk and of `LowRALinear`.

    Attributes:
        weight: uint8 [bytes], codes in packed row order.
        row_bits: uint8 [N], precision of each channel, in the order of the weight.
        scales: float32, float16 or uint8 [N, groups], packed row order.
        scale_steps: float32 [blocks] for uint8 scales, else None.
        levels: float16 [entries], packed row order.
        in_features: K.
        group_size: weights that share a scale.
    """

    weight: torch.Tensor
    row_bits: torch.Tensor
    scales: torch.Tensor
    scale_steps: torch.Tensor | None
    levels: torch.Tensor
    in_features: int
    group_size: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name, without those that this scale storage does not have."""
        named = {name: getattr(self, name) for name in TENSOR_NAMES}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense weight [N, K]."""
        return torch.ops.bitsandbytes.lowra_dequantize(*self.matrix(), dtype)

    def matrix(self) -> PackedMatrix:
        """The tensors and sizes as the ops take them."""
        return PackedMatrix(
            self.weight,
            layout.row_order(self.row_bits),
            self.scales,
            self.scale_steps,
            self.levels,
            *row_counts(self.row_bits),
            self.in_features,
            self.group_size,
        )

    def segments(self) -> list[layout.Segment]:
        """The rows of each precision in packed order, and where their codes and levels lie."""
        return layout.segments(self.row_bits.numel(), *row_counts(self.row_bits), self.in_features)

    @property
    def stored_bits(self) -> int:
        """Everything stored: codes, padding, scales, levels and precisions."""
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def row_counts(row_bits: torch.Tensor) -> tuple[int, int]:
    """Rows of 4 and of 2 bits, as ops and `layout` take them."""
    return int((row_bits == 4).sum()), int((row_bits == 2).sum())


def store_scales(absmax: torch.Tensor, storage: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [N, groups] in one of the three storages, and the float32 steps of the 8-bit one."""
    if storage == "double_quant":
        return torch.ops.bitsandbytes.lowra_encode_scales(absmax)
    if storage == "float32":
        return absmax, None
    largest = absmax.max().item() if absmax.numel() else 0.0
    if largest > torch.finfo(torch.float16).max:
        raise ValueError(
            f"A group's absmax is {largest:.3g}, more than float16 holds (65504): use scales=float32 or double_quant."
        )
    return absmax.half(), None


def channel_bits(out_features: int, in_features: int, bits: int, config: LowRAConfig) -> float:
    """True bits of one channel of `bits` bits, shared scale steps in proportion. What a true budget counts."""
    groups = layout.group_count(in_features, config.group_size)
    per_scale = {"double_quant": 8, "float16": 16, "float32": 32}[config.scales]
    steps = 32 * layout.scale_step_count(out_features, in_features, config.group_size) / out_features
    scale_bits = per_scale * groups + (steps if config.scales == "double_quant" else 0)
    return 8 * layout.row_bytes(in_features, bits) + scale_bits + 16 * 2**bits + 8
