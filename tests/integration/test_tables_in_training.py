"""An adapter whose tables are in training, beside others: nobody gets its tables, or loses his own, without a word."""

import peft
import pytest
import torch
from small_models import inputs_of, logits_of
from test_adapter_tables import load, with_tables

import lowra
from lowra.nn.trained_tables import bake_tables, is_training_tables, load_tables, save_tables, train_tables

KINDS = [{"scales": True}, {"shared": True}]
SETTINGS = peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")


@pytest.fixture(params=KINDS, ids=str)
def in_training(request, packed_llama):
    """Two adapters, of which the active one's tables are in training."""
    model = peft.get_peft_model(load(packed_llama), SETTINGS)
    model.add_adapter("other", SETTINGS)
    generator = torch.Generator().manual_seed(4)
    for parameter in train_tables(model, **request.param).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def test_a_batch_or_a_pair_of_adapters_is_refused_as_after_training(in_training):
    inputs = inputs_of(in_training)
    for names in (["default", "other"], ["other", "other"], ["__base__", "__base__"]):
        with pytest.raises(ValueError, match=r"levels and\s+scales"):
            in_training(**inputs, adapter_names=names)
    in_training(**inputs, adapter_names=["default", "default"])
    in_training.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="cannot be used together"):
        in_training(**inputs)


def test_what_would_take_it_apart_is_refused_and_leaves_it(in_training, packed_llama, tmp_path):
    before = logits_of(in_training)
    for end in (in_training.unload, in_training.merge_and_unload, lambda: lowra.merge_into_dense(in_training)):
        with pytest.raises(ValueError, match="bake_tables"):
            end()
    with pytest.raises(ValueError, match="leave them behind"):
        in_training.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    save_tables(peft.get_peft_model(load(packed_llama), SETTINGS), tmp_path)
    with pytest.raises(ValueError, match="after bake_tables"):
        load_tables(in_training, tmp_path)
    assert is_training_tables(in_training) and torch.equal(logits_of(in_training), before)
    bake_tables(in_training)
    dense = lowra.merge_into_dense(in_training)
    assert (logits_of(dense) - before).norm() < 0.02 * before.norm()


def test_an_adapter_that_is_loaded_has_its_tables_and_bakes_none_of_them(in_training, packed_llama, tmp_path):
    trained, before = with_tables(peft.get_peft_model(load(packed_llama), SETTINGS), seed=9), logits_of(in_training)
    trained.save_pretrained(tmp_path / "loaded")
    in_training.save_pretrained(tmp_path / "saved")
    in_training.load_adapter(tmp_path / "loaded", "loaded")
    in_training.load_adapter(tmp_path / "saved", "default")  # as a trainer does that resumes
    assert torch.equal(logits_of(in_training), before)
    in_training.set_adapter("loaded")
    torch.testing.assert_close(logits_of(in_training), logits_of(trained))
    bake_tables(in_training)
    torch.testing.assert_close(logits_of(in_training), logits_of(trained))
    in_training.set_adapter("default")
    again = peft.PeftModel.from_pretrained(load(packed_llama), tmp_path / "saved")
    assert torch.equal(logits_of(in_training), logits_of(again))


def test_a_new_adapter_does_not_inherit_what_was_trained_for_one_of_its_name(in_training):
    in_training.set_adapter("other")
    in_training.delete_adapter("default")
    with pytest.raises(ValueError, match="that was deleted"):
        in_training.add_adapter("default", SETTINGS)
    bake_tables(in_training)
    in_training.add_adapter("default", SETTINGS)
    base = logits_of(in_training)
    in_training.set_adapter("default")
    assert torch.equal(logits_of(in_training), base)


def test_tables_of_the_base_are_told_to_be_missing_beside_an_adapter(packed_llama, tmp_path, caplog):
    settings = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(packed_llama), settings)
    train_tables(model, shared=True)
    model.save_pretrained(tmp_path)
    assert "without the levels and scales that are being trained" in caplog.text
