"""An adapter that is not there: one sentence at once, by every door, without a word from the hub's retries."""

import json
import pathlib
import time

import pytest
from huggingface_hub import constants
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

import lowra
from lowra.checkpoints import hub


@pytest.fixture(scope="module")
def place(dense_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    recipe = lowra.AdapterRecipe(rank=4)
    lowra.quantize_checkpoint(str(dense_llama), folder / "base", lowra.LowRAConfig(), recipe, progress=False)
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("x")
    return folder


@pytest.fixture
def without_hub(monkeypatch, tmp_path):
    def no_answer():
        raise ConnectionError("no answer")

    monkeypatch.setattr(hub, "get_session", no_answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def by_peft(model, name):
    return PeftModel.from_pretrained(model, name)


def by_mixed(model, name):
    return PeftMixedModel.from_pretrained(model, name)


def by_transformers(model, name):
    model.load_adapter(name)


def as_a_second(model, name):
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).load_adapter(name, "second")


def by_swapping(model, name):
    hotswap_adapter(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")), name, "default")


DOORS = [by_peft, by_mixed, by_transformers, as_a_second, by_swapping]
NAMES = {
    "typo": "typo is no adapter: there is no such folder",
    "./typo": "typo is no adapter: there is no such folder",
    "runs/mine/adapter": "runs/mine/adapter is no adapter: there is no such folder",
    "file.txt": "it is a file; give its folder, .",
    "empty": "empty is no adapter: there is no adapter_config.json in it",
    "someone/typo": "nor could its adapter_config.json be had from the hub: there is no connection to it",
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_is_said_at_once(place, without_hub, monkeypatch, capfd, door, name):
    monkeypatch.chdir(place)
    model = AutoModelForCausalLM.from_pretrained("base")
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=NAMES[name]):
        door(model, name)
    assert time.perf_counter() - started < 3
    assert "Retry" not in "".join(capfd.readouterr())


def test_a_path_with_a_home_says_what_to_give(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    with pytest.raises(FileNotFoundError, match=f"PEFT does not know ~; give {place}/base"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), "~/base")


def test_what_was_downloaded_is_found_without_the_hub(place, without_hub, tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--mine"
    commit = "0" * 40
    for file in (place / "base" / "initial_adapter").iterdir():
        target = snapshot / "snapshots" / commit / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text(commit)
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    assert by_peft(model, "someone/mine").peft_config["default"].r == 4


def test_settings_that_are_given_need_no_file(place, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (place / "base" / "initial_adapter").iterdir():
        if file.name != "adapter_config.json":
            (adapter / file.name).write_bytes(pathlib.Path(file).read_bytes())
    settings = json.loads((place / "base" / "initial_adapter" / "adapter_config.json").read_text())
    config = LoraConfig(r=4, lora_alpha=settings["lora_alpha"], target_modules=settings["target_modules"])
    for given in ({"config": config}, {"adapter_name": "default", "is_trainable": False, "config": config}):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), adapter, **given)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), adapter, "default", False, config)


@pytest.mark.parametrize("name", ["a.b", ""])
def test_a_name_that_pytorch_refuses_is_not_taken_for_damage(place, name):
    with pytest.raises(KeyError, match="module name can"):
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(place / "base"), place / "base" / "initial_adapter", name
        )
