"""Options of every command with values that make no sense: one sentence at once, with status 2."""

import os
import subprocess
import sys
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
    (folder / "run.yaml").write_text("model: dense\ntrain_file: text.txt\nvalidation_file: text.txt\nblock_size: 16\n")
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
    "merge base --adapter base/initial_adapter --original base --output new": "base is packed itself; the original is",
    "demo --model base --output new": "base is packed already, and the demo packs",
    "evaluate dense --data /proc/self/mem": "/proc/self/mem cannot be read: Input/output error",
    "merge base/config.json --output new": "it is a file; give its folder",
    "export missing --output new": "missing is no adapter",
    "finetune wikitext2 model=base train_file=text.txt alpha=1e30": "alpha must be positive and at most 1e+06",
    "finetune wikitext2 model=base train_file=text.txt alpha=1e-30": "alpha must be at least 1e-06",
    "finetune wikitext2 model=base train_file=text.txt epochs=1e30": "positive and at most 1e+06",
    "finetune wikitext2 model=base train_file=text.txt rank=1000000": "rank must be positive and at most 65536",
}

ADAPTER = {
    "--static-h 1000000000": "--static-h is 1000000000, and the adapter has 4 components in a layer at most",
    "--static-h 5 --split norm": "--static-h is 5",
    "--retire 2020-01-01": "Retirement date 2020-01-01 is past: nobody could load the adapter",
    "--retire 0001-01-01": "is past",
    "--retire 2099-02-30": "is no date",
    "--evaluation a=1 --evaluation b=2 --evaluation a=2": "--evaluation gives a twice",
    "--method gptq --calibration missing.txt": "missing.txt is not there",
    "--method gptq --calibration base": "base is not there; expected a UTF-8 text file",
    "--ratio inf": "ratio is inf",
    "--bits 1000000000000": "expected 1 to 8",
    "--base text.txt": "has no config.json",
}
COMPARE = {
    "lowra --bits 2,nan": "No method has a form at nan bits",
    "lowra --bits 2,1e300": "No method has a form at 1e+300 bits",
    "lowra,loftq --bits 2,4,2": "The number of bits 2.0 is given twice",
    "lowra,loftq,lowra": "The method lowra is given twice",
    "lowra --seeds 0,1,0": "The seed 0 is given twice",
    "lowra --seeds -1": "seed must be",
    "lowra:output=elsewhere": "output has no effect in 'lowra:output=elsewhere'",
    "lowra,loftq:resume=true": "resume has no effect",
    "lowra:save_steps=5": "save_steps has no effect",
    "lowra:seed=3": "seed is given twice",
    # the last of several, and what only Transformers knows: before data are read and the first cell runs
    "lowra,loftq:scheduler=none": "scheduler=none is none of those that there are",
    "lowra,lora16:optimizer=adam": "optimizer=adam is none of those that there are",
    "lowra,lora16:report_to=nobody": "report_to=nobody cannot be used here",
    "lowra:chat_template=x": "chat_template=x has no effect",
}
REFUSED |= {f"adapter quantize base/initial_adapter --output new {line}": said for line, said in ADAPTER.items()}
REFUSED |= {f"compare run.yaml --output new --methods {line}": said for line, said in COMPARE.items()}


@pytest.mark.parametrize("line", REFUSED)
def test_what_makes_no_sense_is_refused_at_once(place, monkeypatch, capsys, line):
    monkeypatch.chdir(place)
    assert main(line.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and REFUSED[line] in said[0]
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    "line",
    [
        "compare run.yaml --methods lowra --output=",
        "quantize dense --output=",
        "merge base --output=",
        "export base/initial_adapter --output=",
        "demo --output=",
        "evaluate base --data text.txt --adapter=",
        "inspect base --plot=",
        "adapter quantize base/initial_adapter --output=",
        "adapter quantize base/initial_adapter --output new --base=",
    ],
)
def test_a_path_of_nothing_is_not_the_folder_that_one_is_in(place, monkeypatch, capsys, line):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2 and "it is empty" in capsys.readouterr().err
    assert sorted(place.iterdir()) == before


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


def test_data_that_cannot_be_had_are_said_in_a_line(place, monkeypatch, capsys):
    """In a process of its own, since what the hub's libraries ask is settled when they are imported."""
    env = dict(os.environ, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(place / "hub"))
    start = time.monotonic()
    command = [sys.executable, "-m", "lowra", "finetune", "wikitext2", "model=dense", "rank=4", "bf16=false"]
    run = subprocess.run([*command, "block_size=16"], cwd=place, env=env, capture_output=True, text=True)
    said = [line for line in run.stderr.splitlines() if line.startswith("lowra: ")]
    assert run.returncode == 2 and time.monotonic() - start < 60
    assert len(said) == 1 and "could not be had from the hub" in said[0] and ". Give train_file=" in said[0]
    assert "Retry" not in run.stderr
