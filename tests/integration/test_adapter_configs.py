"""What stands in adapter_config.json is checked by PEFT's own fields on packed bases, and no more than that."""

import json
import shutil

import peft
import pytest
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from lowra.integrations.adapter_configs import check_adapter_config

TAKEN = [
    {"target_modules": "all-linear"},
    {"target_modules": ["a"], "rank_pattern": {"a": 4}, "alpha_pattern": {"a": 8}},
    {"use_dora": True, "init_lora_weights": "gaussian"},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"modules_to_save": ["x"]},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": False},
    {"lora_alpha": 5.5},
    {"trainable_token_indices": {"embed_tokens": [1]}},
    {"layer_replication": [(0, 2), (1, 3)]},
]


@pytest.mark.parametrize("options", TAKEN, ids=str)
def test_what_peft_writes_is_taken(tmp_path, options):
    LoraConfig(**options).save_pretrained(tmp_path)
    check_adapter_config(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("name", ["IA3Config", "VeraConfig", "OFTConfig", "LoHaConfig", "PromptTuningConfig"])
def test_other_methods_are_taken(tmp_path, name):
    getattr(peft, name)().save_pretrained(tmp_path)
    check_adapter_config(tmp_path / "adapter_config.json")


CHANGES = {
    "r": ([4], "4", None, 0.5, float("nan"), {}, 10**400, 10**12),
    "lora_alpha": ([], "8", {"a": 8}, float("inf"), 1e300, -(10**400)),
    "peft_type": (None, "\ud800", 3, "LORB", ["LORA"]),
    "target_modules": (3, [["q_proj"]], {"a": "q_proj"}),
    "bias": ("x", 3, []),
    "alpha_pattern": ("\ud800", 3, [3], {"q_proj": 1e39}, {"q_proj": float("nan")}),
    "use_dora": ({}, "maybe", []),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_it_does_not_take_is_named(packed_llama, tmp_path, name):
    for number, value in enumerate(CHANGES[name]):
        folder = shutil.copytree(packed_llama / "initial_adapter", tmp_path / str(number))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, name: value}))
        model = AutoModelForCausalLM.from_pretrained(packed_llama)
        for call in (
            lambda folder=folder, model=model: PeftModel.from_pretrained(model, folder),
            lambda folder=folder, model=model: model.load_adapter(str(folder)),
        ):
            with pytest.raises(ValueError, match=f"{folder / 'adapter_config.json'}: {name} is ") as error:
                call()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["null", "[]", "1", '"x"', "{}", "[" * 100_000, "", "{"])
def test_other_json_ends_in_one_sentence(packed_llama, tmp_path, text):
    folder = shutil.copytree(packed_llama / "initial_adapter", tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json") as error:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed_llama), folder)
    assert "\n" not in str(error.value)
