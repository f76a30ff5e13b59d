"""Baselines of Table 1: each beats nothing at all, and the informed ones beat plain rounding on their own terms."""

import pytest
import torch
from adapter_models import save_adapter
from peft import PeftModel

from lowra.adapters import LoraQuantSettings, quantize_loraquant, read_adapter
from lowra.adapters.binary_baselines import billm_rows, pbllm_rows, quantize_billm, quantize_pbllm
from lowra.adapters.codes import RoundToNearest, Sign
from lowra.adapters.gptq import gptq_columns, gptq_rows, input_hessians, quantize_gptq
from lowra.adapters.joint import joint_diagonal, quantize_joint
from lowra.adapters.loraquant import quantize_bin, quantize_rtn


def with_identity_hessians(adapter, bits=2):
    return quantize_gptq(adapter, {layer.name: torch.eye(layer.a.shape[1]) for layer in adapter.layers}, bits)


METHODS = {
    "loraquant": lambda adapter: quantize_loraquant(adapter, LoraQuantSettings()),
    "bin": quantize_bin,
    "rtn 1": lambda adapter: quantize_rtn(adapter, 1),
    "rtn 2": lambda adapter: quantize_rtn(adapter, 2),
    "gptq": with_identity_hessians,
    "pbllm": quantize_pbllm,
    "billm": quantize_billm,
}


def relative_error(adapter, packed):
    """sum |B A - B^ A^|^2 / sum |B A|^2 over layers."""
    state, wrong, whole = packed.dequantize(), 0.0, 0.0
    for layer in adapter.layers:
        product = layer.b @ layer.a
        wrong += (
            (product - state[layer.name + layer.suffixes[1]] @ state[layer.name + layer.suffixes[0]]).square().sum()
        )
        whole += product.square().sum()
    return float(wrong / whole)


def test_order_of_errors_at_equal_or_more_bits(adapter_folder):
    adapter = read_adapter(adapter_folder)
    error = {name: relative_error(adapter, method(adapter)) for name, method in METHODS.items()}
    assert error["pbllm"] < error["bin"]
    assert error["billm"] < error["bin"] < error["rtn 1"]
    assert error["loraquant"] < error["bin"]


def test_refinement_lowers_the_error_of_the_product(adapter_folder):
    adapter = read_adapter(adapter_folder)
    refined = relative_error(adapter, quantize_loraquant(adapter, LoraQuantSettings()))
    assert refined < 0.8 * relative_error(adapter, quantize_loraquant(adapter, LoraQuantSettings(refine=False)))


def test_svd_split_beats_norm_and_random_at_equal_bits(adapter_folder):
    adapter = read_adapter(adapter_folder)
    for layer in adapter.layers:
        # The same product with its information scattered over all components, as training leaves it.
        rotation = torch.linalg.qr(torch.randn(len(layer.a), len(layer.a)))[0]
        layer.b, layer.a = layer.b @ rotation, rotation.mT @ layer.a
    error, bits = {}, set()
    for split in ("svd", "norm", "random"):
        packed = quantize_loraquant(adapter, LoraQuantSettings(bits=3, split=split, static_h=3))
        error[split] = relative_error(adapter, packed)
        bits.add(packed.average_bits)
    assert len(bits) == 1
    assert error["svd"] < min(error["norm"], error["random"])


def test_pbllm_keeps_the_largest_tenth_at_eight_bits():
    rows = torch.randn(4, 300)
    codes = pbllm_rows(rows)
    decoded = codes.dequantize()
    assert (codes.salient.sum(1) == 30).all()
    assert rows[codes.salient].abs().min() > 1
    assert (decoded - rows)[codes.salient].abs().max() < 0.02
    others = decoded[~codes.salient]
    assert torch.equal(others >= 0, rows[~codes.salient] >= 0)


def test_billm_is_nearer_than_one_scale_a_group():
    rows = torch.randn(8, 300)
    plain = (Sign().simulate(rows) - rows).square().sum(1)
    assert ((billm_rows(rows).dequantize() - rows).square().sum(1) < 0.7 * plain).all()


def test_gptq_beats_rounding_under_its_hessian():
    torch.manual_seed(0)
    inputs = torch.randn(1000, 200) @ torch.randn(200, 200) / 14
    hessian, near = inputs.mT @ inputs, RoundToNearest(2)
    rows = torch.randn(8, 200)

    def loss(found, wanted, h):
        return torch.trace((found - wanted) @ h @ (found - wanted).mT)

    assert loss(gptq_rows(rows, hessian, 2).dequantize(), rows, hessian) < 0.8 * loss(
        near.simulate(rows), rows, hessian
    )
    small = torch.randn(100, 8) @ torch.randn(8, 8)
    small, columns = small.mT @ small, torch.randn(8, 300)
    by_gptq = gptq_columns(columns, small, 2).dequantize()
    assert loss(by_gptq.mT, columns.mT, small) < 0.9 * loss(near.simulate(columns).mT, columns.mT, small)


def test_gptq_without_correlation_is_rounding():
    rows = torch.randn(4, 200)
    assert torch.equal(gptq_rows(rows, torch.eye(200), 2).dequantize(), RoundToNearest(2).simulate(rows))


def test_hessians_are_sums_over_the_inputs_of_the_layer(adapter_folder, base, tokens):
    adapter = read_adapter(adapter_folder)
    model = PeftModel.from_pretrained(base, adapter_folder)
    name = next(layer.name for layer in adapter.layers if "layers.0.self_attn.q_proj" in layer.name)
    found = input_hessians(model, tokens, [name])[name]
    block = base.model.layers[0]
    x = block.input_layernorm(base.model.embed_tokens(tokens)).flatten(0, 1)
    assert torch.allclose(found, x.mT @ x, rtol=1e-4, atol=1e-4)


def test_joint_diagonal_recovers_adapters_that_share_factors():
    torch.manual_seed(0)
    u, v, d = torch.randn(40, 4), torch.randn(4, 30), torch.rand(3, 4) + 0.5
    b = torch.stack([u * x for x in d])
    columns, rows, diagonals = joint_diagonal(b, v.expand(3, 4, 30), 4)
    for index in range(3):
        rebuilt = (columns * diagonals[index, :, None]).mT @ rows
        assert (rebuilt - b[index] @ v).norm() < 0.05 * (b[index] @ v).norm()


def test_joint_adapters_count_their_part_of_the_shared_basis(adapter_folders):
    packed = quantize_joint([read_adapter(folder) for folder in adapter_folders])
    assert len({id(one.shared) for one in packed}) == 1
    for one in packed:
        # 16 bits / 3 adapters, and a float16 diagonal of r numbers a layer.
        diagonal = 16 * sum(layer.rank for layer in one.layers) / one.parameters
        assert one.average_bits == pytest.approx(16 / 3 + diagonal)


def test_joint_adapters_must_be_alike(adapter_folders, base_folder, tmp_path):
    other = save_adapter(tmp_path / "other", base_folder, 9, r=4)
    with pytest.raises(ValueError, match="same target modules and rank"):
        quantize_joint([read_adapter(adapter_folders[0]), read_adapter(other)])
    with pytest.raises(ValueError, match="two or more"):
        quantize_joint([read_adapter(adapter_folders[0])])
