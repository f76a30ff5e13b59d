"""Codes and levels for a layer's outputs: what they leave there, and the plain rounding they fall back to."""

import pytest
import torch

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.reference import decode_scales
from lowra import LowRAConfig
from lowra.quantization.feedback import feed_back, fit_levels, padded_levels, recode
from lowra.quantization.learner import learn_codebook
from lowra.quantization.loftq import initialize
from lowra.quantization.pack import quantize_matrix
from lowra.quantization.refine import nearest_codes
from lowra.weights.groups import widen

ROW_BITS = torch.tensor([1, 2, 4, 1, 1, 2, 2], dtype=torch.uint8)


def weight_and_moment(columns=136, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(ROW_BITS), columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    moment = inputs.T @ inputs / len(inputs)
    return weight, moment / moment.diagonal().mean() + 0.01 * torch.eye(columns)


def quantizer(weight, **options):
    config = LowRAConfig(**options)
    codebook = learn_codebook(weight, config)
    return lambda part: quantize_matrix(part, codebook, ROW_BITS, config)


def output_error(weight, packed, moment, extra=0.0) -> float:
    left = weight - packed.dequantize() - extra
    return float(((left @ moment) * left).sum())


@pytest.mark.parametrize("columns", [136, 64, 40, 300])
@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
def test_outputs_are_nearer_in_as_many_bits(columns, scales):
    weight, moment = weight_and_moment(columns)
    packed = quantizer(weight, scales=scales)(weight)
    recoded = recode(weight, packed, moment)
    assert output_error(weight, recoded, moment) < 0.85 * output_error(weight, packed, moment)
    assert recoded.stored_bits == packed.stored_bits
    assert torch.equal(recoded.row_bits, packed.row_bits) and torch.equal(recoded.scales, packed.scales)
    again = recode(weight, recoded, moment)
    assert output_error(weight, again, moment) <= output_error(weight, recoded, moment)


def in_packed_order(weight, packed):
    order = layout.row_order(packed.row_bits).long()
    wide = widen(decode_scales(packed.scales, packed.scale_steps), packed.group_size, packed.in_features)
    return weight[order], wide, padded_levels(packed)


def test_without_correlation_codes_are_the_nearest_and_levels_the_centroids():
    weight, _ = weight_and_moment()
    moment = torch.eye(weight.shape[1])
    packed = quantizer(weight)(weight)
    rows, wide, levels = in_packed_order(weight, packed)
    codes = feed_back(rows, levels, wide, moment)
    scales = decode_scales(packed.scales, packed.scale_steps)
    for segment in packed.segments():
        first, end = segment.first, segment.end
        own = levels[first:end, : 2**segment.bits]
        expected = nearest_codes(rows[first:end], own, scales[first:end], packed.group_size)
        assert torch.equal(codes[first:end], expected.long())
    fitted, same = fit_levels(rows, levels, codes, wide, moment)
    assert torch.equal(same, codes)
    for row in range(len(rows)):
        for code in codes[row].unique().tolist():
            cell = codes[row] == code
            mean = (rows[row] * wide[row])[cell].sum() / wide[row][cell].square().sum()
            assert float(fitted[row, code]) == pytest.approx(float(mean), rel=2e-3, abs=2e-3)


def test_codes_stay_inside_the_table_of_their_row():
    weight, moment = weight_and_moment()
    weight *= 1 + 9 * (torch.arange(weight.shape[1]) % 5 == 0)  # far beyond the outer levels of the others
    packed = quantizer(weight)(weight)
    rows, wide, levels = in_packed_order(3 * weight, packed)
    codes = feed_back(rows, levels, wide, moment)
    own = levels.isfinite().sum(dim=1)
    assert (codes.amax(dim=1) == own - 1).all() and (codes.amin(dim=1) == 0).all()


def test_rows_and_groups_of_zeros_stay_zero():
    weight, moment = weight_and_moment()
    weight[1] = 0
    weight[3, 64:128] = 0
    recoded = recode(weight, quantizer(weight)(weight), moment)
    dense = recoded.dequantize()
    assert torch.isfinite(dense).all()
    assert (dense[1] == 0).all() and (dense[3, 64:128] == 0).all()


def test_rounds_follow_the_low_rank_start():
    weight, moment = weight_and_moment()
    errors = []
    for rounds in (0, 1):
        pack = quantizer(weight, refine=2)
        packed, factors = initialize(weight, pack, 2, 2, "cloq", 3, moment=moment, feedback=rounds)
        errors.append(output_error(weight, packed, moment, factors.lora_B @ factors.lora_A))
    assert errors[1] < 0.9 * errors[0]
    for method in ("lora", "pissa", "loftq"):
        packed, factors = initialize(weight, quantizer(weight), 2, 2, method, 3, moment=moment, feedback=1)
        assert torch.isfinite(packed.dequantize()).all()
    with pytest.raises(ValueError, match="second moment"):
        initialize(weight, quantizer(weight), 2, 2, "loftq", feedback=1)
