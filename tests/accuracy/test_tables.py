"""Trained levels and scales: gradients against autograd through the plain formula, and the way to packed format 1."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitsandbytes.backends.lowra.reference import decode_scales
from lowra import LowRAConfig, LowRALinear, quantize_checkpoint
from lowra.nn.trained_tables import (
    TABLES_FILE,
    TrainedTablesLinear,
    bake_tables,
    load_tables,
    save_tables,
    train_tables,
)
from lowra.quantization.learner import learn_codebook
from lowra.quantization.pack import quantize_matrix
from lowra.weights.groups import widen


def packed_layer(row_bits, columns=136, group_size=64, scales="double_quant", bias=False) -> LowRALinear:
    torch.manual_seed(len(row_bits))
    config = LowRAConfig(group_size=group_size, scales=scales)
    weight = torch.randn(len(row_bits), columns) * torch.rand(len(row_bits), 1)
    packed = quantize_matrix(weight, learn_codebook(weight, config), torch.tensor(row_bits, dtype=torch.uint8), config)
    return LowRALinear.from_packed(packed, torch.randn(len(row_bits)) if bias else None)


def plain_weight(layer: LowRALinear, levels, scales) -> torch.Tensor:
    """levels[codes] * scale as one differentiable formula, rows in the order of W."""
    order = layer.row_order()
    bits = layer.row_bits[order.long()].long()
    starts = torch.cumsum(2**bits, 0) - 2**bits
    normal = layer.dequantize() / widen(decode_scales(layer.scales, layer.scale_steps), layer.group_size, 4096)[
        order.argsort(), : layer.in_features
    ].clamp(min=1e-30)
    rows = []
    for place, row in enumerate(order.tolist()):
        own = slice(int(starts[place]), int(starts[place] + 2 ** bits[place]))
        code = (normal[row][:, None] - layer.levels[own].float()).abs().argmin(dim=1)
        rows.append(levels[own][code] * widen(scales[place : place + 1], layer.group_size, layer.in_features)[0])
    return torch.stack(rows)[order.argsort()]


@pytest.mark.parametrize("row_bits", [[1, 2, 4, 1, 2], [1] * 3, [4], [2, 2]])
@pytest.mark.parametrize("with_scales", [False, True])
def test_gradients_are_those_of_the_plain_formula(row_bits, with_scales):
    plain = packed_layer(row_bits, bias=True)
    layer = TrainedTablesLinear(plain, with_scales)
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, plain(x))
    target = torch.randn_like(out)
    (out * target).sum().backward()

    levels = plain.levels.float().requires_grad_()
    scales = decode_scales(plain.scales, plain.scale_steps).requires_grad_()
    other = x.detach().clone().requires_grad_()
    (torch.nn.functional.linear(other, plain_weight(plain, levels, scales), plain.bias) * target).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.level_change.grad, levels.grad, rtol=1e-4, atol=1e-4)
    if with_scales:
        expected = scales.grad * scales.detach()
        torch.testing.assert_close(layer.scale_change.grad, expected, rtol=1e-4, atol=1e-4)
    else:
        assert layer.scale_change is None


@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
def test_baked_layers_decode_to_what_was_trained(scales):
    layer = TrainedTablesLinear(packed_layer([4, 1, 2, 2], scales=scales), True)
    layer.level_change.data.normal_(std=0.1)
    layer.scale_change.data.normal_(std=0.1)
    levels, factors = (tensor.detach() for tensor in layer.tables())
    baked = layer.baked()
    assert type(baked) is LowRALinear and torch.equal(baked.weight, layer.weight)
    torch.testing.assert_close(baked.levels, levels.half())
    decoded = decode_scales(baked.scales, baked.scale_steps)
    torch.testing.assert_close(decoded, factors, rtol=0.05, atol=1e-3 * float(factors.max()))
    x = torch.randn(7, layer.in_features)
    assert (baked(x) - layer(x)).norm() < 0.02 * layer(x).norm()


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "packed"
    quantize_checkpoint(str(tiny_llama), folder, LowRAConfig(bits=1.5), device="cpu", progress=False)
    return folder


def adapted(packed) -> peft.PeftModel:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def trained(packed, steps=12) -> tuple[peft.PeftModel, list[float]]:
    model = adapted(packed)
    train_tables(model, scales=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.arange(48)[None] % 7, []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def test_trained_tables_travel_with_the_adapter(packed, tmp_path):
    model, losses = trained(packed)
    assert losses[-1] < losses[0] - 0.5
    ids = torch.arange(48)[None] % 7
    tuned = model(input_ids=ids, labels=ids).loss.item()
    bake_tables(model)
    baked = model(input_ids=ids, labels=ids)
    assert baked.loss.item() == pytest.approx(tuned, rel=0.02)
    model.save_pretrained(tmp_path)
    save_tables(model, tmp_path)

    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, baked.logits)
    load_tables(again, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, baked.logits)


def test_what_is_trained_can_be_kept_and_put_back(packed):
    model, _ = trained(packed, steps=2)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("_change")}
    other = adapted(packed)
    parameters = train_tables(other, scales=True)
    assert parameters.keys() == kept.keys() and all(p.requires_grad for p in parameters.values())
    other.load_state_dict({**{n: p for n, p in model.state_dict().items() if "lora_" in n}, **kept}, strict=False)
    ids = torch.arange(48)[None] % 7
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)


def test_levels_alone_leave_the_scales(packed, tmp_path):
    model = adapted(packed)
    assert len(train_tables(model)) == 14
    bake_tables(model)
    path = save_tables(model, tmp_path, scales=False)
    assert {key.rpartition(".")[2] for key in load_file(path)} == {"levels", "codes"}


def test_a_head_tied_to_embeddings_keeps_their_tables(tiny_llama, tmp_path):
    config = LowRAConfig(bits=1.5, quantize_embeddings=True)
    quantize_checkpoint(str(tiny_llama), tmp_path / "packed", config, device="cpu", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert isinstance(model.lm_head, LowRALinear)
    names = train_tables(model)
    assert len(names) == 14 and not any("lm_head" in name for name in names)
    bake_tables(model)
    assert model.lm_head.levels is model.model.embed_tokens.levels


def test_misuse_is_refused(packed, tiny_llama, tmp_path):
    model = adapted(packed)
    with pytest.raises(ValueError, match="No tables are being trained"):
        bake_tables(model)
    with pytest.raises(FileNotFoundError, match="no tables of its own"):
        load_tables(model, tmp_path)
    save_tables(model, tmp_path)
    train_tables(model)
    with pytest.raises(ValueError, match="trained already"):
        train_tables(model)
    with pytest.raises(ValueError, match="bake_tables comes before"):
        save_tables(model, tmp_path)
    with pytest.raises(ValueError, match="after bake_tables"):
        load_tables(model, tmp_path)
    with pytest.raises(ValueError, match="no packed linear layer"):
        train_tables(AutoModelForCausalLM.from_pretrained(tiny_llama))
    quantize_checkpoint(str(tiny_llama), tmp_path / "b", LowRAConfig(bits=2), device="cpu", progress=False)
    with pytest.raises(ValueError, match="other codes"):
        load_tables(AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32), tmp_path)
    assert (tmp_path / TABLES_FILE).exists()
