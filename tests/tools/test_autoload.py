"""Packed checkpoints open without an `import lowra`; programs that open none never meet it."""

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import other_processes
import pytest

import lowra

SOURCE = pathlib.Path(__file__).parents[2] / "lowra" / "autoload.py"
OFF = {"LOWRA_AUTOLOAD": "0"}

# Prints what a packed model and its adapter compute, in a process that never says `import lowra`.
SCRIPT = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, pipeline
from peft import AutoPeftModelForCausalLM
dense, packed = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(dense)
assert "lowra" not in sys.modules, "a dense model imported lowra"
tokens = torch.arange(3, 15)[None]
adapted = AutoPeftModelForCausalLM.from_pretrained(packed + "/initial_adapter").eval()
spoken = pipeline("text-generation", model=packed, device="cpu")
import lowra_autoload
print(json.dumps({
    "adapted": adapted(tokens).logits.sum().item(),
    "bare": spoken.model(tokens).logits.sum().item(),
    "layer": type(spoken.model.model.layers[0].mlp.up_proj).__name__,
    "state": lowra_autoload.state(),
    "watching": [type(finder).__name__ for finder in sys.meta_path if type(finder).__module__ == "lowra_autoload"],
    "owner": transformers.PreTrainedConfig.get_config_dict.__func__.__code__.co_filename,
}))
"""


def python(script, *arguments, **environment):
    """Runs a script in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    surroundings = other_processes.environment(**environment)
    return subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=300)


@pytest.fixture(scope="module")
def installed():
    """The module that the installed wheel brings."""
    if not list(importlib.metadata.entry_points(group="torch.backends", name="lowra")):
        pytest.skip("the lowra that is installed is older than its door in torch.backends: `make build` renews it")


@pytest.fixture
def autoload(monkeypatch):
    """The module, fresh, in a process that looks as if lowra had not been imported."""
    monkeypatch.delitem(sys.modules, "lowra")
    monkeypatch.delenv("LOWRA_AUTOLOAD", raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    loader = importlib.machinery.SourceFileLoader("lowra_autoload", str(SOURCE))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("lowra_autoload", loader))
    loader.exec_module(module)
    return module


def configurations(content):
    """A module as transformers.configuration_utils is one, whose config.json has this content."""

    class PreTrainedConfig:
        @classmethod
        def get_config_dict(cls, path, **kwargs):
            return content, kwargs

    module = types.ModuleType("transformers.configuration_utils")
    module.PreTrainedConfig = PreTrainedConfig
    return module


def watches(module):
    return [finder for finder in sys.meta_path if type(finder).__module__ == module.__name__]


def imports(name):
    with pytest.raises(ImportError):
        importlib.import_module(name)


def test_the_wheel_declares_it():
    text = (SOURCE.parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."torch.backends"]\nlowra = "lowra_autoload:install"' in text
    assert "RENAME lowra_autoload.py" in (SOURCE.parents[1] / "CMakeLists.txt").read_text()


def test_base_adapter_and_pipeline_load_in_a_process_that_never_imports_lowra(installed, packed_with_tokenizer):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dense, packed = packed_with_tokenizer
    done = python(SCRIPT, dense, packed)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    tokens = torch.arange(3, 15)[None]
    model = AutoModelForCausalLM.from_pretrained(packed).eval()
    assert found["bare"] == pytest.approx(model(tokens).logits.sum().item(), rel=1e-4)
    adapted = PeftModel.from_pretrained(model, packed / "initial_adapter").eval()
    assert found["adapted"] == pytest.approx(adapted(tokens).logits.sum().item(), rel=1e-4)
    assert found["layer"] == "LowRALinear" and found["state"] == "on: lowra has been imported"
    assert not found["watching"] and "integrations" in found["owner"]


def test_turned_off_it_is_transformers_alone(installed, packed_with_tokenizer):
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    done = python(script, packed_with_tokenizer[1], **OFF)
    assert done.returncode != 0 and "Unknown quantization type, got lowra" in done.stderr
    assert "the Python package lowra" in (packed_with_tokenizer[1] / "config.json").read_text()
    card = (packed_with_tokenizer[1] / "README.md").read_text()
    assert "needs the Python package lowra" in card and "Unknown quantization" in card


def test_it_waits_and_leaves_other_configurations_alone(autoload, monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.configuration_utils")
    autoload.install()
    autoload.install()
    assert len(watches(autoload)) == 1 and autoload.state() == "on: waits for a packed checkpoint"
    imports("there_is_no_such_module")
    assert len(watches(autoload)) == 1
    dense = configurations({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})
    original = vars(dense.PreTrainedConfig)["get_config_dict"]
    monkeypatch.setitem(sys.modules, "transformers.configuration_utils", dense)
    imports("there_is_no_such_module")
    assert not watches(autoload)
    assert dense.PreTrainedConfig.get_config_dict("a", revision="b")[1] == {"revision": "b"}
    assert "lowra" not in sys.modules
    autoload.leave()
    assert vars(dense.PreTrainedConfig)["get_config_dict"] is original


@pytest.mark.parametrize("content", [None, {}, {"quantization_config": None}, {"quantization_config": "lowra"}])
def test_odd_configurations_are_left_to_transformers(autoload, monkeypatch, content):
    odd = configurations(content)
    monkeypatch.setitem(sys.modules, "transformers.configuration_utils", odd)
    autoload.install()
    imports("there_is_no_such_module")
    assert odd.PreTrainedConfig.get_config_dict("a") == (content, {})
    assert "lowra" not in sys.modules


def test_the_first_packed_configuration_imports_lowra_once(autoload, monkeypatch):
    packed = configurations({"quantization_config": {"quant_method": "lowra"}})
    original = vars(packed.PreTrainedConfig)["get_config_dict"]
    monkeypatch.setitem(sys.modules, "transformers.configuration_utils", packed)
    autoload.install()
    imports("there_is_no_such_module")
    assert vars(packed.PreTrainedConfig)["get_config_dict"] is not original
    monkeypatch.setitem(sys.modules, "lowra", lowra)  # what the import finds
    assert packed.PreTrainedConfig.get_config_dict("a")[0] == {"quantization_config": {"quant_method": "lowra"}}
    assert vars(packed.PreTrainedConfig)["get_config_dict"] is original
    assert autoload.state() == "on: lowra has been imported"


def test_a_lowra_that_cannot_be_imported_is_named(autoload, monkeypatch):
    packed = configurations({"quantization_config": {"quant_method": "lowra"}})
    monkeypatch.setitem(sys.modules, "transformers.configuration_utils", packed)
    autoload.install()
    imports("there_is_no_such_module")
    monkeypatch.setitem(sys.modules, "lowra", None)
    with pytest.raises(ImportError, match="some/folder is packed by lowra, which is installed but cannot be imported"):
        packed.PreTrainedConfig.get_config_dict("some/folder")
    assert autoload.state().startswith("failed: ModuleNotFoundError")


def test_a_transformers_without_the_method_is_told_and_no_import_fails(autoload, monkeypatch):
    other = types.ModuleType("transformers.configuration_utils")
    other.PreTrainedConfig = type("PreTrainedConfig", (), {})
    monkeypatch.setitem(sys.modules, "transformers.configuration_utils", other)
    autoload.install()
    imports("there_is_no_such_module")
    assert autoload.state() == "failed: KeyError: 'get_config_dict'"


@pytest.mark.parametrize("value", ["0", "false", " OFF "])
def test_the_switch(autoload, monkeypatch, value):
    monkeypatch.setenv("LOWRA_AUTOLOAD", value)
    autoload.install()
    assert not watches(autoload) and autoload.state() == f"turned off by LOWRA_AUTOLOAD={value}"


def test_after_an_import_of_lowra_it_does_nothing(autoload, monkeypatch):
    monkeypatch.setitem(sys.modules, "lowra", lowra)
    autoload.install()
    assert not watches(autoload) and autoload.state() == "on: lowra has been imported"
