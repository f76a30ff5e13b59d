"""A base that was packed with `--rank`, used without its adapter, says so once; other bases never do."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from small_models import inputs_of, logits_of
from transformers import AutoModelForCausalLM

import lowra


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def said(caplog):
    found = [
        record.getMessage() for record in caplog.records if "packed together with an initial" in record.getMessage()
    ]
    caplog.clear()
    return found


@pytest.fixture(scope="module", params=["loftq", "pissa"])
def started(request, dense_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / request.param
    recipe = lowra.AdapterRecipe(4, method=request.param)
    lowra.quantize_checkpoint(str(dense_llama), folder, lowra.LowRAConfig(bits=2), recipe, progress=False)
    return folder


def test_alone_it_says_so_once(started, caplog):
    model = load(started)
    assert not said(caplog)
    logits = logits_of(model)
    (message,) = said(caplog)
    assert started.name in message and "rank 4" in message and str(started / "initial_adapter") in message
    assert torch.equal(logits_of(model), logits) and not said(caplog)
    assert load(started).model.layers[0].mlp.up_proj(torch.ones(1, 64)).shape == (1, 104)  # other layers say nothing
    assert not said(caplog)


def test_with_its_adapter_or_one_trained_from_it_it_does_not(started, caplog, tmp_path):
    model = PeftModel.from_pretrained(load(started), started / "initial_adapter", is_trainable=True)
    with model.disable_adapter():
        logits_of(model)  # as a reference model
    model.train()(input_ids=inputs_of(model)["input_ids"]).logits.sum().backward()
    model.save_pretrained(tmp_path)
    logits_of(PeftModel.from_pretrained(load(started), tmp_path))
    other = load(started)
    other.load_adapter(str(tmp_path))
    logits_of(other)
    assert not said(caplog)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=5, target_modules="all-linear"), IA3Config(target_modules=["k_proj"], feedforward_modules=[])],
)
def test_an_adapter_that_starts_anew_is_told_of_the_start(started, caplog, config):
    model = get_peft_model(load(started), config)
    logits_of(model)
    (message,) = said(caplog)
    assert (
        "adapter 'default' starts anew" in message and f"{started / 'initial_adapter'}', is_trainable=True" in message
    )
    logits_of(model)
    assert not said(caplog)
    added = load(started)
    added.add_adapter(copy.deepcopy(config), "law")
    logits_of(added)
    assert "adapter 'law' starts anew" in said(caplog)[0]


@pytest.mark.parametrize("recipe", [None, lowra.AdapterRecipe(4, method="lora")])
def test_whole_bases_say_nothing(dense_llama, tmp_path, caplog, recipe):
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "whole", lowra.LowRAConfig(bits=2), recipe, progress=False)
    logits_of(load(tmp_path / "whole"))
    logits_of(load(dense_llama, load_in_lowra=True, lowra_bits=2.0))
    logits_of(get_peft_model(load(tmp_path / "whole"), LoraConfig(r=4, target_modules="all-linear")))
    assert not said(caplog)


def test_checkpoints_of_earlier_versions_are_known_by_the_folder_beside_them(started, tmp_path, caplog):
    old = shutil.copytree(started, tmp_path / "old")
    (old / "lowra_digests.json").unlink()
    config = json.loads((old / "config.json").read_text())
    for name in ("packing", "initial_adapter", "calibration"):
        del config["quantization_config"][name]
    (old / "config.json").write_text(json.dumps(config))
    logits_of(load(old))
    assert str(old / "initial_adapter") in said(caplog)[0]
    shutil.rmtree(old / "initial_adapter")
    logits_of(load(old))
    assert not said(caplog)  # nothing tells


def test_saved_elsewhere_it_still_knows(started, tmp_path, caplog):
    load(started).save_pretrained(tmp_path)
    logits_of(load(tmp_path))
    assert "Load the initial_adapter of the checkpoint" in said(caplog)[0]


def test_waiting_models_are_copied_pickled_and_compiled(started, caplog):
    model = load(started)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        logits_of(twin)
        assert len(said(caplog)) == 1
    assert torch.equal(
        torch.compile(model, backend="eager", fullgraph=True)(**inputs_of(model)).logits, logits_of(twin)
    )


@pytest.mark.parametrize("kept", [None, copy.deepcopy])
def test_compiled_it_says_so_too(started, caplog, kept):
    model = load(started) if kept is None else kept(load(started))
    compiled = torch.compile(model, backend="eager")
    logits_of(compiled)
    assert len(said(caplog)) == 1
    logits_of(compiled)
    logits_of(model)
    assert not said(caplog)
    adapted = PeftModel.from_pretrained(load(started), started / "initial_adapter").eval()
    logits_of(torch.compile(adapted, backend="eager"))
    assert not said(caplog)


def test_dequantised_it_says_so_unless_an_adapter_was_merged(started, caplog):
    load(started).dequantize()
    assert "lowra.merge_into_dense" in said(caplog)[0]
    lowra.merge_into_dense(PeftModel.from_pretrained(load(started), started / "initial_adapter"))
    PeftModel.from_pretrained(load(started), started / "initial_adapter").merge_and_unload().dequantize()
    assert not said(caplog)
    with pytest.raises(TypeError, match="expects a PeftModel"):
        lowra.merge_into_dense(load(started))


def unload(model):
    return model.unload()


def delete(model):
    model.delete_adapter("default")
    return model.base_model.model


def to_a_new_one(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    return model


@pytest.mark.parametrize("taken_away", [unload, delete, to_a_new_one])
@pytest.mark.parametrize("used_before", [False, True])
def test_an_adapter_that_is_taken_away_again_is_missed(started, caplog, taken_away, used_before):
    model = PeftModel.from_pretrained(load(started), started / "initial_adapter").eval()
    if used_before:
        logits_of(model)
        logits_of(pickle.loads(pickle.dumps(model)))
    assert not said(caplog)
    bare = taken_away(model)
    logits_of(bare)
    assert len(said(caplog)) == 1
    logits_of(bare)
    assert not said(caplog)
