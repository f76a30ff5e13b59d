"""Packed values against the simulated quantisation, which sees no bytes: equal exactly, and all bytes counted."""

import pytest
import torch

from bitsandbytes.backends.lowra.lloyd import LEVELS, THRESHOLDS
from bitsandbytes.backends.lowra.reference import decode_scales, encode_scales
from lowra import LowRAConfig
from lowra.quantization.learner import learn_codebook
from lowra.quantization.pack import quantize_matrix
from lowra.weights.packed import channel_bits, store_scales


def simulated(weight, codebook, row_bits, config) -> torch.Tensor:
    """Every weight replaced by its level times its stored scale, row by row in the order of the matrix."""
    out = torch.empty_like(weight)
    groups = list(weight.split(config.group_size, 1))
    absmax = torch.stack([part.abs().amax(1) for part in groups], 1)
    order = torch.cat([torch.nonzero(row_bits == bits)[:, 0] for bits in (4, 2, 1)])
    scales = torch.empty_like(absmax)
    scales[order] = decode_scales(*store_scales(absmax[order], config.scales))  # blocks of 256 lie in packed order
    for row in range(weight.shape[0]):
        bits = int(row_bits[row])
        cuts, levels = codebook.thresholds[row, THRESHOLDS[bits]], codebook.levels[row, LEVELS[bits]].half().float()
        for place, part in enumerate(groups):
            code = (part[row][:, None] > (cuts * absmax[row, place])[None, :]).sum(1)
            first = place * config.group_size
            out[row, first : first + part.shape[1]] = levels[code] * scales[row, place]
    return out


@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(40, 200, 64), (17, 64, 64), (33, 136, 32)])
def test_dequantised_values_are_the_simulated_ones(scales, rows, columns, group_size):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    weight[2] = 0
    config = LowRAConfig(scales=scales, group_size=group_size)
    codebook = learn_codebook(weight, config)
    row_bits = torch.tensor([4, 2, 1], dtype=torch.uint8)[torch.randint(3, (rows,), generator=generator)]
    packed = quantize_matrix(weight, codebook, row_bits, config)
    assert (packed.dequantize() == simulated(weight, codebook, row_bits, config)).all()


@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
def test_stored_bits_are_the_bytes(scales):
    config = LowRAConfig(scales=scales)
    weight = torch.randn(48, 176, generator=torch.Generator().manual_seed(0))
    row_bits = torch.tensor([4, 2, 1] * 16, dtype=torch.uint8)
    packed = quantize_matrix(weight, learn_codebook(weight, config), row_bits, config)
    assert packed.stored_bits == 8 * sum(tensor.nbytes for tensor in packed.tensors().values())
    assert int(packed.row_bits.sum()) * packed.in_features == 16 * (4 + 2 + 1) * 176
    assert packed.stored_bits == pytest.approx(16 * sum(channel_bits(48, 176, bits, config) for bits in (4, 2, 1)))


def test_scale_codes_are_within_four_percent_at_a_hundredth_of_the_largest():
    absmax = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) * 0.99 + 0.01
    absmax[0, 0] = 0
    decoded = decode_scales(*encode_scales(absmax))
    assert decoded[0, 0] == 0
    kept = absmax > 0
    assert ((decoded - absmax).abs()[kept] / absmax[kept]).max() < 0.04


def test_scales_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="use scales=float32"):
        store_scales(torch.tensor([[1e5]]), "float16")
