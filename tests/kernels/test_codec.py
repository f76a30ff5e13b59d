"""Quantise, dequantise and scale encoding are bit-exact with the PyTorch reference on the CPU."""

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import reference

OPS = torch.ops.bitsandbytes
# rows of 4, 2 and 1 bits, in_features, group size: odd tails, one row, no rows of a precision, several blocks
SHAPES = [
    (0, 0, 1, 64, 64),
    (1, 0, 0, 8, 64),
    (0, 1, 0, 40, 32),
    (3, 5, 7, 200, 64),
    (2, 2, 2, 1001, 64),
    (1, 1, 1, 7, 32),
    (4, 0, 13, 1376, 128),
    (0, 9, 8, 2080, 256),
    (5, 6, 0, 4096, 64),
    (7, 20, 37, 1024, 64),
    (3, 3, 3, 104, 24),
    (3, 3, 3, 48, 8),
]
SCALES = [torch.float32, torch.float16, torch.uint8]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    assert torch.equal(actual.cpu().contiguous().view(view), expected.contiguous().view(view))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_equals_the_reference(device, shape, dtype):
    *mix, in_features, group_size = shape
    case = packed_case(*mix, in_features, group_size, dtype=dtype)
    codes, absmax = OPS.lowra_quantize(*case.to(device).quantize_arguments)
    same_bits(codes, case.codes)
    same_bits(absmax, case.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e30, 1e-30, 1e-39])
def test_quantize_of_huge_and_tiny_weights(device, magnitude, dtype):
    case = packed_case(3, 3, 3, 160, dtype=dtype, magnitude=magnitude)
    codes, absmax = OPS.lowra_quantize(*case.to(device).quantize_arguments)
    same_bits(codes, case.codes)
    same_bits(absmax, case.scales)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_counts_thresholds_in_any_order(device, dtype):
    case = packed_case(5, 5, 5, 320, dtype=dtype)
    thresholds = case.thresholds[torch.randperm(15 * 5 + 3 * 5 + 5, generator=torch.Generator().manual_seed(0))]
    expected, _ = reference.quantize(case.weight, case.row_order, thresholds, 5, 5, 64)
    moved = case.to(device)
    codes, _ = OPS.lowra_quantize(moved.weight, moved.row_order, thresholds.to(device), 5, 5, 64)
    same_bits(codes, expected)


def test_quantize_of_a_weight_that_is_not_aligned(device):
    case = packed_case(3, 3, 3, 160, dtype=torch.bfloat16)
    moved = case.to(device)
    buffer = torch.empty(case.weight.numel() + 1, dtype=torch.bfloat16, device=device)
    buffer[1:] = moved.weight.reshape(-1)
    moved.weight = buffer[1:].view(case.weight.shape)
    codes, absmax = OPS.lowra_quantize(*moved.quantize_arguments)
    same_bits(codes, case.codes)
    same_bits(absmax, case.scales)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_equals_the_reference(device, shape, scales, dtype):
    *mix, in_features, group_size = shape
    case = packed_case(*mix, in_features, group_size, scales=scales)
    out = OPS.lowra_dequantize(*case.to(device).dequantize_arguments(dtype))
    same_bits(out, reference.dequantize(case.packed, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_equals_that_of_the_whole(device, shape, dtype):
    *mix, in_features, group_size = shape
    case = packed_case(*mix, in_features, group_size, scales=torch.uint8)
    whole = reference.dequantize(case.packed, dtype)
    *packed, dtype = case.to(device).dequantize_arguments(dtype)
    rows = sum(mix)
    columns = {(0, in_features), (0, 1), (256, 100), (256, in_features - 256), (1024, 32)}
    for first_row, end_row in {(0, rows), (0, 1), (rows // 2, rows), (rows // 3, 2 * rows // 3)}:
        for first, count in columns:
            if count < 0 or first + count > in_features:
                continue
            part = first_row, end_row - first_row, first, count
            out = OPS.lowra_dequantize_part(*packed, *part, dtype)
            same_bits(out, whole[first_row:end_row, first : first + count].contiguous())


@pytest.mark.parametrize("part", [(0, 6, 32, 32), (0, 6, -256, 64), (0, 6, 0, 513), (3, 4, 0, 256), (-1, 2, 0, 256)])
def test_a_part_outside_the_weight_is_refused(device, part):
    *packed, dtype = packed_case(2, 2, 2, 512).to(device).dequantize_arguments(torch.float32)
    with pytest.raises(RuntimeError, match="must lie within .6, 512."):
        OPS.lowra_dequantize_part(*packed, *part, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("magnitude", [1e30, 1e-30, 1e-39])
def test_dequantize_of_huge_and_tiny_scales(device, magnitude, dtype):
    case = packed_case(3, 3, 3, 160, magnitude=magnitude)
    out = OPS.lowra_dequantize(*case.to(device).dequantize_arguments(dtype))
    same_bits(out, reference.dequantize(case.packed, dtype))


def test_arange_as_row_order_gives_the_packed_order(device):
    case = packed_case(4, 8, 20, 256).to(device)
    in_order = OPS.lowra_dequantize(*case.dequantize_arguments(torch.bfloat16))
    order, case.row_order = case.row_order, torch.arange(32, dtype=torch.int32, device=device)
    packed_order = OPS.lowra_dequantize(*case.dequantize_arguments(torch.bfloat16))
    assert torch.equal(in_order[order.long()], packed_order)


@pytest.mark.parametrize("shape", [(1, 1), (3, 85), (40, 64), (1, 256), (5, 411)])
def test_encoded_scales_equal_the_reference(device, shape):
    absmax = torch.rand(shape, generator=torch.Generator().manual_seed(1)).pow(4)
    absmax[torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.1] = 0
    absmax[0] *= 1e-20  # a block of tiny scales, or tiny ones beside large
    scales, steps = OPS.lowra_encode_scales(absmax.to(device))
    expected_scales, expected_steps = reference.encode_scales(absmax)
    same_bits(scales, expected_scales)
    same_bits(steps, expected_steps)


def test_no_rows(device):
    case = packed_case(0, 0, 1, 64).to(device)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    none = torch.empty(0, dtype=torch.uint8, device=device)
    levels, scales = torch.empty(0, dtype=torch.float16, device=device), torch.empty(0, 1, device=device)
    out = OPS.lowra_dequantize(none, empty, scales, None, levels, 0, 0, 64, 64, torch.bfloat16)
    assert out.shape == (0, 64)
    codes, absmax = OPS.lowra_quantize(case.weight[:0], empty, torch.empty(0, device=device), 0, 0, 64)
    assert codes.numel() == 0 and absmax.shape == (0, 1)
