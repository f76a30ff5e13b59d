"""lowra_table_gradients against sums in double precision."""

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import layout, reference

OPS = torch.ops.bitsandbytes
# rows of 4, 2 and 1 bits, K, group size
SHAPES = [
    (3, 5, 9, 256, 64),
    (1, 0, 0, 200, 64),
    (0, 1, 0, 8, 8),
    (0, 0, 1, 7, 64),
    (2, 3, 0, 1001, 24),
    (0, 40, 70, 4096, 128),
    (5, 0, 6, 2080, 256),
    (1, 1, 1, 11008, 64),
]
SCALES = [torch.float32, torch.float16, torch.uint8]


def arguments_of(case):
    return *case.packed.tensors, case.rows_4bit, case.rows_2bit, case.group_size


def sums_in_double(gradient, case):
    """Gradients, and the sums of magnitudes that bound the rounding of any order of additions."""
    rows, columns = case.weight.shape
    wide = reference.decode_scales(case.scales, case.scale_steps).double()
    wide = wide.repeat_interleave(case.group_size, dim=1)[:, :columns]
    groups = (torch.arange(columns) // case.group_size).expand(rows, -1)
    found = []
    for part in (gradient.double(), gradient.double().abs()):
        for_levels, normal = [], torch.empty(rows, columns, dtype=torch.float64)
        for bits, own, entries, code in reference.rows_of_codes(case.packed):
            scaled = part[case.row_order[own].long()] * wide[own]
            table = torch.zeros(len(code), 2**bits, dtype=torch.float64)
            for_levels.append(table.scatter_add_(1, code.long(), scaled).view(-1))
            normal[own] = case.levels[entries].double().view(-1, 2**bits).gather(1, code.long())
        normal = normal if part.min() < 0 else normal.abs()
        for_scales = torch.zeros(rows, layout.group_count(columns, case.group_size), dtype=torch.float64)
        for_scales.scatter_add_(1, groups, part[case.row_order.long()] * normal)
        found.append((torch.cat(for_levels), for_scales))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", range(len(SHAPES)))
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_equals_sums_in_double_precision(device, number, dtype, magnitude):
    *counts, columns, group_size = SHAPES[number]
    case = packed_case(*counts, columns, group_size, scales=SCALES[number % 3], seed=number)
    gradient = torch.randn(case.weight.shape, generator=torch.Generator().manual_seed(number)) * magnitude
    gradient[0, 0] = -magnitude  # of both signs, whatever the shape
    gradient = gradient.to(dtype)
    exact, sizes = sums_in_double(gradient, case)
    found = OPS.lowra_table_gradients(gradient.to(device), *arguments_of(case.to(device)), True)
    for actual, wanted, size in zip(found, exact, sizes, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == wanted.shape
        assert ((actual.cpu() - wanted).abs() <= 2e-5 * size + 1e-30).all()
    again, none = OPS.lowra_table_gradients(gradient.to(device), *arguments_of(case.to(device)), False)
    assert torch.equal(again, found[0]) and none.numel() == 0


def test_rows_apart_in_memory_and_long_rows(device):
    """Gradients that are a part of a larger tensor, and rows with more groups than the kernel takes."""
    case = packed_case(2, 2, 3, 520, seed=1).to(device)
    large = torch.randn(7, 1040, device=device)
    found = OPS.lowra_table_gradients(large[:, 3:523], *arguments_of(case), True)
    expected = OPS.lowra_table_gradients(large[:, 3:523].contiguous(), *arguments_of(case), True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    case = packed_case(0, 1, 1, 98_400, seed=2)
    gradient = torch.randn(2, 98_400)
    exact, sizes = sums_in_double(gradient, case)
    found = OPS.lowra_table_gradients(gradient.to(device), *arguments_of(case.to(device)), True)
    for actual, wanted, size in zip(found, exact, sizes, strict=True):
        assert ((actual.cpu() - wanted).abs() <= 2e-5 * size).all()


def test_opcheck(device):
    case = packed_case(1, 2, 3, 136, seed=5, scales=torch.uint8).to(device)
    gradient = torch.randn(6, 136, device=device)
    for with_scales in (True, False):
        torch.library.opcheck(OPS.lowra_table_gradients.default, (gradient, *arguments_of(case), with_scales))


def test_other_shapes_are_refused(device):
    case = packed_case(1, 2, 3, 136, seed=5).to(device)
    with pytest.raises(RuntimeError, match="gradient must be floating point"):
        OPS.lowra_table_gradients(torch.randn(5, 136, device=device), *arguments_of(case), True)
    with pytest.raises(RuntimeError, match="codes must be"):
        OPS.lowra_table_gradients(torch.randn(6, 300, device=device), *arguments_of(case), True)
