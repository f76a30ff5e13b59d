"""The specification: quantise, dequantise and product of the packed format in plain PyTorch.

Native kernels are tested against these functions bit for bit. They run on any device and serve where no kernel exists.
"""

from collections.abc import Iterator

import torch

from . import layout
from .layout import PackedMatrix

# Rows are handled in slices of about this many weights, so that the temporaries stay small beside the weight.
_SLICE_WEIGHTS = 1 << 22


def quantize(
    weight: torch.Tensor,
    row_order: torch.Tensor,
    thresholds: torch.Tensor,
    rows_4bit: int,
    rows_2bit: int,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a dense weight (LowRA, appendix A.1).

    Args:
        weight: floating point [N, K].
        row_order: int32 [N], packed row -> row of `weight`.
        thresholds: float32, packed order, 15, 3 or 1 ascending cut points for each row of 4, 2 or 1 bits.
        rows_4bit, rows_2bit: rows of these precisions; the rest have 1 bit.
        group_size: weights that share a scale.

    Returns:
        codes uint8 [bytes] and absmax float32 [N, groups], both in packed order. A code is the number of thresholds t
        with t * absmax < w.
    """
    rows, in_features = weight.shape
    groups = layout.group_count(in_features, group_size)
    codes = torch.zeros(
        layout.codes_size(rows, rows_4bit, rows_2bit, in_features), dtype=torch.uint8, device=weight.device
    )
    absmax = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
    for segment in layout.segments(rows, rows_4bit, rows_2bit, in_features):
        bits, cuts = segment.bits, 2**segment.bits - 1
        for start, stop in _row_slices(segment.first, segment.end, in_features):
            count = stop - start
            normal = weight[row_order[start:stop].long()].float()
            normal = torch.nn.functional.pad(normal, (0, groups * group_size - in_features))
            normal = normal.view(count, groups, group_size)
            absmax[start:stop] = normal.abs().amax(dim=2)
            code = torch.zeros(normal.shape, dtype=torch.uint8, device=weight.device)
            table = thresholds[segment.thresholds_of(start, stop)].view(count, 1, cuts)
            for cut in range(cuts):
                code += normal > (table[:, :, cut] * absmax[start:stop])[:, :, None]
            packed = pack_codes(code.view(count, -1)[:, :in_features], bits, segment.row_bytes)
            codes[segment.codes_of(start, stop)] = packed.reshape(-1)
    return codes, absmax


def dequantize(packed: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Dense weight [N, K] of `dtype`, rows in the order of W (LowRA, appendix A.2)."""
    groups = layout.group_count(packed.in_features, packed.group_size)
    absmax = decode_scales(packed.scales, packed.scale_steps).view(packed.rows, groups)
    out = torch.empty(packed.rows, packed.in_features, dtype=dtype, device=packed.codes.device)
    for bits, part, entries, code in rows_of_codes(packed):
        normal = torch.gather(packed.levels[entries].view(-1, 2**bits).float(), 1, code.long())
        scale = absmax[part].repeat_interleave(packed.group_size, dim=1)[:, : packed.in_features]
        out[packed.row_order[part].long()] = (normal * scale).to(dtype)
    return out


def linear_in_integers(x: torch.Tensor, packed: PackedMatrix) -> torch.Tensor:
    """x [T, K] times the transposed packed weight [N, K] as the processor's kernels do it that round x: float64 [T, N].

    Rows of 1 bit are multiplied with x in 13 bits, q * step with |q| <= 4095 and a step for min(group_size, 128)
    columns; those of 2 and 4 bits with x in 8 bits, |q| <= 127 and a step for 16 columns, and their levels lie on a
    grid of 128 or of 4096 numbers from the row's least one to its largest.
    """
    fine, coarse = rounded(x, min(packed.group_size, 128), 4095).double(), rounded(x, 16, 127).double()
    levels, spread = packed.levels.float().clone(), {2: 127, 4: 4095}
    for segment in packed.segments():
        if segment.bits in spread:
            own = levels[segment.levels_of(segment.first, segment.end)].view(-1, 2**segment.bits)
            least = own.amin(dim=1, keepdim=True)
            above, reach = own - least, own.amax(dim=1, keepdim=True) - least
            q = (above * _quotient(spread[segment.bits], reach)).round()
            own[:] = least + q * (reach / spread[segment.bits])
    weight = dequantize(packed._replace(levels=levels), torch.float32).double()
    one = torch.zeros(packed.rows, dtype=torch.bool, device=x.device)
    one[packed.row_order[packed.rows_4bit + packed.rows_2bit :].long()] = True
    return torch.where(one, fine @ weight.T, coarse @ weight.T)


def rounded(x: torch.Tensor, columns: int, most: int) -> torch.Tensor:
    """x [T, K] on a grid of 2 most + 1 numbers for each so many columns, from -max |x| to max |x|: float32."""
    tokens, in_features = x.shape
    parts = torch.nn.functional.pad(x.float(), (0, -in_features % columns)).view(tokens, -1, columns)
    largest = parts.abs().amax(dim=2, keepdim=True)
    q = (parts * _quotient(most, largest)).round()
    return (q * (largest / most)).view(tokens, -1)[:, :in_features]


def _quotient(number: int, divisor: torch.Tensor) -> torch.Tensor:
    """Rounded once: `number / divisor` is a product with a reciprocal in PyTorch. A divisor of 0 counts as 1."""
    return torch.full_like(divisor, number) / divisor.where(divisor > 0, 1)


def rows_of_codes(packed: PackedMatrix) -> Iterator[tuple[int, slice, slice, torch.Tensor]]:
    """Slices of a weight's rows, each of one precision, as: bits, rows in packed order, their entries of `levels`, and
    codes uint8 [rows of the slice, K].
    """
    for segment in packed.segments():
        for start, stop in _row_slices(segment.first, segment.end, packed.in_features):
            own = packed.codes[segment.codes_of(start, stop)].view(stop - start, segment.row_bytes)
            code = _unpack(own, segment.bits)[:, : packed.in_features]
            yield segment.bits, slice(start, stop), segment.levels_of(start, stop), code


def encode_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit double quantisation of the group scales: absmax ~ c * c * step, one float32 step per 256 scales.

    The square spends the codes where small scales lie: a scale at 1 % of its block's largest is still met within 4 %,
    where a linear code would be 20 % off. An absmax of 0 stays exactly 0.

    Args:
        absmax: float32 [N, groups].

    Returns:
        uint8 [N, groups] and float32 [blocks].
    """
    flat = absmax.reshape(-1)
    blocks = (flat.numel() + layout.SCALE_BLOCK - 1) // layout.SCALE_BLOCK
    padded = torch.nn.functional.pad(flat, (0, blocks * layout.SCALE_BLOCK - flat.numel()))
    padded = padded.view(blocks, layout.SCALE_BLOCK)
    steps = padded.amax(dim=1) / (255.0 * 255.0)
    ratio = torch.where(steps[:, None] > 0, padded / steps[:, None], torch.zeros_like(padded))
    code = ratio.sqrt().round().clamp(max=255.0)
    # A group that holds anything keeps a scale above 0.
    code = torch.where((padded > 0) & (steps[:, None] > 0), code.clamp(min=1.0), code)
    return code.to(torch.uint8).view(-1)[: flat.numel()].view(absmax.shape), steps


def decode_scales(
    scales: torch.Tensor, scale_steps: torch.Tensor | None, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 scales from any of the three storages.

    Args:
        scales: float32, float16 or uint8 [N, groups], packed order.
        scale_steps: float32 [blocks] for uint8 scales, else None.
        rows: int64 [T], the packed rows that are wanted; all where None.

    Returns:
        [T, groups], or the shape of `scales`.
    """
    root = (scales if rows is None else scales[rows]).float()
    if scale_steps is None:
        return root
    if rows is None:
        step = scale_steps.repeat_interleave(layout.SCALE_BLOCK)[: root.numel()].view(root.shape)
    else:
        groups = scales.shape[1]
        step = scale_steps[(rows[:, None] * groups + torch.arange(groups, device=rows.device)) // layout.SCALE_BLOCK]
    return root * root * step


def _row_slices(first: int, end: int, in_features: int) -> Iterator[tuple[int, int]]:
    step = max(1, _SLICE_WEIGHTS // max(1, in_features))
    for start in range(first, end, step):
        yield start, min(start + step, end)


def pack_codes(code: torch.Tensor, bits: int, stride: int) -> torch.Tensor:
    """uint8 codes [rows, K] to bytes [rows, stride], first code in the lowest bits."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(code, (0, stride * per_byte - code.shape[1])).view(code.shape[0], stride, per_byte)
    packed = padded[:, :, 0].clone()
    for place in range(1, per_byte):
        packed |= padded[:, :, place] << (place * bits)
    return packed


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack_codes`: uint8 codes [rows, stride * 8 / bits]."""
    places = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(places, dim=2).view(packed.shape[0], -1)
