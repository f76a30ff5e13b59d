"""One weight to packed bits: the step from a codebook and assigned precisions to the tensors of packed format 1."""

import torch

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.lloyd import LEVELS
from bitsandbytes.backends.lowra.reference import decode_scales, pack_codes

from ..config import LowRAConfig
from ..weights.codebook import Codebook
from ..weights.packed import PackedWeight, row_counts, store_scales
from .refine import nearest_codes, refine


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


def _quantize_refined(
    weight: torch.Tensor, codebook: Codebook, row_bits: torch.Tensor, order: torch.Tensor, config: LowRAConfig
) -> PackedWeight:
    """Scales and levels by least squares, then the codes nearest under what is stored of them."""
    segments = layout.segments(len(order), *row_counts(row_bits), weight.shape[1])
    segments = [segment for segment in segments if segment.end > segment.first]
    rows = [order[segment.first : segment.end] for segment in segments]
    groups = layout.group_count(weight.shape[1], config.group_size)
    tables, scales = [], []
    for segment, members in zip(segments, rows, strict=True):
        part = weight[members].float()
        padded = torch.nn.functional.pad(part, (0, -part.shape[1] % config.group_size))
        absmax = padded.view(len(part), groups, config.group_size).abs().amax(dim=2)
        start = codebook.levels[members, LEVELS[segment.bits]]
        levels, fitted = refine(part, start, absmax, config.group_size, config.refine)
        tables.append(levels.half())
        scales.append(fitted)
    stored, steps = store_scales(torch.cat(scales), config.scales)
    decoded = decode_scales(stored, steps).split([len(members) for members in rows])
    codes = []
    for segment, members, table, scale in zip(segments, rows, tables, decoded, strict=True):
        nearest = nearest_codes(weight[members].float(), table.float(), scale, config.group_size)
        codes.append(pack_codes(nearest, segment.bits, segment.row_bytes).reshape(-1))
    levels = torch.cat([table.reshape(-1) for table in tables])
    return PackedWeight(torch.cat(codes), row_bits, stored, steps, levels, weight.shape[1], config.group_size)
