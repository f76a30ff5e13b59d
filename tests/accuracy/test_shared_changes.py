"""Changes that levels of a channel and scales of a group share: gradients as PyTorch's own, and the way to format 1."""

import peft
import pytest
import torch
from test_tables import adapted, packed, packed_layer  # noqa: F401 - a fixture among them
from torch import nn
from transformers import AutoModelForCausalLM

from lowra import LowRALinear
from lowra.nn.shared_linear import SharedTablesLinear
from lowra.nn.tabled_linear import TablesBeyondStorage, TrainedTablesLinear, dense
from lowra.nn.tables_in_state import IN_TRAINING
from lowra.nn.trained_tables import bake_tables, is_training_tables, train_tables


def changed_layer(gains, bias, **options):
    layer = SharedTablesLinear(packed_layer([1, 2, 4, 1, 2], bias=bias, **options), gains)
    layer.shared_change.data.normal_(std=0.1)
    return layer


def gradients(layer, x, target, by_pytorch=False, **options):
    given = [x, layer.shared_change, *([] if layer.bias is None else [layer.bias])]
    if by_pytorch:
        out = torch.nn.functional.linear(x, dense(layer.matrix(), *layer.tables(), x.dtype), layer.bias)
    else:
        out = layer(x)
    return out, torch.autograd.grad(out, given, target.to(out.dtype), **options)


@pytest.mark.parametrize("gains", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_pytorch(gains, bias):
    layer = changed_layer(gains, bias)
    x, target = torch.randn(3, 5, layer.in_features, requires_grad=True), torch.randn(3, 5, 5)
    out, found = gradients(layer, x, target)
    expected_out, expected = gradients(layer, x, target, by_pytorch=True)
    torch.testing.assert_close(out, expected_out)
    for own, other in zip(found, expected, strict=True):  # levels count as they are rounded to float16
        torch.testing.assert_close(own, other, rtol=1e-3, atol=2e-3 * float(other.abs().max()))
    again = gradients(layer, x, target, create_graph=True)[1]
    for own, other in zip(again, expected, strict=True):
        torch.testing.assert_close(own, other)
    assert len(layer.shared_change) == 5 + 5 * gains + 3
    with torch.autocast("cpu", torch.bfloat16):
        _, rounded = gradients(layer, x, target)
    for own, other in zip(rounded, expected, strict=True):
        assert (own - other).norm() < 0.1 * other.norm()  # outputs of 15 tokens are kept in 8 bits


def test_a_large_bias_rounds_nothing_of_the_gains_away():
    """As that of keys in Qwen 2.5, which is many times the products."""
    layer = changed_layer(True, True)
    layer.bias.data *= 3000
    x, target = torch.randn(64, layer.in_features, requires_grad=True), torch.randn(64, 5)
    _, (_, expected, _) = gradients(layer, x, target, by_pytorch=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, (_, found, _) = gradients(layer, x, target)
    gains = slice(5, 10)
    assert (found[gains] - expected[gains]).norm() < 0.1 * expected[gains].norm()


@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
def test_baked_layers_decode_to_what_was_trained(scales):
    layer = changed_layer(True, False, scales=scales)
    baked, x = layer.baked(), torch.randn(7, layer.in_features)
    assert type(baked) is LowRALinear and torch.equal(baked.weight, layer.weight)
    assert (baked(x) - layer(x)).norm() < 0.02 * layer(x).norm()


def test_they_are_trained_and_travel_with_the_adapter(packed, tmp_path):  # noqa: F811
    model = adapted(packed)
    parameters = train_tables(model, shared=True)
    assert len(parameters) == 14 and all(name.endswith(".shared_change") for name in parameters)
    without = [n for n, m in model.named_modules() if isinstance(m, SharedTablesLinear) and not m.with_gains]
    assert len(without) == 2 and all("down_proj" in name for name in without)  # the last of each block
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.arange(48)[None] % 7, []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    tuned = model(input_ids=ids, labels=ids).loss.item()
    bake_tables(model)
    baked = model(input_ids=ids, labels=ids)
    assert baked.loss.item() == pytest.approx(tuned, rel=0.02)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, baked.logits)


@pytest.mark.parametrize("kind", [{"scales": True}, {"shared": True}], ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_asks_for_the_dense_weight_gets_that_of_the_tables_in_training(packed, kind, use_dora):  # noqa: F811
    """DoRA's norms and merges: before, they had the base's tables, and outputs changed when tables were baked."""
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=use_dora, init_lora_weights=False)
    model, ids = peft.get_peft_model(model, config), torch.arange(48)[None] % 7
    for parameter in train_tables(model, **kind).values():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
        bake_tables(model)
        baked = model(input_ids=ids).logits
    assert (baked - trained).norm() < 0.02 * trained.norm()
    assert (merged - trained).norm() < 0.02 * trained.norm()


def test_both_kinds_at_once_are_refused(packed):  # noqa: F811
    with pytest.raises(ValueError, match="give one of them"):
        train_tables(adapted(packed), scales=True, shared=True)


def layers_in_training():
    layers = changed_layer(True, True), TrainedTablesLinear(packed_layer([1, 2, 4, 1, 2], bias=True), True)
    return [(layer, [p for name, p in layer.named_parameters() if name in IN_TRAINING]) for layer in layers]


def test_small_and_large_gradients_by_pytorch_are_kept():
    """They were float16 where PyTorch differentiates levels: of small ones most digits were lost, of large ones all."""
    for layer, changes in layers_in_training():
        x = torch.randn(4, layer.in_features)
        ones = torch.autograd.grad(layer(x).sum(), changes, create_graph=True)
        for size in (1e-8, 1e6):
            out = nn.functional.linear(x, dense(layer.matrix(), *layer.tables(), x.dtype), layer.bias)
            for found, one in zip(torch.autograd.grad(out.sum() * size, changes), ones, strict=True):
                torch.testing.assert_close(found / size, one, rtol=1e-3, atol=1e-3 * one.abs().max().item())


def test_second_derivatives_are_those_of_pytorch():
    for layer, changes in layers_in_training():
        x, found = torch.randn(4, layer.in_features), []
        for by_pytorch in (False, True):
            weight = dense(layer.matrix(), *layer.tables(), x.dtype)
            out = nn.functional.linear(x, weight, layer.bias) if by_pytorch else layer(x)
            first = torch.autograd.grad(out.square().sum(), changes, create_graph=True)
            found.append(torch.autograd.grad(sum(one.sum() for one in first) * 1e-10, changes))
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_in_another_dtype_trains_its_tables(dtype):
    for layer, changes in layers_in_training():
        x = torch.randn(4, layer.in_features)
        expected = layer(x)
        layer.to(dtype)
        out = layer(x.to(dtype))
        out.sum().backward()
        assert out.dtype == dtype and all(change.grad is not None for change in changes)
        assert (out - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
@pytest.mark.parametrize("size", [1e5, float("nan")], ids=str)
def test_tables_beyond_their_storage_are_refused(packed, scales, size):  # noqa: F811
    layer = changed_layer(True, True, scales=scales)
    layer.shared_change.data.fill_(size)
    with pytest.raises(TablesBeyondStorage, match="no numbers any more"):
        layer.baked()
    if scales == "double_quant":
        model = adapted(packed)
        list(train_tables(model).values())[-1].data.fill_(size)
        with pytest.raises(TablesBeyondStorage, match="down_proj"):
            bake_tables(model)
        assert is_training_tables(model)
