"""New LoRA adapters on a base packed with `--rank` begin from its initial adapter, or say why they cannot."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import logits_of
from transformers import AutoModelForCausalLM

import lowra

ALL = {"target_modules": "all-linear"}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def said(caplog, what):
    return [record.getMessage() for record in caplog.records if what in record.getMessage()]


@pytest.fixture(scope="module")
def expected(packed_llama):
    """Logits of the base with its initial adapter."""
    return logits_of(PeftModel.from_pretrained(load(packed_llama), packed_llama / "initial_adapter").eval())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=4, **ALL),
        LoraConfig(r=4, **ALL),  # alpha 8: twice as much
        LoraConfig(r=4),  # no layers named
        LoraConfig(r=4, use_rslora=True, lora_dropout=0.5, **ALL),
        LoraConfig(r=4, target_modules="model.*_proj"),
    ],
)
@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_a_new_adapter_begins_from_the_stored_one(packed_llama, expected, caplog, config, by):
    model = load(packed_llama)
    if by == "peft":
        model = get_peft_model(model, config).eval()
    else:
        model.add_adapter(config)
        model.eval()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    (message,) = said(caplog, "begins from")
    assert f"adapter 'default' begins from {packed_llama / 'initial_adapter'} (loftq, rank 4)" in message
    assert not said(caplog, "far off")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=8, **ALL), "its rank is 4 and this one's 8"),
        (LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "factors for 10 of 14 layers that this one leaves out"),
        (LoraConfig(r=4, rank_pattern={"q_proj": 2}, **ALL), "its rank is 4 and this one's 2"),
        (LoraConfig(r=4, use_dora=True, **ALL), "the magnitudes of DoRA"),
        (LoraConfig(r=4, init_lora_weights="gaussian", **ALL), "init_lora_weights='gaussian' asks for another start"),
        (LoraConfig(r=8), "factors for 10 of 14 layers that this one leaves out"),
    ],
)
def test_one_that_cannot_says_why_and_starts_as_ever(packed_llama, caplog, config, reason):
    base = load(packed_llama)
    bare = logits_of(base)
    caplog.clear()
    model = get_peft_model(base, config).eval()
    torch.testing.assert_close(logits_of(model), bare)
    (message,) = said(caplog, "cannot begin from")
    assert reason in message and "LoraConfig(r=4, target_modules='all-linear') begins from it" in message


def test_what_is_trained_from_it_is_known_as_such(packed_llama, dense_llama, expected, caplog, tmp_path):
    model = get_peft_model(load(packed_llama), LoraConfig(r=4, **ALL))
    model.save_pretrained(tmp_path / "adapter")
    caplog.clear()
    again = PeftModel.from_pretrained(load(packed_llama), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-5)
    assert not caplog.records  # loading one puts nothing in, and the start has arrived
    with pytest.raises(ValueError, match="began as loftq"):
        lowra.merge_into_dense(again, original=dense_llama)
    merged = lowra.merge_into_dense(again, original=dense_llama, initial=packed_llama / "initial_adapter")
    torch.testing.assert_close(logits_of(merged), logits_of(load(dense_llama)), rtol=1e-3, atol=1e-4)


def test_a_second_adapter_begins_from_it_too_and_loading_puts_nothing_in(packed_llama, expected, tmp_path):
    model = get_peft_model(load(packed_llama), LoraConfig(r=4, **ALL)).eval()
    model.add_adapter("second", LoraConfig(r=4, **ALL))
    model.set_adapter("second")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    model.load_adapter(packed_llama / "initial_adapter", "third")
    model.set_adapter("third")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_without_the_folder_nothing_changes(packed_llama, tmp_path):
    folder = shutil.copytree(packed_llama, tmp_path / "packed")
    shutil.rmtree(folder / "initial_adapter")
    base = load(folder)
    bare = logits_of(base)
    torch.testing.assert_close(logits_of(get_peft_model(base, LoraConfig(r=4, **ALL)).eval()), bare)


def test_a_damaged_start_is_refused(packed_llama, tmp_path):
    folder = shutil.copytree(packed_llama, tmp_path / "packed")
    path = folder / "initial_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="initial_adapter"):
        get_peft_model(load(folder), LoraConfig(r=4, **ALL))
