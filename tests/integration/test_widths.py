"""Inputs of another width than a layer has are refused, as dense layers do: packed rows are padded, some would fit."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import make_model, packed_layers
from transformers import AutoModelForCausalLM

import lowra
from lowra.nn.trained_tables import train_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths")
    for name in ("LlamaForCausalLM", "Qwen3MoeForCausalLM"):
        make_model(name).save_pretrained(folder / name)
    return folder


def of(folder, how, architecture="LlamaForCausalLM"):
    config = lowra.LowRAConfig(bits=2)
    model = AutoModelForCausalLM.from_pretrained(folder / architecture, quantization_config=config)
    if how in ("adapter", "tables"):
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    if how == "tables":
        train_tables(model)
    return model.get_base_model() if how in ("adapter", "tables") else model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["alone", "adapter", "tables", "compiled"])
def test_layers(folder, how, dtype):
    layer = of(folder, how).model.layers[0].mlp.down_proj
    width = layer.in_features
    used = torch.compile(layer, backend="eager") if how == "compiled" else layer
    for shape in ((1, width - 1), (3, 1), (2, 2, width + 1), (4, 2 * width), (width - 1,), (0, width - 8)):
        for grad in (False, True):
            with pytest.raises(Exception, match="cannot be multiplied|size mismatch|must match|got"):
                used(torch.ones(shape, dtype=dtype, requires_grad=grad))


def test_experts(folder):
    experts = next(
        m for m in packed_layers(of(folder, "alone", "Qwen3MoeForCausalLM")).values() if hasattr(m, "experts")
    )
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.nn.functional.linear(torch.ones(2, experts.in_features - 1), experts[0])


@pytest.mark.parametrize("x", [None, [1.0], 3])
def test_what_is_no_tensor(folder, x):
    for layer in (of(folder, "alone").model.layers[0].mlp.down_proj, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="must be Tensor, not"):
            layer(x)
