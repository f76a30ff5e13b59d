"""The wheel in a clean environment: beside upstream's bitsandbytes, without a compiler and without the extras.

    python scripts/smoke_wheel.py [WHEEL]

Without WHEEL one is built (where `make build` has run, from its objects). The environment takes its dependencies from
the one this runs in, by hard links, and everything of lowra and of the extras is left out; pip then installs the wheel
alone. In it, with no other program on the path: `lowra --version`, `lowra env`, quantise a tiny model, fine-tune an
adapter on it, generate, and what an extra is missing for. Prints what was tried and the sizes; ends with status 1 where
something is not as it should be.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

_OWN = ("lowra", "lowra_command", "lowra_autoload.py", "lowra-")
_EXTRAS = ("pulp", "highspy", "sklearn", "scikit_learn", "matplotlib", "datasets", "rouge_score")

_MAKE_MODEL = """
import sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("tiny")
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_ = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token=letters[0], eos_token=letters[1]).save_pretrained("tiny")
"""
_RECIPE = (
    "model: packed\ntrain_file: text.txt\nvalidation_file: text.txt\noutput: run\nblock_size: 64\nbatch_size: 2\n"
    "accumulation: 1\nmax_steps: 3\nrank: 4\nbf16: false\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=pathlib.Path)
    args = parser.parse_args()
    start = time.perf_counter()
    beside = pathlib.Path(sys.prefix).parent  # hard links need the same file system
    with tempfile.TemporaryDirectory(dir=beside if os.access(beside, os.W_OK) else None) as at:
        place = pathlib.Path(at)
        wheel = build(place) if args.wheel is None else args.wheel.resolve()
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
        python = clean_environment(place / "venv")
        run([python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", str(wheel)], place)
        try_everything(python, place)
    print(f"all as it should be, after {time.perf_counter() - start:.0f} s")


def build(place: pathlib.Path) -> pathlib.Path:
    """A wheel of the working tree."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "-w", str(place)]
    subprocess.run(command, check=True)
    return next(place.glob("*.whl"))


def clean_environment(venv: pathlib.Path) -> str:
    """An environment with the dependencies of this one, without lowra and what its extras bring; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    theirs = pathlib.Path(sysconfig.get_paths()["purelib"])
    ours = pathlib.Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    for entry in theirs.iterdir():
        if entry.name.startswith(_EXTRAS) or entry.name in _OWN or entry.name.startswith(_OWN[-1]):
            continue
        if entry.is_dir():
            shutil.copytree(entry, ours / entry.name, copy_function=_link, dirs_exist_ok=True)
        else:
            _link(entry, ours / entry.name)
    shutil.rmtree(ours / "bitsandbytes" / "backends" / "lowra")
    return str(venv / "bin" / "python")


def _link(source: str | pathlib.Path, to: str | pathlib.Path) -> None:
    try:
        os.link(source, to)
    except OSError:  # another file system
        shutil.copy2(source, to)


def try_everything(python: str, place: pathlib.Path) -> None:
    """The commands of a first hour, in the order in which they are typed."""
    lowra = str(pathlib.Path(python).with_name("lowra"))
    (place / "text.txt").write_text("A line of text to train on, again and again.\n" * 50)
    (place / "recipe.yaml").write_text(_RECIPE)
    expect("lowra" in run([lowra, "--version"], place), "lowra --version")
    found = last_object(run([lowra, "env", "--json"], place))
    cpu = found["kernels"]["cpu"]
    expect(found["libraries"]["cpu"]["loaded"] and cpu["tried"] == "works", f"lowra env: {cpu['in_use']} kernels")
    expect(not found["switched_off"], "every integration holds")
    where = run([python, "-c", "import bitsandbytes; print(bitsandbytes.__file__)"], place)
    expect(str(place) in where, "upstream's bitsandbytes is imported beside it")
    run([python, "-c", _MAKE_MODEL], place)
    quantize = ["quantize", "tiny", "--bits", "2", "--rank", "4", "--output", "packed", "--device", "cpu", "--json"]
    expect(last_object(run([lowra, *quantize], place))["true_bits"] < 4, "lowra quantize")
    tuned = last_object(run([lowra, "finetune", "recipe.yaml", "--json"], place))
    expect(tuned["tuned"]["perplexity"] < tuned["untuned"]["perplexity"], "lowra finetune lowers the perplexity")
    expect(not (place / "run" / "curve.png").exists(), "no picture without matplotlib")
    generate = ["generate", "packed", "--adapter", "run/adapter", "--prompt", "A line", "--tokens", "4", "--json"]
    expect(last_object(run([lowra, *generate], place))["tokens"] == 4, "lowra generate")
    said = run([lowra, "inspect", "packed", "--plot", "."], place, status=2)
    expect("lowra[pictures]" in said, "a missing extra is named")


def run(command: list[str], place: pathlib.Path, status: int = 0) -> str:
    """What a command prints, with nothing on the path but the environment; it must end with this status."""
    environment = {"PATH": str(place / "venv" / "bin"), "HOME": str(place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != status:
        sys.exit(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout + (done.stderr if status else "")


def last_object(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def expect(true: object, what: str) -> None:
    if not true:
        sys.exit(f"not so: {what}")
    print(f"  {what}", flush=True)


if __name__ == "__main__":
    main()
