"""lowra_lloyd_max against `lloyd.lloyd_max` on the CPU: levels, thresholds and errors to float32 rounding."""

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import lloyd

SHAPES = [(1, 64, 64), (5, 200, 64), (3, 1001, 32), (4, 4096, 64), (2, 9000, 128), (6, 104, 24), (1, 28672, 64)]
SHAPES += [(2, 60006, 64)]  # longer than a block's shared memory on any GPU


def initial():
    parts = [torch.linspace(-1, 1, entries) for entries in (16, 4, 2)]
    return torch.cat(parts), torch.cat([(part[1:] + part[:-1]) / 2 for part in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_lloyd_max_equals_the_specification(device, shape, squared, dtype):
    rows, in_features, group_size = shape
    weight = packed_case(0, 0, rows, in_features, group_size, dtype=dtype, seed=in_features).weight
    levels, cuts = initial()
    expected = lloyd.lloyd_max(weight, levels, cuts, group_size, 20, squared)
    found = torch.ops.bitsandbytes.lowra_lloyd_max(
        weight.to(device), levels.to(device), cuts.to(device), None, group_size, 20, squared
    )
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=2e-5, atol=2e-6)


def test_no_iterations_keep_the_initial_codebook(device):
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    levels, cuts = initial()
    out = torch.ops.bitsandbytes.lowra_lloyd_max(
        weight.to(device), levels.to(device), cuts.to(device), None, 64, 0, True
    )
    assert torch.equal(out[0].cpu(), levels.expand(3, -1)) and torch.equal(out[1].cpu(), cuts.expand(3, -1))
    expected = lloyd.lloyd_max(weight, levels, cuts, 64, 0, True)[2]
    torch.testing.assert_close(out[2].cpu(), expected, rtol=2e-5, atol=0)


def test_repeats_bit_for_bit(device):
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    levels, cuts = (tensor.to(device) for tensor in initial())
    runs = [torch.ops.bitsandbytes.lowra_lloyd_max(weight, levels, cuts, None, 64, 20, True) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
