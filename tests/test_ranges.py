"""Options of every command with values that make no sense: one sentence at once, with status 2."""

import time

import pytest

import lowra
from lowra.commands import main


@pytest.fixture(scope="module")
def place(tiny_llama, tmp_path_factory):
    """A folder with the dense model, a base with a start, one without, and a text."""
    folder = tmp_path_factory.mktemp("ranges")
    (folder / "dense").symlink_to(tiny_llama)
    config = lowra.LowRAConfig(bits=2.0)
    recipe = lowra.AdapterRecipe(rank=4)
    lowra.quantize_checkpoint(str(tiny_llama), folder / "base", config, recipe, progress=False)
    (folder / "text.txt").write_text("some words of text\n" * 100)
    return folder


REFUSED = {
    "plan dense --rank 1000000000": "--rank must be from 1 to 65536",
    "plan dense --batch 1000000000000": "--batch must be from 1 to",
    "plan dense --length 1": "--length must be from 2",
    "plan dense --length 1000000000000": "--length must be from 2",
    "plan dense --optimizer adamw_torc": "did you mean adamw_torch",
    "plan dense --bits nan": "--bits must be from 1 to 4",
    "plan dense --gpu=-1": "--gpu takes a size",
    "plan base --rank 8": "begins with an adapter of rank 4",
    "plan text.txt": "it is a file; give its folder",
    "quantize dense --rank 4 --alpha 1e30 --output new": "alpha must be from 1e-06 to 1e+06",
    "quantize dense --rank 4 --alpha 1e-30 --output new": "alpha must be from 1e-06 to 1e+06",
    "quantize dense --iterations 1000000000 --output new": "iterations must be at most 1000",
    "evaluate base --data text.txt --batch-size 1000000000": "--batch-size must be from 1",
    "evaluate base --data text.txt --block-size 1000": "has 128 positions",
    "evaluate no/model --data missing.txt": "missing.txt",
    "generate base --prompt a --temperature 1e30": "--temperature must be from 0 to 100",
    "generate no/model --prompt a --adapter missing": "missing is no adapter: there is no such folder",
    "evaluate no/model --data text.txt --adapter missing": "missing is no adapter: there is no such folder",
    "chat no/model --adapter missing": "missing is no adapter: there is no such folder",
    "chat base --adapter missing": "missing is no adapter: there is no such folder",
    "chat base --adapter dense": "dense is no adapter",
    "merge base --adapter missing --output new": "missing is no adapter",
    "merge base/config.json --output new": "it is a file; give its folder",
    "export missing --output new": "missing is no adapter",
    "finetune wikitext2 model=base train_file=text.txt alpha=1e30": "alpha must be positive and at most 1e+06",
    "finetune wikitext2 model=base train_file=text.txt alpha=1e-30": "alpha must be at least 1e-06",
    "finetune wikitext2 model=base train_file=text.txt epochs=1e30": "positive and at most 1e+06",
    "finetune wikitext2 model=base train_file=text.txt rank=1000000": "rank must be positive and at most 65536",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_makes_no_sense_is_refused_at_once(place, monkeypatch, capsys, line):
    monkeypatch.chdir(place)
    assert main(line.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and REFUSED[line] in said[0]
    assert not (place / "new").exists()


def test_a_plan_takes_the_config_itself(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["plan", "dense/config.json", "--gpu", "8GB"]) == 0
    assert "lowra quantize dense --bits" in capsys.readouterr().out


def test_evaluation_takes_the_positions_that_a_model_has(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["evaluate", "dense", "--data", "text.txt"]) == 0
    assert "blocks of 128" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "inspect", "verify", "generate --prompt a", "evaluate --data text.txt"])
def test_a_model_that_cannot_be_had_is_said_in_a_line(place, monkeypatch, capsys, command):
    """Without retries: the hub is out of reach here, or knows no such name."""
    monkeypatch.chdir(place)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers, at once
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    verb, *options = command.split()
    start = time.monotonic()
    assert main([verb, "nobody/nosuchmodel", *options]) == 2
    assert time.monotonic() - start < 15
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "could it be had from the hub" in said[0].replace("its config.json", "it")
