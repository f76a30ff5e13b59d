"""`lowra merge` and `lowra export`: what they write computes the same; wrong combinations are refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowra
from lowra_command import main

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TOKENS = torch.arange(3, 35)[None]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits.float()


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tiny_llama):
    """The tiny model in float32, so that rounding hides nothing."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    load(tiny_llama).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory, dense):
    folder = tmp_path_factory.mktemp("packed") / "base"
    config, recipe = lowra.LowRAConfig(bits=1.5), lowra.AdapterRecipe(rank=4)
    lowra.quantize_checkpoint(str(dense), folder, config, recipe, progress=False)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, packed):
    """Trained from the start, at twice its alpha, with a chat template of its own."""
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    torch.manual_seed(1)
    model = get_peft_model(load(packed), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_with_the_base_that_it_names(packed, adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = logits(PeftModel.from_pretrained(load(packed), adapter).eval())
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert result["parameters"] == merged.num_parameters() and result["base"] == str(packed)
    assert "lowra" not in (tmp_path / "merged" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE
    assert not list((tmp_path / "merged").glob("*lowra*"))


def test_what_was_learned_goes_onto_the_original_merged_or_as_an_adapter(dense, packed, adapter, tmp_path, capsys):
    command = ["merge", str(packed), "--adapter", str(adapter), "--original", str(dense)]
    assert main([*command, "--output", str(tmp_path / "merged")]) == 0
    assert main(["export", str(adapter), "--output", str(tmp_path / "lora"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rank"] == 8
    merged, original = logits(load(tmp_path / "merged")), logits(load(dense))
    exported = logits(PeftModel.from_pretrained(load(dense), tmp_path / "lora").eval())
    torch.testing.assert_close(exported, merged, rtol=1e-4, atol=1e-4)
    assert (merged - original).abs().max() > 0.01  # something was learned
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(dense)
    with pytest.raises(ValueError, match="its start, loftq, .* has been taken out"):
        PeftModel.from_pretrained(load(packed), tmp_path / "lora")
    assert main(["export", str(tmp_path / "lora"), "--output", str(tmp_path / "again")]) == 2
    assert "was converted already" in capsys.readouterr().err


def test_an_untrained_adapter_learned_nothing(dense, packed, tmp_path):
    assert main(["export", str(packed / "initial_adapter"), "--output", str(tmp_path / "lora")]) == 0
    exported = logits(PeftModel.from_pretrained(load(dense), tmp_path / "lora").eval())
    torch.testing.assert_close(exported, logits(load(dense)), rtol=1e-4, atol=1e-4)


def test_a_base_without_start_is_written_dense(dense, tmp_path):
    lowra.quantize_checkpoint(str(dense), tmp_path / "whole", lowra.LowRAConfig(bits=2), progress=False)
    assert main(["merge", str(tmp_path / "whole"), "--output", str(tmp_path / "out")]) == 0
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(tmp_path / "whole")), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_wrong_combinations_are_refused_and_nothing_is_written(dense, packed, adapter, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "out"
    lowra.quantize_checkpoint(str(dense), other, lowra.LowRAConfig(bits=2), lowra.AdapterRecipe(4), progress=False)
    nameless = shutil.copytree(adapter, tmp_path / "nameless")
    settings = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    moved = shutil.copytree(adapter, tmp_path / "moved")
    (moved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/was/here"}))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    cases = [
        (["merge", packed, "--output", out], "holds a part of its weights: give --adapter"),
        (["merge", dense, "--output", out], "is no packed base of lowra"),
        (["merge", adapter, "--adapter", adapter, "--output", out], "is an adapter itself"),
        (["merge", nameless, "--output", out], "does not say which base it belongs to"),
        (["merge", moved, "--output", out], f"is now, lowra merge BASE --adapter {moved}."),
        (["merge", other, "--adapter", adapter, "--output", out], "at 1.4995 nominal bits"),
        (["merge", packed, "--adapter", dense, "--output", out], "is no adapter"),
        (["merge", adapter, "--output", taken], "is not empty"),
        (["merge", packed, "--original", dense, "--output", out], "nothing to put onto the original"),
        (["merge", tmp_path / "nowhere", "--output", out], "nowhere"),
        (["export", packed, "--output", out], "is no adapter"),
        (["export", tmp_path / "nowhere", "--output", out], "there is no such folder"),
        (["export", adapter, "--initial", other / "initial_adapter", "--output", out], "is not what the adapter began"),
        (["export", adapter, "--initial", tmp_path, "--output", out], "give --initial PATH"),
    ]
    for command, message in cases:
        assert main([str(word) for word in command]) == 2, command
        said = capsys.readouterr().err
        assert message in said and said.count("\n") >= 1, said
        assert not out.exists()


def test_an_adapter_that_diverged_is_refused(packed, tmp_path, capsys):
    model = PeftModel.from_pretrained(load(packed), packed / "initial_adapter")
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(packed), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 2
    assert "is not finite once merged" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_factors_of_unknown_start_are_not_taken_for_those_of_the_base(dense, packed, tmp_path, capsys):
    """As hotswap_adapter_from_state_dict leaves them: taking a start off that they never had would go unnoticed."""
    model = get_peft_model(load(packed), LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian"))
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    model.save_pretrained(tmp_path / "loose")
    assert json.loads((tmp_path / "loose" / "lowra_base.json").read_text())["init"] == "unknown"
    for command in (
        ["export", tmp_path / "loose"],
        ["merge", packed, "--adapter", tmp_path / "loose", "--original", dense],
    ):
        assert main([*map(str, command), "--output", str(tmp_path / "out")]) == 2
        assert "Nothing tells what" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_start_for_an_adapter_without_one_is_refused(dense, packed, tmp_path, capsys):
    lowra.quantize_checkpoint(str(dense), tmp_path / "whole", lowra.LowRAConfig(bits=2), progress=False)
    model = get_peft_model(load(tmp_path / "whole"), LoraConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "anew")
    command = ["export", str(tmp_path / "anew"), "--output", str(tmp_path / "out")]
    assert main([*command, "--initial", str(packed / "initial_adapter")]) == 2
    assert "leave --initial out" in capsys.readouterr().err
    assert main(command) == 0
