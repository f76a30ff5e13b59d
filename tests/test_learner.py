"""The learner of levels and thresholds against its definition, written out naively here."""

import pytest
import torch

from bitsandbytes.backends.lowra.lloyd import LEVELS, THRESHOLDS
from lowra import LowRAConfig
from lowra.quantization.learner import learn_codebook
from lowra.weights.codebook import BINARY, NF2, NF4, PRECISIONS, initial_tables


def matrix(rows=24, columns=200, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()


def normalised(weight, group=64):
    """x in [-1, 1] and the group's absmax, both of the shape of the weight."""
    absmax = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in weight.split(group, 1)], 1)
    return torch.where(absmax > 0, weight / absmax, torch.zeros_like(weight)), absmax


def naive_errors(weight, codebook):
    x, absmax = normalised(weight)
    errors = []
    for bits in PRECISIONS:
        cuts, levels = codebook.thresholds[:, THRESHOLDS[bits]], codebook.levels[:, LEVELS[bits]]
        code = (x[:, :, None] > cuts[:, None, :]).sum(2)
        errors.append((weight - absmax * levels.gather(1, code)).square().sum(1))
    return torch.stack(errors, 1)


@pytest.mark.parametrize("block_weight", ["absmax_squared", "absmax"])
@pytest.mark.parametrize("thresholds", ["channel", "matrix"])
def test_errors_are_those_of_the_tables(block_weight, thresholds):
    weight = matrix()
    codebook = learn_codebook(weight, LowRAConfig(block_weight=block_weight, thresholds=thresholds))
    assert codebook.levels.shape == (24, 22)
    assert codebook.thresholds.shape == (24, 19)
    torch.testing.assert_close(codebook.errors, naive_errors(weight, codebook), rtol=1e-4, atol=1e-5)
    for bits in PRECISIONS:
        assert (codebook.levels[:, LEVELS[bits]].diff(dim=1) >= 0).all()
        assert (codebook.thresholds[:, THRESHOLDS[bits]].diff(dim=1) >= 0).all()


def test_error_never_rises_with_the_iterations():
    weight = matrix()
    before = learn_codebook(weight, LowRAConfig(codebook="normal_float", bits=2.0)).errors
    for iterations in (1, 2, 5, 20, 100):
        errors = learn_codebook(weight, LowRAConfig(iterations=iterations)).errors
        assert (errors <= before * (1 + 1e-6)).all()
        before = errors


def test_more_bits_leave_less_error():
    errors = learn_codebook(matrix(), LowRAConfig()).errors
    assert (errors[:, 0] < errors[:, 1]).all()
    assert (errors[:, 1] < errors[:, 2]).all()


def test_converged_tables_are_centroids_and_midpoints():
    weight = matrix(rows=4)
    codebook = learn_codebook(weight, LowRAConfig(iterations=500))
    x, absmax = normalised(weight)
    for bits in (2, 1):
        levels, cuts = codebook.levels[:, LEVELS[bits]], codebook.thresholds[:, THRESHOLDS[bits]]
        torch.testing.assert_close(cuts, (levels[:, 1:] + levels[:, :-1]) / 2, rtol=1e-4, atol=1e-4)
        code = (x[:, :, None] > cuts[:, None, :]).sum(2)
        for row, cell in [(0, 0), (1, 2**bits - 1)]:
            inside = code[row] == cell
            mass = absmax[row, inside].square()
            centroid = (mass * x[row, inside]).sum() / mass.sum()
            torch.testing.assert_close(levels[row, cell], centroid, rtol=1e-3, atol=1e-3)


def test_weighting_by_absmax_squared_leaves_the_least_true_error():
    weight = matrix(rows=64)
    weight[:, 64:128] *= 8  # groups that differ, so that the weighting matters
    squared = learn_codebook(weight, LowRAConfig(block_weight="absmax_squared")).errors.sum(0)
    plain = learn_codebook(weight, LowRAConfig(block_weight="absmax")).errors.sum(0)
    assert (squared[1:] < plain[1:]).all()


def test_shared_thresholds_are_one_set_and_cost_error():
    weight = matrix()
    shared = learn_codebook(weight, LowRAConfig(thresholds="matrix"))
    own = learn_codebook(weight, LowRAConfig())
    assert (shared.thresholds == shared.thresholds[0]).all()
    assert (shared.levels[0] != shared.levels[1]).any()
    assert shared.errors.sum() >= own.errors.sum()


def test_normal_float_stays_as_it_is():
    codebook = learn_codebook(matrix(), LowRAConfig(codebook="normal_float", bits=2.0))
    levels, thresholds = initial_tables()
    assert (codebook.levels == levels).all()
    assert (codebook.thresholds == thresholds).all()
    assert levels.tolist() == pytest.approx([*NF4, *NF2, *BINARY])


@pytest.mark.parametrize("thresholds", ["channel", "matrix"])
def test_empty_cells_keep_their_levels(thresholds):
    weight = torch.full((2, 128), 0.5)  # one value: all cells but the last stay empty
    codebook = learn_codebook(weight, LowRAConfig(thresholds=thresholds))
    levels, _ = initial_tables()
    assert torch.isfinite(codebook.levels).all()
    assert (codebook.levels[:, :15] == levels[:15]).all()
    torch.testing.assert_close(codebook.errors, torch.zeros(2, 3))


@pytest.mark.parametrize("thresholds", ["channel", "matrix"])
def test_rows_of_zeros_are_exact(thresholds):
    weight = matrix()
    weight[3] = 0
    weight[5, 64:128] = 0  # a group of zeros
    codebook = learn_codebook(weight, LowRAConfig(thresholds=thresholds))
    assert torch.isfinite(codebook.levels).all()
    assert (codebook.errors[3] == 0).all()
    assert torch.isfinite(codebook.errors).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    weight = matrix().to(dtype)
    codebook = learn_codebook(weight, LowRAConfig())
    torch.testing.assert_close(codebook.errors, naive_errors(weight.float(), codebook), rtol=1e-4, atol=1e-5)
