"""Calibration of fused experts, heads and embeddings: against autograd's own sums, and through to a packed model."""

from functools import partial

import pytest
import torch
import transformers
from small_models import make_model
from transformers import AutoTokenizer

import lowra
from lowra.quantization.calibration import DAMPING, calibrate
from lowra.quantization.observers import ExpertStatistics

TEXT = ["The quick brown fox jumps over the lazy dog. " * 20] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama):
    """Writes a small model with a byte tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def write(architecture, **changes):
        path = tmp_path_factory.mktemp(architecture)
        make_model(architecture, vocab_size=256, **changes).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return write


def add_squares(total, gradient):
    total += gradient.square().sum(0)


def model_and_sequences(path, architecture):
    model = getattr(transformers, architecture).from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    length = min(1024, model.config.max_position_embeddings)
    ids = [token for row in TEXT for token in tokenizer(row)["input_ids"]]
    return model, torch.tensor(ids[: len(ids[:256]) // length * length]).view(-1, length)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_experts(folder, architecture, checkpointing, monkeypatch):
    path = folder(architecture)
    model_class = getattr(transformers, architecture)
    monkeypatch.setattr(model_class, "supports_gradient_checkpointing", checkpointing)
    found = calibrate(str(path), TEXT, tokens=256, device="cpu", progress=False)
    model, sequences = model_and_sequences(path, architecture)
    model.config._experts_implementation = "eager"
    name = "model.layers.1.mlp.experts.down_proj"
    module = model.get_submodule(name.rpartition(".")[0])
    weight = module.down_proj
    experts, rows, columns = weight.shape
    squares, tokens, gradients = torch.zeros(experts), torch.zeros(experts), torch.zeros(experts, rows)
    original = torch.nn.functional.linear

    def linear(x, w, bias=None):
        y = original(x, w, bias)
        if w.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
            expert = w.storage_offset() // (rows * columns)
            squares[expert] += x.detach().square().mean(1).sum()
            tokens[expert] += len(x)
            y.register_hook(partial(add_squares, gradients[expert]))
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    for ids in sequences:
        (model(input_ids=ids[None], labels=ids[None]).loss * len(ids)).backward()
    pooled = squares.sum() / tokens.sum()
    expected = gradients / sequences.numel() * (squares / tokens.clamp(min=1) / pooled)[:, None]
    expected += DAMPING * expected.mean()
    assert found.inputs[name].mean().item() == pytest.approx(pooled.item(), rel=1e-4)
    torch.testing.assert_close(found.gradients[name], expected.reshape(-1), rtol=1e-3, atol=1e-12)
    assert set(found.inputs) == set(found.gradients)


def test_an_expert_that_saw_nothing_is_not_free():
    statistics = ExpertStatistics(torch.zeros(2, 3, 4))
    x = torch.ones(5, 4, requires_grad=True)
    y = x @ torch.ones(4, 3)
    statistics.add(0, x, y)
    y.sum().backward()
    statistics.tokens = 5
    weights = statistics.channel_gradients(DAMPING).view(2, 3)
    torch.testing.assert_close(weights[0], torch.full((3,), 1 + DAMPING / 2))
    torch.testing.assert_close(weights[1], torch.full((3,), DAMPING / 2))
    assert torch.equal(statistics.inputs(), torch.ones(4))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM", "BartForConditionalGeneration"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_everything_calibrated_is_packed(folder, tmp_path, architecture, tied):
    path = folder(architecture, tie_word_embeddings=tied)
    found = calibrate(str(path), TEXT, tokens=256, device="cpu", progress=False, head=True, embeddings=True)
    config = lowra.LowRAConfig(bits=1.5, sensitivity="fisher", quantize_head=True, quantize_embeddings=True)
    report = lowra.quantize_checkpoint(str(path), tmp_path / "a", config, None, "cpu", False, found)
    assert report["nominal_bits"] <= 1.5
    model = getattr(transformers, architecture).from_pretrained(tmp_path / "a")
    met = torch.zeros(256, dtype=torch.bool)
    met[[token for row in TEXT for token in transformers.AutoTokenizer.from_pretrained(path)(row)["input_ids"]]] = True
    bits = model.get_input_embeddings().row_bits.float()
    if bits.unique().numel() > 1:
        assert bits[met].mean() > bits[~met].mean()  # rows of tokens that occur are worth more


def test_rows_of_embeddings(folder):
    path = folder("LlamaForCausalLM", tie_word_embeddings=False)
    found = calibrate(str(path), TEXT, tokens=256, device="cpu", progress=False, embeddings=True)
    model, sequences = model_and_sequences(path, "LlamaForCausalLM")
    sums = torch.zeros(256)

    def keep(module, args, out):
        def add(g):
            sums.index_add_(0, args[0].reshape(-1), g.square().mean(-1).reshape(-1))

        out.register_hook(add)

    model.get_input_embeddings().register_forward_hook(keep)
    for ids in sequences:
        (model(input_ids=ids[None], labels=ids[None]).loss * len(ids)).backward()
    expected = sums / sequences.numel()
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(found.gradients[name], expected + DAMPING * expected.mean(), rtol=1e-3, atol=1e-10)
    assert torch.equal(found.inputs[name], torch.ones(64))
