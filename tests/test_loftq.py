"""The low-rank initialisation: how good the decomposition is, what the alternation gains, and what the factors mean."""

import pytest
import torch

from lowra import LowRAConfig
from lowra.quantization.learner import learn_codebook
from lowra.quantization.loftq import initialize
from lowra.quantization.lowrank import truncated_svd
from lowra.quantization.pack import quantize_matrix


def matrix(rows=96, columns=160, seed=0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantizer(weight, bits=2):
    config = LowRAConfig(bits=2.0)
    codebook = learn_codebook(weight, config)
    row_bits = torch.full((weight.shape[0],), bits, dtype=torch.uint8)
    return lambda part: quantize_matrix(part, codebook, row_bits, config)


def left_over(weight, packed, factors, scaling) -> float:
    return float((weight - packed.dequantize() - scaling * factors.lora_B @ factors.lora_A).norm())


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (512, 512), (40, 20)])
@pytest.mark.parametrize("rank", [1, 8, 20])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_truncated_svd_is_within_one_percent_of_the_full_one(shape, rank, decay):
    noise = matrix(*shape)
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    values = values * torch.arange(1, len(values) + 1).float() ** -decay
    dense = left * values @ right
    best = values[rank:].square().sum().sqrt()
    first, second = truncated_svd(dense, rank)
    assert first.shape == (shape[0], rank)
    assert second.shape == (rank, shape[1])
    # the Gram matrices square the condition number: what lies 1,000 times below the largest is not resolved
    assert (dense - first @ second).norm() <= best * 1.01 + 1e-3 * values[0]


def test_truncated_svd_splits_the_singular_values_evenly():
    left, right = truncated_svd(matrix(), 8)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-3, atol=1e-3)


def test_truncated_svd_of_low_rank_and_of_nothing():
    exact = matrix(64, 4) @ matrix(4, 64, seed=1)
    left, right = truncated_svd(exact, 8)
    torch.testing.assert_close(left @ right, exact, rtol=1e-3, atol=1e-3)
    left, right = truncated_svd(torch.zeros(32, 48), 8)
    assert torch.isfinite(left).all()
    assert (left @ right == 0).all()


def test_error_falls_with_the_steps():
    weight = matrix()
    pack = quantizer(weight, bits=2)
    errors = [
        left_over(weight, *initialize(weight, pack, 16, 16.0, "loftq", steps), scaling=1.0) for steps in (1, 2, 5)
    ]
    assert errors[0] > errors[1] > errors[2] * 0.999
    assert errors[0] < float((weight - pack(weight).dequantize()).norm())


@pytest.mark.parametrize("method", ["loftq", "pissa"])
@pytest.mark.parametrize("alpha", [4.0, 16.0, 64.0])
def test_the_scaling_is_divided_out(method, alpha):
    weight = matrix()
    pack = quantizer(weight)
    packed, factors = initialize(weight, pack, 8, alpha, method)
    reference, plain = initialize(weight, pack, 8, 8.0, method)
    assert (packed.weight == reference.weight).all()
    torch.testing.assert_close(
        alpha / 8 * factors.lora_B @ factors.lora_A, plain.lora_B @ plain.lora_A, rtol=1e-4, atol=1e-4
    )


def test_pissa_quantises_the_residual_of_the_best_fit():
    weight = matrix()
    pack = quantizer(weight)
    packed, factors = initialize(weight, pack, 8, 8.0, "pissa")
    left, right = truncated_svd(weight, 8)
    torch.testing.assert_close(factors.lora_B @ factors.lora_A, left @ right)
    assert (packed.weight == pack(weight - left @ right).weight).all()


def test_lora_starts_at_the_quantised_weight():
    weight = matrix()
    pack = quantizer(weight)
    packed, factors = initialize(weight, pack, 8, 16.0, "lora")
    assert (factors.lora_B == 0).all()
    assert 0 < factors.lora_A.abs().max() <= weight.shape[1] ** -0.5
    assert (packed.weight == pack(weight).weight).all()


@pytest.mark.parametrize("method", ["loftq", "pissa", "lora"])
def test_the_same_seed_gives_the_same_adapter(method):
    weight = matrix()
    pack = quantizer(weight)
    packed, factors = initialize(weight, pack, 8, 8.0, method)
    torch.manual_seed(5)  # the global generator must not matter
    again, same = initialize(weight, pack, 8, 8.0, method)
    assert (packed.weight == again.weight).all()
    assert (factors.lora_A == same.lora_A).all()
    assert (factors.lora_B == same.lora_B).all()


@pytest.mark.parametrize(
    ("method", "rank", "message"), [("svd", 4, "one of loftq"), ("loftq", 97, "does not fit"), ("loftq", 0, "1 to 96")]
)
def test_refusals(method, rank, message):
    weight = matrix()
    with pytest.raises(ValueError, match=message):
        initialize(weight, quantizer(weight), rank, 8.0, method)


def test_cloq_leaves_the_least_error_in_the_outputs():
    weight = matrix()
    pack = quantizer(weight)
    inputs = matrix(2000, 160, seed=3) * torch.linspace(0.1, 3, 160) @ matrix(160, 160, seed=4)
    moment = inputs.T @ inputs / len(inputs)

    def in_outputs(method):
        packed, factors = initialize(weight, pack, 8, 16.0, method, moment=moment)
        left = weight - packed.dequantize() - 2 * factors.lora_B @ factors.lora_A
        return float(((left @ moment) * left).sum()), factors

    plain, _ = in_outputs("loftq")
    fitted, factors = in_outputs("cloq")
    assert fitted < plain
    torch.testing.assert_close(factors.lora_B.norm(dim=0), factors.lora_A.norm(dim=1), rtol=1e-3, atol=1e-3)


def test_cloq_is_loftq_under_white_inputs():
    weight = matrix()
    pack = quantizer(weight)
    packed, factors = initialize(weight, pack, 8, 8.0, "cloq", moment=torch.eye(160) * 3)
    same, reference = initialize(weight, pack, 8, 8.0, "loftq")
    torch.testing.assert_close(
        factors.lora_B @ factors.lora_A, reference.lora_B @ reference.lora_A, rtol=1e-2, atol=1e-2
    )
