"""Losses and gradients of the head by parts are those of whole logits, and whole logits are never made."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import lowra
from lowra.training import head_by_parts as module
from lowra.training.head_by_parts import head_by_parts

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
}


class Largest(TorchDispatchMode):
    """The largest last size x rows of any tensor that is made with `width` columns."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.width,):
            self.rows = max(self.rows, result.numel() // self.width)
        return result


@pytest.fixture
def few_logits(monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", 200 * 7)  # seven tokens at a time


def _batch(ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 200, (6, 17), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < ignored, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def _models(tmp_path):
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**_SMALL))
    dense.save_pretrained(tmp_path / "dense")
    yield dense
    yield LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=True))
    for name, options in (("packed", {}), ("head", {"quantize_head": True}), ("all", {"quantize_embeddings": True})):
        lowra.quantize_checkpoint(tmp_path / "dense", tmp_path / name, lowra.LowRAConfig(**options), progress=False)
        yield AutoModelForCausalLM.from_pretrained(tmp_path / name)


def test_loss_and_gradients_are_those_of_whole_logits(tmp_path, few_logits):
    for bare in _models(tmp_path):
        model = get_peft_model(bare, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        head = head_by_parts(model)
        for batch, more in ((_batch(), {}), (_batch(0.9, 1), {"num_items_in_batch": torch.tensor(11)})):
            whole = model(**batch, **more).loss
            whole.backward()
            expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            model.zero_grad()
            with Largest(200) as largest, head.active():
                loss = model(**batch, **more).loss
            with largest:
                loss.backward()
            assert 0 < largest.rows <= 32  # the weight of the head itself; the batch has 102 tokens
            torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
            for n, p in model.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-6)
            model.zero_grad()
        assert model(**_batch()).logits.shape == (6, 17, 200)  # as before, outside


def test_a_trained_head_gets_its_gradient(few_logits):
    model = LlamaForCausalLM(LlamaConfig(**_SMALL))
    batch = _batch()
    model(**batch).loss.backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with head_by_parts(model).active():
        model(**batch).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_nothing_to_predict_is_what_it_is_in_transformers(few_logits):
    model = LlamaForCausalLM(LlamaConfig(**_SMALL))
    batch = _batch() | {"labels": torch.full((6, 17), -100)}
    with head_by_parts(model).active():
        assert model(**batch).loss.isnan() and model(**batch, num_items_in_batch=5).loss == 0
    assert model(**batch).loss.isnan() and model(**batch, num_items_in_batch=5).loss == 0


def test_models_that_change_their_logits_keep_them_whole(caplog):
    caplog.set_level("INFO")
    model = Gemma2ForCausalLM(Gemma2Config(**_SMALL))
    before = copy.copy(vars(model.lm_head)), copy.copy(vars(model))
    assert head_by_parts(model) is None
    assert "Gemma2ForCausalLM changes what its head returns" in caplog.text
    assert (vars(model.lm_head).keys(), vars(model).keys()) == (before[0].keys(), before[1].keys())
    assert model(**_batch()).logits.shape == (6, 17, 200)
