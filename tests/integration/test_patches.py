"""Patches of other libraries: every guard holds here, and one that fails says what changed and what to do."""

import copy
import dataclasses
import importlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from small_models import logits_of, make_model

from lowra import LowRAConfig
from lowra.integrations import fsdp_replacements, patching
from lowra.integrations.patches import TABLE
from lowra.integrations.patching import LibraryChanged, Patch, install_patches, require_patches


@pytest.mark.parametrize("patch", TABLE, ids=lambda patch: patch.target.rpartition(":")[2])
def test_every_guard_holds_and_every_row_says_why(patch):
    patch.check()
    assert patch.why.endswith(".") and patch.door and patch.since


def installed():
    return [patch for patch in TABLE if patch.wrap is not None and not patch.optional]


@pytest.mark.parametrize("patch", installed(), ids=lambda patch: patch.target.rpartition(":")[2])
def test_replacements_look_like_the_originals(patch):
    module, _, path = patch.target.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    found = found.fget if isinstance(found, property) else found
    assert found.__wrapped__ is not None and found.__module__ == found.__wrapped__.__module__
    assert found.__qualname__ == found.__wrapped__.__qualname__ and found.__doc__ == found.__wrapped__.__doc__


def load_adapter_of_tomorrow(self, source, name, **options):
    """Takes other parameters than today's."""


def test_a_share_of_integers_is_frozen_from_the_start(monkeypatch):
    """What FSDP2 of PyTorch before 2.12 does with a frozen parameter, with and without the replacement."""
    module = types.ModuleType("fsdp2_before_2_12")
    source = "def share(self, param):\n    self.share = nn.Parameter(param.detach())\n    assert nn.Module"
    exec(source, vars(module))  # noqa: S102
    module.nn, module.share.__module__ = torch.nn, module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fsdp_replacements, "SHARDS_INTEGERS", False)
    holder = types.SimpleNamespace()
    codes, factor = torch.ones(3, dtype=torch.uint8), torch.ones(3)
    with pytest.raises(RuntimeError, match="floating point"):
        module.share(holder, codes)
    share = fsdp_replacements.integers_without_gradients(module.share)
    share(holder, codes)
    assert torch.equal(holder.share, codes) and not holder.share.requires_grad
    share(holder, factor)
    assert holder.share.requires_grad and module.nn is torch.nn


CHANGES = {
    "renamed parameters": (
        lambda m: m.setattr(PeftModel, "load_adapter", load_adapter_of_tomorrow),
        "peft.peft_model:PeftModel.load_adapter",
        r"^peft .* has changed peft.peft_model:PeftModel.load_adapter \(it takes no model_id, adapter_name any more\)",
    ),
    "gone": (
        lambda m: m.delattr(BaseTuner, "_check_merge_allowed"),
        "peft.tuners.tuners_utils:BaseTuner._check_merge_allowed",
        r"_check_merge_allowed \(it is gone\), .* would merge into packed bytes.*docs/versions.md, or a newer lowra",
    ),
    "something else": (
        lambda m: m.setattr(transformers.PreTrainedModel, "save_pretrained", "elsewhere"),
        "transformers.modeling_utils:PreTrainedModel.save_pretrained",
        r"^transformers .* \(it cannot be called any more\)",
    ),
    "what else it needs": (
        lambda m: m.delattr(LoraConfig, "_register_custom_module"),
        "peft.tuners.tuners_utils:BaseTuner.inject_adapter",
        r"has changed peft:LoraConfig._register_custom_module \(it is gone\)",
    ),
    "a whole module": (
        lambda m: None,
        "peft.rooms_of_tomorrow:Thing.method",
        r"^peft .* has changed peft.rooms_of_tomorrow:Thing.method \(it is gone\)",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_library_is_named_and_left_as_it_is(monkeypatch, tmp_path, case):
    change, target, message = CHANGES[case]
    rows = [patch for patch in TABLE if patch.target == target]
    row = rows[0] if rows else Patch(target, "Why.", "none", "none", wrap=lambda original: original)
    change(monkeypatch)
    with pytest.raises(LibraryChanged, match=message):
        row.check()

    monkeypatch.setattr(patching, "_failed", [])
    with pytest.warns(RuntimeWarning, match="Packed models are refused: "):
        install_patches([row])
    make_model("LlamaForCausalLM").save_pretrained(tmp_path) if case != "something else" else None
    with pytest.raises(LibraryChanged, match=message):
        require_patches()
    if case != "something else":
        model_class = transformers.AutoModelForCausalLM
        model_class.from_pretrained(tmp_path)  # dense models go on as before
        with pytest.raises(ImportError, match=message):
            model_class.from_pretrained(tmp_path, load_in_lowra=True)


def test_what_other_versions_do_not_have_is_left_out():
    row = Patch(
        "peft.rooms_of_tomorrow:function", "Why.", "none", "none", optional=True, wrap=lambda original: original
    )
    row.check()
    row.install()
    with pytest.raises(LibraryChanged):
        dataclasses.replace(row, optional=False).check()


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "Qwen3ForCausalLM", "MixtralForCausalLM"])
def test_patched_models_are_copied_and_pickled(architecture, tmp_path):
    make_model(architecture).save_pretrained(tmp_path)
    model_class = getattr(transformers, architecture)
    embeddings = architecture != "MixtralForCausalLM"
    config = LowRAConfig(bits=2.0, quantize_embeddings=embeddings)
    model = model_class.from_pretrained(tmp_path, quantization_config=config).eval()
    expected = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (logits_of(other) == expected).all()
        if embeddings:
            with pytest.raises(ValueError, match="cannot be resized to 7"):
                other.resize_token_embeddings(7)
            assert other.resize_token_embeddings() is other.get_input_embeddings()


def test_dense_models_are_as_without_lowra(tmp_path):
    """PEFT's and Transformers' usual journeys: outputs, state, exceptions, warnings and the bytes of files."""
    script, root = pathlib.Path(__file__).with_name("peft_journeys.py"), pathlib.Path(__file__).parents[2]
    surroundings = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": str(root)}
    runs = {}
    for name, options in {"without": [], "with": ["--lowra"]}.items():
        (tmp_path / name).mkdir()
        with (tmp_path / name / "log").open("w") as log:
            command = [sys.executable, str(script), str(tmp_path / name), *options]
            runs[name] = subprocess.Popen(command, env=surroundings, stdout=log, stderr=subprocess.STDOUT)
    for name, run in runs.items():
        assert run.wait() == 0, (tmp_path / name / "log").read_text()[-2000:]
    without, found = (json.loads((tmp_path / name / "results.json").read_text()) for name in runs)
    assert without.keys() == found.keys() and len(found) > 100
    assert sum("result" in journey for journey in without.values()) > 70  # most come to an end, with every PEFT
    assert {name: found[name] for name in found if found[name] != without[name]} == {
        name: without[name] for name in found if found[name] != without[name]
    }
