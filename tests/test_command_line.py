"""What can be typed: quick, and in agreement with the code that runs."""

import importlib
import json
import math
import subprocess
import sys

import pytest

from lowra.adapters.loraquant import SPLITS
from lowra.checkpoints import atomic
from lowra.commands import evaluate
from lowra.quantization.calibration import TOKENS
from lowra.quantization.loftq import STEPS
from lowra.training.methods import METHODS
from lowra_command import adapter, build_parser, main, recipes
from lowra_command.parser import Later

SLOW = ("lowra", "torch", "transformers", "peft", "bitsandbytes", "numpy", "pydantic")


def commands():
    """Every parser that runs something, by the words that reach it."""
    found, open_ = {}, {(): build_parser()}
    while open_:
        words, parser = open_.popitem()
        deeper = [action.choices for action in parser._actions if hasattr(action, "add_parser")]
        for choices in deeper:
            open_ |= {(*words, name): sub for name, sub in choices.items()}
        if not deeper:
            found[words] = parser
    return found


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["quantize", "--help"], ["adapter", "quantize", "--help"]]
)
def test_help_needs_no_import_that_takes_seconds(words):
    script = (
        "import sys, lowra_command\n"
        f"try: lowra_command.main({words})\n"
        f"except SystemExit: print('imported', *set({SLOW}) & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported"


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "r", "a=1", "b=2", "--no-memory-check"],
        ["finetune", "r", "a=1", "--no-memory-check", "b=2"],
        ["finetune", "--no-memory-check", "r", "a=1", "b=2"],
        ["compare", "r", "--methods", "lowra", "a=1", "--output", "o", "b=2"],
    ],
)
def test_fields_of_a_recipe_stand_before_options_and_after(words):
    args = build_parser().parse_args(words)
    assert args.config == "r" and args.overrides == ["a=1", "b=2"]


def test_import_brings_no_package_that_only_commands_need():
    script = "import sys, lowra; print(*{'pydantic', 'datasets', 'matplotlib', 'sklearn', 'pulp'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_command_runs_a_function_that_is_there():
    assert len(commands()) > 10
    for words, parser in commands().items():
        run = parser.get_default("run")
        if run is recipes.run:  # needs nothing that is slow to import
            continue
        module, _, name = run.function.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), words


def test_help_says_what_the_code_does():
    def helps(words):
        return commands()[words].format_help().replace("\n", " ")

    assert f"(default: {STEPS})" in helps(("quantize",))
    assert f"(default: {TOKENS})" in helps(("quantize",))
    assert ", ".join(METHODS) in " ".join(helps(("compare",)).split())
    assert adapter.SPLITS == SPLITS


def test_import_leaves_the_compiler_for_its_first_call():
    """Upstream's functions that are compiled compute the same, and torch.compile is PyTorch's own again."""
    script = (
        "import sys, torch, lowra\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules, 'the compiler was imported'\n"
        "assert torch.compile.__module__ == 'torch'\n"
        "import bitsandbytes.functional as functional\n"
        "x = torch.linspace(-1, 1, 4096)\n"
        "back = functional.dequantize_blockwise(*functional.quantize_blockwise(x))\n"
        "assert torch.allclose(back, x, atol=0.02)\n"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)


def test_overrides_are_not_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["finetune"])
    assert capsys.readouterr().err.strip().endswith("required: RECIPE")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantize", "m", "--output", "o"], "the same command goes on"),
        (["finetune", "r"], "resume=true goes on"),
        (["evaluate", "m", "--data", "d"], "interrupted\n"),
    ],
)
def test_an_interrupted_command_says_how_it_goes_on(words, said, monkeypatch, capsys):
    def interrupted(self, args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Later, "__call__", interrupted)
    assert main(words) == 130
    assert said in capsys.readouterr().err


def test_what_is_no_number_is_null_in_json(tmp_path, monkeypatch, capsys):
    found = {"perplexity": math.nan, "parts": [1.5, -math.inf, (math.inf, True, "NaN")]}
    text = '{"perplexity": null, "parts": [1.5, null, [null, true, "NaN"]]}'
    atomic.save_json(found, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(text)
    monkeypatch.setattr(evaluate, "run", lambda args: found)
    assert main(["evaluate", "folder", "--data", "text.txt", "--json"]) == 0
    assert capsys.readouterr().out == f"{text}\n"
