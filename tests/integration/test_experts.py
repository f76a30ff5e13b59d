"""Fused experts: packed as one matrix, cut out one at a time, trained through, merged back, or left dense."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import inputs_of, logits_of, make_model
from torch import nn

import lowra
from lowra.checkpoints.targets import find_targets
from lowra.commands import main
from lowra.nn.experts import LowRAExperts

ARCHITECTURES = ["MixtralForCausalLM", "Qwen3MoeForCausalLM"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def moe(request, tmp_path_factory):
    """Class, dense folder and packed folder of a small mixture of experts."""
    above = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(above / "dense")
    config, recipe = lowra.LowRAConfig(bits=1.6), lowra.AdapterRecipe(rank=4)
    lowra.quantize_checkpoint(str(above / "dense"), above / "packed", config, recipe, progress=False)
    return getattr(transformers, request.param), above / "dense", above / "packed"


def experts_of(model) -> dict[str, LowRAExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRAExperts)}


@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
def test_an_expert_is_its_rows_of_the_whole_matrix(moe, scales):
    model_class, dense, _ = moe
    model = model_class.from_pretrained(dense, quantization_config=lowra.LowRAConfig(bits=1.6, scales=scales))
    assert any(len(set(module.row_bits.tolist())) > 1 for module in experts_of(model).values())
    for module in experts_of(model).values():
        whole = module.dequantize().view(module.experts, -1, module.in_features)
        x = torch.randn(3, module.in_features)  # few tokens: a kernel with its own order of sums
        one_each = torch.eye(module.in_features)  # many: the weights themselves, bit for bit
        for expert in range(module.experts):
            for index in (expert, torch.tensor(expert)):
                assert torch.equal(nn.functional.linear(one_each, module[index]), whole[expert].T)
                product = nn.functional.linear(x, module[index])
                torch.testing.assert_close(product, x @ whole[expert].T, rtol=1e-5, atol=1e-6)


def test_nothing_else_can_be_done_with_an_expert(moe):
    model = moe[0].from_pretrained(moe[2])
    expert = next(iter(experts_of(model).values()))[0]
    with pytest.raises(TypeError, match="F.linear"):
        torch.matmul(torch.ones(2, 64), expert)


def test_gradients_are_those_of_the_dequantised_model(moe):
    model_class, dense, _ = moe
    grads = []
    for dequantise in (False, True):
        model = model_class.from_pretrained(dense, load_in_lowra=True, lowra_bits=2.0).eval()
        if dequantise:
            model.dequantize()
            assert not experts_of(model)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        tokens = inputs_of(model)["input_ids"]
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 2 * 2 * 2
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_adapters_leave_experts_alone_and_merging_makes_them_dense(moe, tmp_path):
    model_class, dense, packed = moe
    config = json.loads((packed / "initial_adapter" / "adapter_config.json").read_text())
    assert not any("experts" in name for name in config["target_modules"])
    for original in (None, dense):
        model = PeftModel.from_pretrained(model_class.from_pretrained(packed).eval(), packed / "initial_adapter")
        logits = logits_of(model)
        if original is None:
            merged = lowra.merge_into_dense(model)
            torch.testing.assert_close(logits_of(merged), logits, rtol=1e-3, atol=1e-4)
        else:
            merged = lowra.merge_into_dense(model, original=dense, initial=packed / "initial_adapter")
            expected = logits_of(model_class.from_pretrained(dense).eval())
            torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)
        folder = tmp_path / ("merged" if original is None else "original")
        merged.save_pretrained(folder)
        plain = model_class.from_pretrained(folder).eval()
        assert not experts_of(plain)
        torch.testing.assert_close(logits_of(plain), logits_of(merged), rtol=1e-4, atol=1e-5)


def test_generation(moe):
    model = moe[0].from_pretrained(moe[2]).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(torch.arange(3, 9)[None], **options)
    model.dequantize()
    assert torch.equal(model.generate(torch.arange(3, 9)[None], **options), tokens)


def test_experts_can_be_kept_dense(moe):
    config = lowra.LowRAConfig(modules_to_not_convert=["experts"])
    model = moe[0].from_pretrained(moe[1], quantization_config=config)
    assert not experts_of(model) and any(isinstance(module, lowra.LowRALinear) for module in model.modules())
    assert torch.isfinite(logits_of(model)).all()


def test_experts_of_another_form_stay_dense_and_say_so(caplog):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(64, 64)
            self.experts = nn.Module()
            self.experts.weight = nn.Parameter(torch.zeros(4, 64, 32))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block()])

    with caplog.at_level("WARNING", logger="lowra"):
        targets = find_targets(Model(), None)
    assert list(targets) == ["layers.0.up.weight"]
    assert "layers.0.experts.weight" in caplog.text and "stay dense" in caplog.text


def test_inspection_counts_experts(moe, tmp_path, capsys):
    assert main(["inspect", str(moe[2]), "--original", str(moe[1]), "--plot", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["packed_bytes"] == json.loads((moe[2] / "lowra_report.json").read_text())["packed_bytes"]
    assert "mlp.experts.gate_up_proj" in [kind["name"] for kind in result["kinds"]]


def test_hqq_rounds_experts_too(moe):
    from lowra.training.hqq import hqq, quantize_model

    model_class, dense, _ = moe
    model, before = model_class.from_pretrained(dense), model_class.from_pretrained(dense)
    quantize_model(model, 2)
    name = "model.layers.0.mlp.experts.down_proj"
    weight = before.get_parameter(name).detach()
    expected = torch.stack([hqq(expert, 2) for expert in weight])
    torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=0.2, atol=0.02)
    assert not torch.equal(model.get_parameter(name), weight)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_model_made_dense_multiplies_its_experts_as_before(architecture, tmp_path):
    make_model(architecture).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model_class = getattr(transformers, architecture)
    before = model_class.from_pretrained(tmp_path / "dense").config._experts_implementation
    model = model_class.from_pretrained(tmp_path / "dense", load_in_lowra=True).eval()
    assert model.config._experts_implementation == "eager" != before
    model.dequantize()
    assert model.config._experts_implementation == before
    model.save_pretrained(tmp_path / "dequantised")
    again = model_class.from_pretrained(tmp_path / "dequantised").eval()
    assert torch.equal(logits_of(again), logits_of(model))
