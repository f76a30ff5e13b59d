"""The specification: quantise, dequantise and product of the packed format in plain PyTorch.

Native kernels are tested against these functions bit for bit. They run on any device and serve where no kernel exists.
"""

from collections.abc import Iterator

import torch

from . import layout

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
    code_start = threshold_start = 0
    for bits, first, end in layout.segments(rows, rows_4bit, rows_2bit):
        stride, cuts = layout.row_bytes(in_features, bits), 2**bits - 1
        for start, stop in _row_slices(first, end, in_features):
            count = stop - start
            normal = weight[row_order[start:stop].long()].float()
            normal = torch.nn.functional.pad(normal, (0, groups * group_size - in_features))
            normal = normal.view(count, groups, group_size)
            absmax[start:stop] = normal.abs().amax(dim=2)
            code = torch.zeros(normal.shape, dtype=torch.uint8, device=weight.device)
            table = thresholds[threshold_start : threshold_start + count * cuts].view(count, 1, cuts)
            for cut in range(cuts):
                code += normal > (table[:, :, cut] * absmax[start:stop])[:, :, None]
            packed = pack_codes(code.view(count, -1)[:, :in_features], bits, stride)
            codes[code_start : code_start + count * stride] = packed.reshape(-1)
            code_start += count * stride
            threshold_start += count * cuts
    return codes, absmax


def dequantize(
    codes: torch.Tensor,
    row_order: torch.Tensor,
    scales: torch.Tensor,
    scale_steps: torch.Tensor | None,
    levels: torch.Tensor,
    rows_4bit: int,
    rows_2bit: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dense weight [N, K] of `dtype`, rows in the order of W (LowRA, appendix A.2).

    Args:
        codes: uint8 [bytes], packed order.
        row_order: int32 [N], packed row -> row of W.
        scales: float32, float16 or uint8 [N, groups], packed order; see `decode_scales`.
        scale_steps: float32 [blocks] for uint8 scales, else None.
        levels: float16, packed order, 16, 4 or 2 for each row of 4, 2 or 1 bits.
    """
    rows = row_order.numel()
    groups = layout.group_count(in_features, group_size)
    absmax = decode_scales(scales, scale_steps).view(rows, groups)
    out = torch.empty(rows, in_features, dtype=dtype, device=codes.device)
    for bits, part, entries, code in rows_of_codes(codes, rows, rows_4bit, rows_2bit, in_features):
        normal = torch.gather(levels[entries].view(-1, 2**bits).float(), 1, code.long())
        scale = absmax[part].repeat_interleave(group_size, dim=1)[:, :in_features]
        out[row_order[part].long()] = (normal * scale).to(dtype)
    return out


def rows_of_codes(
    codes: torch.Tensor, rows: int, rows_4bit: int, rows_2bit: int, in_features: int
) -> Iterator[tuple[int, slice, slice, torch.Tensor]]:
    """Slices of a weight's rows, each of one precision, as: bits, rows in packed order, their entries of `levels`, and
    codes uint8 [rows of the slice, K].
    """
    code_start = entry = 0
    for bits, first, end in layout.segments(rows, rows_4bit, rows_2bit):
        stride = layout.row_bytes(in_features, bits)
        for start, stop in _row_slices(first, end, in_features):
            count = stop - start
            packed = codes[code_start : code_start + count * stride].view(count, stride)
            entries = slice(entry, entry + count * 2**bits)
            yield bits, slice(start, stop), entries, _unpack(packed, bits)[:, :in_features]
            code_start += count * stride
            entry = entries.stop


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    row_order: torch.Tensor,
    scales: torch.Tensor,
    scale_steps: torch.Tensor | None,
    levels: torch.Tensor,
    bias: torch.Tensor | None,
    rows_4bit: int,
    rows_2bit: int,
    group_size: int,
) -> torch.Tensor:
    """x [..., K] times the transposed packed weight [N, K], plus bias: [..., N], in the dtype of x."""
    weight = dequantize(
        codes, row_order, scales, scale_steps, levels, rows_4bit, rows_2bit, x.shape[-1], group_size, x.dtype
    )
    return torch.nn.functional.linear(x, weight, bias)


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
    padded = torch.nn.functional.pad(flat, (0, blocks * layout.SCALE_BLOCK - flat.numel())).view(blocks, -1)
    steps = padded.amax(dim=1) / (255.0 * 255.0)
    ratio = torch.where(steps[:, None] > 0, padded / steps[:, None], torch.zeros_like(padded))
    code = ratio.sqrt().round().clamp(max=255.0)
    # A group that holds anything keeps a scale above 0.
    code = torch.where((padded > 0) & (steps[:, None] > 0), code.clamp(min=1.0), code)
    return code.to(torch.uint8).view(-1)[: flat.numel()].view(absmax.shape), steps


def decode_scales(scales: torch.Tensor, scale_steps: torch.Tensor | None) -> torch.Tensor:
    """float32 scales, of the shape of `scales`, from any of the three storages."""
    if scale_steps is None:
        return scales.float()
    root = scales.reshape(-1).float()
    step = scale_steps.repeat_interleave(layout.SCALE_BLOCK)[: root.numel()]
    return (root * root * step).view(scales.shape)


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
