"""Packed weights cut and joined hold the numbers of the dense weight cut and joined, bit for bit."""

import pytest
import torch

from lowra import LowRAConfig
from lowra.nn.linear import LowRALinear
from lowra.quantization.learner import learn_codebook
from lowra.quantization.pack import quantize_matrix
from lowra.weights.cutting import join, take_columns, take_rows

STORAGES = ["double_quant", "float16", "float32"]


def packed(rows, columns, scales="double_quant", group_size=64, menu=(4, 2, 1), seed=0):
    """A random weight [rows, columns] whose rows have precisions of the menu."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    config = LowRAConfig(scales=scales, group_size=group_size)
    row_bits = torch.tensor(menu, dtype=torch.uint8)[torch.randint(len(menu), (rows,), generator=generator)]
    return quantize_matrix(weight, learn_codebook(weight, config), row_bits, config)


@pytest.mark.parametrize("scales", STORAGES)
@pytest.mark.parametrize("menu", [(4, 2, 1), (2,), (4, 1)])
def test_rows(scales, menu):
    weight = packed(70, 200, scales, menu=menu)
    dense = weight.dequantize()
    for rows in (torch.arange(35), torch.arange(35, 70), torch.tensor([69, 3, 40, 41]), torch.arange(70).flip(0)):
        part = take_rows(weight, rows)
        assert torch.equal(part.dequantize(), dense[rows])
        LowRALinear.from_packed(part)  # it is checked there
    assert take_rows(weight, torch.arange(70)) is weight


@pytest.mark.parametrize("scales", STORAGES)
@pytest.mark.parametrize(
    ("columns", "group_size", "parts"), [(256, 64, 2), (176, 64, 2), (352, 64, 4), (200, 8, 5), (512, 256, 2)]
)
def test_columns(scales, columns, group_size, parts):
    """Among them cuts through groups: 176 columns in groups of 64 are cut at 88."""
    weight = packed(40, columns, scales, group_size)
    dense, count = weight.dequantize(), columns // parts
    for first in range(0, columns, count):
        part = take_columns(weight, first, count)
        assert torch.equal(part.dequantize(), dense[:, first : first + count])
        LowRALinear.from_packed(part)
    assert take_columns(weight, 0, columns) is weight


def test_columns_cut_within_a_byte_are_refused():
    weight = packed(40, 200)
    with pytest.raises(ValueError, match="200 columns cannot be cut at column 100: a cut takes a multiple of 8"):
        take_columns(weight, 100, 100)


@pytest.mark.parametrize("scales", STORAGES)
def test_joined(scales):
    weights = [packed(70, 136, scales, seed=1), packed(33, 136, scales, menu=(1,), seed=2), packed(17, 136, scales)]
    whole = join(weights)
    assert torch.equal(whole.dequantize(), torch.cat([weight.dequantize() for weight in weights]))
    x = torch.randn(3, 136)
    alone = torch.cat([LowRALinear.from_packed(weight)(x) for weight in weights], dim=1)
    torch.testing.assert_close(LowRALinear.from_packed(whole)(x), alone)
    assert join(weights[:1]) is weights[0]


def test_cut_by_rows_and_columns_and_joined():
    """What a merged layer of two ranks does."""
    weights = [packed(64, 256, seed=3), packed(32, 256, seed=4)]
    dense = [weight.dequantize() for weight in weights]
    for rank in (0, 1):
        halves = [take_rows(w, torch.arange(n // 2) + rank * n // 2) for w, n in zip(weights, (64, 32), strict=True)]
        expected = torch.cat([d[rank * len(d) // 2 : (rank + 1) * len(d) // 2] for d in dense])
        assert torch.equal(join(halves).dequantize(), expected)
        assert torch.equal(take_columns(join(halves), 128, 128).dequantize(), expected[:, 128:])


def test_weights_that_cannot_be_joined_are_refused():
    with pytest.raises(ValueError, match="cannot be joined"):
        join([packed(16, 64), packed(16, 128)])
    with pytest.raises(ValueError, match="cannot be joined"):
        join([packed(16, 64), packed(16, 64, "float32")])
