"""LoRA layers on a packed base in one function: they compute what PEFT composes, and know where to leave it to PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lowra import LowRAConfig
from lowra.integrations import peft as integration
from lowra.nn.linear import LowRALinear
from lowra.nn.shared_linear import SharedTablesLinear
from lowra.nn.trained_tables import train_tables
from lowra.quantization.learner import learn_codebook
from lowra.quantization.pack import quantize_matrix

N, K = 24, 96


class OneLayer(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(N, K, generator=generator) * 0.1
        config = LowRAConfig(bits=2, group_size=32)
        row_bits = torch.tensor([4, 2, 1] * (N // 3), dtype=torch.uint8)
        packed = quantize_matrix(weight, learn_codebook(weight, config), row_bits, config)
        self.layer = LowRALinear.from_packed(packed, torch.randn(N, generator=generator) if bias else None)

    def forward(self, x):
        return self.layer(x)


def lora_layer(bias=False, dtype=torch.float32, **options) -> tuple[nn.Module, LoraLinear]:
    model = OneLayer(bias)
    model.requires_grad_(False)
    config = LoraConfig(
        **({"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "init_lora_weights": False} | options)
    )
    model = get_peft_model(model, config)
    layer = model.base_model.model.layer
    for name in ("lora_A", "lora_B"):
        getattr(layer, name)["default"].to(dtype)
    return model, layer


def both(layer, x, autocast):
    """Outputs and gradients (x, A, B) of our forward and of PEFT's."""
    found = []
    for forward in (layer.forward, lambda x: LoraLinear.forward(layer, x)):
        given = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = forward(given)
        (out.float() * torch.linspace(-1, 1, N)).sum().backward()
        grads = [given.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        if isinstance(layer.base_layer, SharedTablesLinear):
            grads.append(layer.base_layer.shared_change.grad)
        found.append([out.detach(), *[grad.clone() for grad in grads]])
    return found


@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (1, K)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_peft(shape, bias):
    _, layer = lora_layer(bias)
    assert layer._plain_adapter(torch.zeros(1, K)) == "default"
    for ours, theirs in zip(*both(layer, torch.randn(shape), autocast=False), strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_they_agree_to_the_rounding_of_its_type():
    _, layer = lora_layer(bias=True)
    ours, theirs = both(layer, torch.randn(7, K), autocast=True)
    for mine, peft in zip(ours, theirs, strict=True):
        assert mine.dtype == peft.dtype
        assert (mine.float() - peft.float()).norm() < 0.01 * peft.float().norm()


def test_bfloat16_without_autocast():
    _, layer = lora_layer(dtype=torch.bfloat16)
    ours, theirs = both(layer, torch.randn(7, K, dtype=torch.bfloat16), autocast=False)
    for mine, peft in zip(ours, theirs, strict=True):
        assert mine.dtype == peft.dtype == torch.bfloat16
        assert (mine.float() - peft.float()).norm() < 0.02 * peft.float().norm()


def test_float32_adapters_on_a_narrower_model_are_computed_in_float32():
    _, layer = lora_layer(bias=True)
    x = torch.randn(7, K, dtype=torch.bfloat16)
    assert layer._plain_adapter(x) == "default"
    ours, theirs = both(layer, x, autocast=False)
    kinds = [(torch.bfloat16, 0.01)] * 2 + [(torch.float32, 1e-5)] * 2
    for mine, peft, (dtype, bound) in zip(ours, theirs, kinds, strict=True):
        assert mine.dtype == peft.dtype == dtype
        assert (mine.float() - peft.float()).norm() < bound * peft.float().norm()
    layer.cast_input_dtype_enabled = False
    assert layer._plain_adapter(x) is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gains", [False, True])
def test_with_shared_changes_of_tables(monkeypatch, gains, bias, autocast):
    _, layer = lora_layer(bias=bias)
    layer.base_layer = SharedTablesLinear(layer.base_layer, gains)
    if bias:
        layer.base_layer.bias.requires_grad_(False)
    layer.base_layer.shared_change.data.normal_(std=0.1)
    x = torch.randn(2, 5, K)
    assert layer._plain_adapter(x) == "default"
    ours, theirs = both(layer, x, autocast)
    assert len(ours) == len(theirs) == 5
    for own, other in zip(ours, theirs, strict=True):
        if autocast:
            assert (own - other).norm() < 0.03 * other.norm()
        else:
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    factors = [f["default"].weight for f in (layer.lora_A, layer.lora_B)]
    given = [x.requires_grad_(), *factors, layer.base_layer.shared_change]
    again = torch.autograd.grad((layer(x) * torch.linspace(-1, 1, N)).sum(), given, create_graph=True)
    if not autocast:
        for own, other in zip(ours[1:], again, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_only_the_gradients_asked_for_are_made():
    _, layer = lora_layer()
    layer.lora_A["default"].weight.requires_grad_(False)
    layer(torch.randn(3, K)).sum().backward()  # x needs none either
    assert layer.lora_A["default"].weight.grad is None
    assert layer.lora_B["default"].weight.grad is not None


def test_what_the_function_does_not_cover_goes_through_peft(monkeypatch):
    monkeypatch.setattr(integration, "lora_linear", None)  # would fail if it were called
    x = torch.randn(3, K)
    for options in ({"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}):
        _, layer = lora_layer(bias=True, **options)
        layer(x)
    model, layer = lora_layer()
    _, narrow = lora_layer(dtype=torch.bfloat16)
    narrow(x)  # adapters in bfloat16 and no autocast: PEFT casts x down
    layer(x, adapter_names=["default", "__base__", "default"])
    for register in (layer.base_layer.register_forward_hook, register_module_forward_hook):  # of all modules
        handle = register(lambda *_: None)
        layer(x)
        handle.remove()
    with model.disable_adapter():
        layer(x)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["layer"]))
    model.base_model.set_adapter(["default", "second"])
    layer(x)
    model.base_model.set_adapter("default")
    train_tables(model)
    model.base_model.model.layer(x)


def test_dropout_outside_training_and_merged_layers():
    _, layer = lora_layer(lora_dropout=0.5)
    x = torch.randn(3, K)
    assert layer._plain_adapter(x) is None
    layer.eval()
    assert layer._plain_adapter(x) == "default"
    out = layer(x)
    layer.merge()
    assert layer._plain_adapter(x) is None
    torch.testing.assert_close(layer(x), out, rtol=1e-4, atol=1e-4)
