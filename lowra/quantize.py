"""One weight to packed bits and back: the tensors of packed format 1 and the step from a codebook to them."""

import dataclasses

import torch

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.lloyd import LEVELS
from bitsandbytes.backends.lowra.reference import decode_scales, pack_codes

from .codebook import Codebook
from .config import LowRAConfig
from .refine import nearest_codes, refine

TENSOR_NAMES = ("weight", "row_bits", "scales", "scale_steps", "levels")


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
        return torch.ops.bitsandbytes.lowra_dequantize(
            self.weight,
            layout.row_order(self.row_bits),
            self.scales,
            self.scale_steps,
            self.levels,
            *row_counts(self.row_bits),
            self.in_features,
            self.group_size,
            dtype,
        )

    @property
    def stored_bits(self) -> int:
        """Everything stored: codes, padding, scales, mappings and precisions."""
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def nominal_bits(self) -> int:
        """The codes alone."""
        return int(self.row_bits.sum()) * self.in_features


def row_counts(row_bits: torch.Tensor) -> tuple[int, int]:
    """Rows of 4 and of 2 bits, as ops and `layout` take them."""
    return int((row_bits == 4).sum()), int((row_bits == 2).sum())


def quantize_matrix(
    weight: torch.Tensor, codebook: Codebook, row_bits: torch.Tensor, config: LowRAConfig
) -> PackedWeight:
    """Packs a weight with the codebook's tables at the assigned precisions (P3).

    Args:
        weight: floating point [N, K], finite.
        codebook: tables of this matrix (of W itself also where `weight` is W minus a low-rank part).
        row_bits: uint8 [N].

    Raises:
        ValueError: a group's absmax does not fit into float16 scales.
    """
    row_bits = row_bits.to(weight.device)
    order = layout.row_order(row_bits)
    if config.refine:
        return _quantize_refined(weight, codebook.to(weight.device), row_bits, order.long(), config)
    thresholds, levels = codebook.to(weight.device).pack(order, row_bits)
    codes, absmax = torch.ops.bitsandbytes.lowra_quantize(
        weight, order, thresholds, *row_counts(row_bits), config.group_size
    )
    scales, steps = store_scales(absmax, config.scales)
    return PackedWeight(codes, row_bits, scales, steps, levels, weight.shape[1], config.group_size)


def _quantize_refined(weight, codebook, row_bits, order, config) -> PackedWeight:
    """Scales and levels by least squares, then the codes nearest under what is stored of them."""
    segments = layout.segments(len(order), *row_counts(row_bits))
    segments = [(bits, first, end) for bits, first, end in segments if end > first]
    rows = [order[first:end] for _, first, end in segments]
    groups = layout.group_count(weight.shape[1], config.group_size)
    tables, scales = [], []
    for (bits, _, _), members in zip(segments, rows, strict=True):
        part = weight[members].float()
        padded = torch.nn.functional.pad(part, (0, -part.shape[1] % config.group_size))
        absmax = padded.view(len(part), groups, config.group_size).abs().amax(dim=2)
        start = codebook.levels[members, LEVELS[bits]]
        levels, fitted = refine(part, start, absmax, config.group_size, config.refine)
        tables.append(levels.half())
        scales.append(fitted)
    stored, steps = store_scales(torch.cat(scales), config.scales)
    decoded = decode_scales(stored, steps).split([len(members) for members in rows])
    codes = []
    for (bits, _, _), members, table, scale in zip(segments, rows, tables, decoded, strict=True):
        nearest = nearest_codes(weight[members].float(), table.float(), scale, config.group_size)
        codes.append(pack_codes(nearest, bits, layout.row_bytes(weight.shape[1], bits)).reshape(-1))
    levels = torch.cat([table.reshape(-1) for table in tables])
    return PackedWeight(torch.cat(codes), row_bits, stored, steps, levels, weight.shape[1], config.group_size)


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


def stored_bits(out_features: int, in_features: int, bits: int, config: LowRAConfig) -> float:
    """True bits of one channel of `bits` bits, shared scale steps in proportion. What a true budget counts."""
    groups = layout.group_count(in_features, config.group_size)
    per_scale = {"double_quant": 8, "float16": 16, "float32": 32}[config.scales]
    steps = 32 * layout.scale_step_count(out_features, in_features, config.group_size) / out_features
    scale_bits = per_scale * groups + (steps if config.scales == "double_quant" else 0)
    return 8 * layout.row_bytes(in_features, bits) + scale_bits + 16 * 2**bits + 8
