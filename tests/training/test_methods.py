"""The presets: what each one packs, the budgets it has, and HQQ."""

import dataclasses

import pytest
import torch

from lowra.training.hqq import hqq, true_bits
from lowra.training.methods import METHODS, attach_adapter, check_method, load_base, prepare_base, supports

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", [name for name, preset in METHODS.items() if preset.quantization is not None])
def test_packed_methods_meet_the_budget(recipe, tmp_path, method):
    recipe = dataclasses.replace(recipe, method=method, bits=2.5)
    base = prepare_base(recipe, tmp_path / "base", CPU, progress=False)
    assert 2.3 < base.nominal_bits <= 2.5 < base.true_bits
    assert (base.adapter / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("method", ["lora16", "hqq", "lowra"])
def test_every_method_adapts_the_same_layers(recipe, tmp_path, method):
    recipe = dataclasses.replace(recipe, method=method, dropout=0.1)
    base = prepare_base(dataclasses.replace(recipe, dropout=0.0), tmp_path / "base", CPU, progress=False)
    model = attach_adapter(load_base(base, recipe, CPU), base, recipe)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    assert sum(isinstance(module, torch.nn.Dropout) and module.p == 0.1 for module in model.modules()) == 2 * 7
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_budgets():
    assert supports("lowra", 1.15) and not supports("loftq", 1.5) and not supports("lowra", 0.9)
    assert supports("hqq", 3) and not supports("hqq", 2.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(method="lofq"), "Did you mean 'loftq'"),
        (dict(method="loftq", bits=1.5), "loftq has no form at 1.5 bits: give from 2 to 4, or method=lowra"),
        (dict(method="hqq", bits=2.5), "whole numbers from 1 to 4"),
        (dict(bits=5), "lowra has no form at 5"),
        (dict(quantization={"sensitivty": "none"}), "Did you mean 'sensitivity'"),
        (dict(method="lora16", tables="levels"), "lora16 has no tables"),
        (dict(method="lora16", quantization={"sensitivity": "none"}), "does not use quantization options"),
    ],
)
def test_refusals(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        check_method(dataclasses.replace(recipe, **changes))


def test_a_base_of_another_recipe_is_not_reused(recipe, tmp_path):
    prepare_base(recipe, tmp_path / "base", CPU, progress=False)
    prepare_base(recipe, tmp_path / "base", CPU, progress=False)
    with pytest.raises(ValueError, match="was made with bits=2.0, the recipe now asks for 1.5"):
        prepare_base(dataclasses.replace(recipe, bits=1.5), tmp_path / "base", CPU, progress=False)


def test_a_packed_model_is_taken_as_it_is(recipe, tmp_path, caplog):
    made = prepare_base(recipe, tmp_path / "base", CPU, progress=False)
    given = dataclasses.replace(recipe, model=str(tmp_path / "base"))
    base = prepare_base(given, tmp_path / "unused", CPU, progress=False)
    assert base == made and not (tmp_path / "unused").exists()
    changed = dataclasses.replace(given, quantization={"sensitivity": "none"})
    with pytest.raises(
        ValueError, match="packed already, with sensitivity=layer: quantization.sensitivity=none has no"
    ):
        asked = dataclasses.replace(changed, given=("quantization.sensitivity",))
        prepare_base(asked, tmp_path / "unused", CPU, progress=False)
    prepare_base(changed, tmp_path / "unused", CPU, progress=False)
    assert "was packed with sensitivity=layer; the recipe's none is not used" in caplog.text
    prepare_base(dataclasses.replace(given, rank=8), tmp_path / "unused", CPU, progress=False)
    assert "has rank 4; the recipe's rank of 8 is not used" in caplog.text


def test_hqq_improves_on_rounding_and_has_2_to_the_bits_values_per_group():
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((32, 176)) * 0.02  # the last group has 48 weights
    errors = []
    for bits in (1, 2, 3, 4):
        value = hqq(weight, bits)
        assert max(row[:64].unique().numel() for row in value) <= 2**bits
        errors.append((weight - value).abs().pow(0.7).mean().item())
        assert errors[-1] <= (weight - _rounded(weight, bits)).abs().pow(0.7).mean().item()
    assert errors == sorted(errors, reverse=True)
    assert true_bits(3) == 3.5


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hqq_is_that_of_its_authors(bits):
    """`DISABLE_CUDA=1 pip install --no-deps hqq termcolor` brings the package."""
    quantizer = pytest.importorskip("hqq.core.quantize", reason="the hqq package is not installed").Quantizer
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((256, 512)) * 0.02
    options = dict(nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    theirs, ours = quantizer.dequantize(*quantizer.quantize(weight, **options)).float(), hqq(weight, bits)
    errors = [(weight - value).abs().pow(0.7).mean().item() for value in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert ((ours - theirs).abs() > 1e-3 * weight.abs().max()).float().mean() < 1e-3


def _rounded(weight, bits):
    """Round to nearest between the ends of each group."""
    parts = []
    for group in weight.split(64, dim=1):
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        parts.append(((group - low) / step).round() * step + low)
    return torch.cat(parts, dim=1)
