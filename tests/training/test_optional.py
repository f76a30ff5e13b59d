"""Packages that only some work needs: without them the rest goes on, and what needs them says what to install."""

import importlib.metadata
import re

import pytest

import lowra
from lowra import optional
from lowra.commands import main
from lowra.training.curve import save_curve
from lowra.training.data import load_data
from lowra.training.finetune import finetune


@pytest.fixture
def bare(monkeypatch):
    """An environment without any of them."""
    monkeypatch.setattr(optional, "installed", lambda name: name not in optional._EXTRAS)
    monkeypatch.setattr("lowra.training.curve.installed", lambda name: name not in optional._EXTRAS)


def test_extras_are_those_of_the_package():
    extras = set(importlib.metadata.metadata("lowra").get_all("Provides-Extra") or ())
    if "pictures" not in extras:
        pytest.skip("the installed metadata is of an earlier build")
    assert set(optional._EXTRAS.values()) <= extras


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    optional.require("a test", "torch")
    monkeypatch.setitem(optional._EXTRAS, "no_such_package", "pictures")
    with pytest.raises(optional.MissingPackage, match=re.escape('pip install "lowra[pictures]"')) as caught:
        optional.require("a test", "no_such_package")
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, ValueError)


def test_the_curve_is_kept_without_matplotlib(bare, tmp_path, caplog):
    save_curve([{"step": 1, "loss": 2.0}], tmp_path, "a run")
    assert (tmp_path / "curve.json").exists() and not (tmp_path / "curve.png").exists()
    assert "lowra[pictures]" in caplog.text


def test_two_level_is_refused_before_the_work(bare, tiny_llama, tmp_path):
    config = lowra.LowRAConfig(assigner="two_level")
    with pytest.raises(ValueError, match=re.escape('lowra[paper]"')):
        lowra.quantize_checkpoint(str(tiny_llama), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["compare", "recipe.yaml", "--methods", "lowra", "--output", "grid"], "pictures"),
        (["inspect", "nowhere", "--plot", "."], "pictures"),
        (["quantize", "{model}", "--assigner", "two_level", "--output", "out"], "paper"),
    ],
)
def test_commands_say_what_to_install(bare, tiny_llama, arguments, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(model=tiny_llama) for argument in arguments]) == 2
    assert f"lowra[{extra}]" in capsys.readouterr().err


def test_summaries_and_hub_data_are_refused_before_the_work(bare, recipe):
    from_hub = recipe.changed(["train_file=", "validation_file=", "dataset=someone/something"])
    with pytest.raises(ValueError, match=re.escape("lowra[hub]")):
        load_data(from_hub, progress=False)
    summaries = recipe.changed(["task=summarization", "source_column=document", "target_column=summary"])
    with pytest.raises(ValueError, match=re.escape("lowra[rouge]")):
        finetune(summaries, progress=False)
