"""Least-squares scales and levels: never more error, the same bytes, and the packed values are those fitted."""

import pytest
import torch

from lowra import LowRAConfig
from lowra.quantization.learner import learn_codebook
from lowra.quantization.pack import quantize_matrix
from lowra.quantization.refine import nearest_codes, refine
from lowra.weights.groups import widen


def matrix(rows=48, columns=200, seed=0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight, levels, scales, group_size=64) -> float:
    codes = nearest_codes(weight, levels, scales, group_size).long()
    return float((weight - levels.gather(1, codes) * widen(scales, group_size, weight.shape[1])).square().sum())


@pytest.mark.parametrize("count", [2, 4, 16])
def test_error_never_rises(count):
    weight = matrix()
    levels = torch.linspace(-1, 1, count).repeat(48, 1)
    scales = torch.stack([part.abs().amax(1) for part in weight.split(64, 1)], 1)
    before = error(weight, levels, scales)
    for _ in range(6):
        levels, scales = refine(weight, levels, scales, 64, 1)
        assert (levels.diff(dim=1) >= 0).all()
        assert (scales >= 0).all()
        assert error(weight, levels, scales) <= before * (1 + 1e-5)
        before = error(weight, levels, scales)


@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
def test_packed_in_the_same_bytes_with_less_error(scales):
    weight = matrix()
    weight[3] = 0
    weight[4, :64] = 0
    plain, refined = LowRAConfig(scales=scales), LowRAConfig(scales=scales, refine=4)
    codebook = learn_codebook(weight, plain)
    row_bits = torch.tensor([4, 2, 1] * 16, dtype=torch.uint8)
    first = quantize_matrix(weight, codebook, row_bits, plain)
    second = quantize_matrix(weight, codebook, row_bits, refined)
    for name, tensor in first.tensors().items():
        assert tensor.shape == second.tensors()[name].shape
        assert tensor.dtype == second.tensors()[name].dtype
    before = (weight - first.dequantize()).square().sum(1)
    after = (weight - second.dequantize()).square().sum(1)
    assert after.sum() < 0.97 * before.sum()
    assert (second.dequantize()[3] == 0).all()
    for bits in (4, 2, 1):
        assert after[row_bits == bits].sum() < before[row_bits == bits].sum()


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_one_precision_alone(bits):
    weight = matrix(rows=5, columns=72)
    config = LowRAConfig(refine=2)
    row_bits = torch.full((5,), bits, dtype=torch.uint8)
    packed = quantize_matrix(weight, learn_codebook(weight, config), row_bits, config)
    assert (weight - packed.dequantize()).norm() < weight.norm()


def test_fixed_levels_cannot_be_refined():
    with pytest.raises(ValueError, match="refine=0"):
        LowRAConfig(codebook="normal_float", refine=2)
