"""Packed weights cut and joined: some of the rows, some of the columns, or several weights one below the other.

What comes out dequantises to the same numbers, bit for bit. 8-bit scales share a step with 256 neighbours in packed
order, and beside other neighbours they would stand for other numbers: a cut, or rows sorted anew, makes float32 scales
of them, 24 bits more for every `group_size` weights. To encode them again would take no more room, and be inexact.
"""

import math
from collections.abc import Sequence

import torch

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.reference import decode_scales, pack_codes, rows_of_codes

from .packed import PackedWeight


def take_rows(weight: PackedWeight, rows: torch.Tensor) -> PackedWeight:
    """Some rows of a packed weight [N, K], in the order given.

    Args:
        weight: the packed weight.
        rows: int64 [M], none of them twice.
    """
    if rows.numel() == weight.row_bits.numel() and bool((rows.diff() == 1).all()):
        return weight
    old_order = layout.row_order(weight.row_bits).long()
    place_of = torch.empty_like(old_order)
    place_of[old_order] = torch.arange(old_order.numel())
    row_bits = weight.row_bits[rows]
    places = place_of[rows[layout.row_order(row_bits).long()]]  # where each row stands in the old packed order
    codes, levels = [], []
    for segment in weight.segments():
        own = places[(places >= segment.first) & (places < segment.end)] - segment.first
        span = segment.first, segment.end
        codes.append(weight.weight[segment.codes_of(*span)].view(-1, segment.row_bytes)[own].reshape(-1))
        levels.append(weight.levels[segment.levels_of(*span)].view(-1, 2**segment.bits)[own].reshape(-1))
    return PackedWeight(
        weight=torch.cat(codes),
        row_bits=row_bits,
        scales=_free_scales(weight)[places],
        scale_steps=None,
        levels=torch.cat(levels),
        in_features=weight.in_features,
        group_size=weight.group_size,
    )


def take_columns(weight: PackedWeight, first: int, count: int) -> PackedWeight:
    """The columns [first, first + count) of a packed weight [N, K].

    Where the cut goes through a group, smaller groups that repeat its scale stand for it: groups of 64 become groups of
    32 for a cut at 1376.

    Raises:
        ValueError: the cut is at no multiple of 8, the smallest group.
    """
    if count == weight.in_features:
        return weight
    group_size = math.gcd(weight.group_size, first)  # gcd(g, 0) is g
    if group_size % 8:
        raise ValueError(
            f"A packed weight of {weight.in_features} columns cannot be cut at column {first}: a cut takes a multiple "
            "of 8."
        )
    groups = (first + torch.arange(0, count, group_size)) // weight.group_size
    codes = [
        pack_codes(code[:, first : first + count], bits, layout.row_bytes(count, bits)).reshape(-1)
        for bits, _, _, code in rows_of_codes(weight.matrix())
    ]
    return PackedWeight(
        weight=torch.cat(codes),
        row_bits=weight.row_bits,
        scales=_free_scales(weight)[:, groups],
        scale_steps=None,
        levels=weight.levels,
        in_features=count,
        group_size=group_size,
    )


def join(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Packed weights of as many columns one below the other, their rows sorted by precision again.

    Raises:
        ValueError: they have different numbers of columns, group sizes or storages of scales.
    """
    one, *others = weights
    if not others:
        return one
    forms = {(weight.in_features, weight.group_size, weight.scales.dtype) for weight in weights}
    if len(forms) > 1:
        raise ValueError(f"Packed weights of different (columns, group size, scales) cannot be joined: {forms}.")
    codes, levels, scales = [], [], []
    # Sorting is stable: the rows of a precision stay in the order of the weights that they come from.
    for segments in zip(*(weight.segments() for weight in weights), strict=True):
        for weight, segment in zip(weights, segments, strict=True):
            span = segment.first, segment.end
            codes.append(weight.weight[segment.codes_of(*span)])
            levels.append(weight.levels[segment.levels_of(*span)])
            scales.append(_free_scales(weight)[slice(*span)])
    return PackedWeight(
        weight=torch.cat(codes),
        row_bits=torch.cat([weight.row_bits for weight in weights]),
        scales=torch.cat(scales),
        scale_steps=None,
        levels=torch.cat(levels),
        in_features=one.in_features,
        group_size=one.group_size,
    )


def _free_scales(weight: PackedWeight) -> torch.Tensor:
    """Scales [N, groups] that mean the same wherever they stand."""
    if weight.scale_steps is None:
        return weight.scales
    return decode_scales(weight.scales, weight.scale_steps)
