"""The command line from quantising to generating, as a user types it."""

import json
import logging
import sys
import types

import pytest

from lowra.commands import main


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The history of the city begins with the river and its bridges.\n" * 200)
    return path


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "packed"
    assert main(["quantize", str(tiny_llama), "--bits", "2", "--rank", "4", "--output", str(output)]) == 0
    return output


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_from_checkpoint_to_text(packed, text, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("block_size: 64\nbatch_size: 2\naccumulation: 1\nmax_steps: 3\nlearning_rate: 1e-3\n")
    overrides = [f"model={packed}", f"train_file={text}", f"validation_file={text}", f"output={tmp_path / 'run'}"]
    assert main(["finetune", str(recipe), *overrides, "rank=4", "--json"]) == 0
    assert last_line(capsys)["tuned"]["perplexity"] > 1
    adapter = str(tmp_path / "run" / "adapter")
    measured = ["evaluate", str(packed), "--adapter", adapter, "--data", str(text), "--block-size", "64", "--json"]
    assert main(measured) == 0
    assert last_line(capsys)["perplexity"] > 1
    assert main(["generate", str(packed), "--adapter", adapter, "--prompt", "The", "--tokens", "5", "--json"]) == 0
    assert last_line(capsys)["text"].startswith("The")
    assert main(["inspect", str(packed), "--json"]) == 0
    assert last_line(capsys)


def test_calibration_is_kept_for_the_next_budget(tiny_llama, text, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    start = ["quantize", str(tiny_llama), "--rank", "4"]
    read = ["--calibrate", str(text), "--calibration-tokens", "512"]
    assert main([*start, "--bits", "1.5", *read, "--output", str(first)]) == 0
    kept = str(first / "calibration.safetensors")
    assert main([*start, "--bits", "2", "--calibrate", kept, "--feedback", "2", "--output", str(second)]) == 0
    recipes = [json.loads((out / "config.json").read_text())["quantization_config"] for out in (first, second)]
    assert [(r["sensitivity"], r["refine"], r["feedback"]) for r in recipes] == [("fisher", 2, 1), ("fisher", 2, 2)]
    record = json.loads((second / "initial_adapter" / "lowra_base.json").read_text())
    assert record["init"] == "cloq"


def test_blocks_are_reconstructed_on_the_text_of_the_calibration(tiny_llama, text, tmp_path, capsys):
    command = ["quantize", str(tiny_llama), "--rank", "4", "--output", str(tmp_path / "out"), "--reconstruct", "1"]
    assert main([*command, "--calibrate", str(text), "--calibration-tokens", "512", "--json"]) == 0
    report = last_line(capsys)
    assert len(report["block_errors"]) == 2 and "reconstruct" in report["seconds"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["reconstruct"] == 1
    command[-3] = str(tmp_path / "other")
    assert main([*command, "--calibrate", str(tmp_path / "out" / "calibration.safetensors")]) == 2
    assert "of which a file of statistics holds none: give the text" in capsys.readouterr().err


def test_json_of_quantize_is_the_report(tiny_llama, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["quantize", str(tiny_llama), "--bits", "1.5", "--output", str(output), "--json"]) == 0
    report = last_line(capsys)
    assert report["nominal_bits"] <= 1.5 < report["true_bits"]
    assert not (output / "initial_adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "{model}", "--bits", "0.5", "--output", "{out}"], "from 1 to 4"),
        (["quantize", "{model}", "--menu", "one", "--output", "{out}"], "separated by commas"),
        (["quantize", "/no/such/model", "--output", "{out}"], "not a folder"),
        (["quantize", "{model}", "--alpha", "8", "--output", "{out}"], "--alpha has no effect without --rank"),
        (["quantize", "{model}", "--init", "lora", "--output", "{out}"], "--init has no effect without --rank"),
        (["quantize", "{model}", "--loftq-steps", "2", "--output", "{out}"], "--loftq-steps has no effect without"),
        (
            "quantize {model} --rank 4 --init lora --loftq-steps 2 --output {out}".split(),
            "--loftq-steps has no effect with --init lora",
        ),
        (
            "quantize {model} --rank 4 --init pissa --loftq-steps 2 --output {out}".split(),
            "--loftq-steps has no effect with --init pissa",
        ),
        (
            "quantize {model} --calibration-tokens 9 --output {out}".split(),
            "--calibration-tokens has no effect without --calibrate",
        ),
        (
            "quantize {model} --calibrate x.safetensors --calibration-tokens 9 --output {out}".split(),
            "--calibration-tokens has no effect beside stored",
        ),
        (
            "quantize {model} --calibrate x --reconstruct-tokens 9 --output {out}".split(),
            "--reconstruct-tokens has no effect without --reconstruct",
        ),
        (
            "quantize {model} --codebook normal_float --iterations 20 --output {out}".split(),
            "--iterations has no effect with --codebook normal_float",
        ),
        (
            "quantize {model} --codebook normal_float --block-weight absmax --output {out}".split(),
            "--block-weight has no effect with --codebook",
        ),
        (
            "quantize {model} --codebook normal_float --thresholds matrix --output {out}".split(),
            "--thresholds has no effect with --codebook",
        ),
        (
            "quantize {model} --iterations 0 --thresholds matrix --output {out}".split(),
            "--thresholds has no effect with --iterations 0",
        ),
        (
            "quantize {model} --assigner layer_order --sensitivity none --output {out}".split(),
            "--sensitivity has no effect with --assigner layer_order",
        ),
        (
            "quantize {model} --calibrate x.txt --sensitivity none --feedback 0 --output {out}".split(),
            "--calibrate has no effect where",
        ),
        ("quantize {model} --refine 1001 --output {out}".split(), "refine must be at most 1000 rounds"),
        ("quantize {model} --reconstruct 2 --output {out}".split(), "reconstruct trains on the text of a calibration"),
        ("quantize {model} --reconstruct -1 --output {out}".split(), "reconstruct must not be negative"),
        ("quantize {model} --feedback 1000000000 --output {out}".split(), "feedback must be at most 1000 rounds"),
        (
            "quantize {model} --rank 4 --loftq-steps 1000000000000 --output {out}".split(),
            "A number of steps is at most 1000",
        ),
        (
            "quantize {model} --iterations 1000000000000 --output {out}".split(),
            "iterations must be a whole number of at most 2147483647",
        ),
        ("quantize {model} --rank 1000000000000 --output {out}".split(), "does not fit"),
        ("generate {model} --prompt a --seed 3".split(), "--seed has no effect without --temperature"),
        ("generate {model} --prompt a --force".split(), "force has no effect without a packed adapter"),
        ("chat {model} --seed 3".split(), "--seed has no effect without --temperature"),
        ("demo --output {out} --trust-remote-code".split(), "--trust-remote-code has no effect without --model"),
        (["quantize", "{model}", "--calibration-tokens", "9", "--output", "{out}"], "no effect without --calibrate"),
        (["quantize", "{model}", "--rank", "4", "--alpha", "-1", "--output", "{out}"], "alpha must be positive"),
        (["quantize", "{model}", "--rank", "4", "--init", "cloq", "--output", "{out}"], "(--calibrate FILE)"),
        (["generate", "./no-such-folder", "--prompt", "x"], "not a folder"),
        (["generate", "{model}", "--adapter", "{out}", "--prompt", "x"], "is no adapter"),
        (["evaluate", "{model}", "--data", "{empty}", "--block-size", "64"], "empty"),
        (["finetune", "{unknown}", "model={model}"], "Did you mean 'learning_rate'"),
    ],
)
def test_mistakes_get_one_message_and_write_nothing(tiny_llama, tmp_path, capsys, arguments, message):
    places = {"model": tiny_llama, "out": tmp_path / "out", "empty": tmp_path / "empty.txt"}
    places["empty"].write_text("")
    places["unknown"] = tmp_path / "recipe.yaml"
    places["unknown"].write_text("learning_rat: 1e-3\n")
    before = sorted(tmp_path.iterdir())
    assert main([argument.format(**places) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lowra: ") and message in captured.err
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quantize", "m", "--output", "o", "--bitz", "2"],
            "quantize: error: there is no --bitz; did you mean --bits?",
        ),
        (["quantize", "m", "--output", "o", "--bit", "2"], "there is no --bit; did you mean --bits?"),
        (
            ["adapter", "quantize", "a", "--output", "o", "--methd=rtn"],
            "there is no --methd; did you mean --method?",
        ),
        (["generate", "m", "--prompt", "p", "--xyzzy"], "there is no --xyzzy (lowra generate --help lists all)"),
        (["inspect", "m", "n"], "there is no n (lowra inspect --help lists all)"),
    ],
)
def test_misspelt_options_are_refused_with_the_nearest(capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "finetune", "evaluate", "generate", "inspect", "compare", "demo"])
def test_help_tells_of_no_empty_defaults(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "None" not in shown and "False" not in shown


def test_a_place_that_is_taken_is_refused_before_the_calibration(packed, tiny_llama, text, monkeypatch, capsys):
    monkeypatch.setattr("lowra.commands.quantize.calibrate", lambda *args, **options: pytest.fail("calibrated"))
    assert main(["quantize", str(tiny_llama), "--calibrate", str(text), "--output", str(packed)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_what_a_packed_model_does_not_take_from_the_recipe_is_said(packed, text, tmp_path, caplog):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("block_size: 64\nbatch_size: 2\naccumulation: 1\nmax_steps: 1\nbits: 1.5\nrank: 8\n")
    overrides = [f"model={packed}", f"train_file={text}", f"validation_file={text}", f"output={tmp_path / 'run'}"]
    with caplog.at_level("WARNING", logger="lowra"):
        assert main(["finetune", str(recipe), *overrides]) == 0
    messages = [record.getMessage() for record in caplog.records]
    assert any("has 2 bits; the recipe's 1.5 bits are not used" in message for message in messages)
    assert any("has rank 4; the recipe's rank of 8 is not used" in message for message in messages)


def test_a_base_without_its_initial_adapter_is_said(packed, text, caplog):
    start = str(packed / "initial_adapter")
    for command in (
        ["evaluate", str(packed), "--data", str(text), "--block-size", "32"],
        ["generate", str(packed), "--prompt", "The", "--tokens", "2"],
    ):
        with caplog.at_level("WARNING", logger="lowra"):
            assert main(command) == 0
        assert sum(start in record.getMessage() for record in caplog.records) == 1
        caplog.clear()
        assert main([*command, "--adapter", start]) == 0
        assert not any("packed together" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "command",
    [
        "generate {adapter} --prompt a",
        "chat {adapter}",
        "evaluate {adapter} --data {text}",
        "inspect {adapter}",
        "plan {adapter}",
        "quantize {adapter} --output {out}",
        "merge {packed} --adapter {adapter} --original {adapter} --output {out}",
        "finetune wikitext2 model={adapter} output={out} train_file={text} validation_file={text}",
    ],
)
def test_an_adapter_in_the_place_of_a_model_is_said(packed, text, tmp_path, capsys, command):
    places = {"adapter": packed / "initial_adapter", "packed": packed, "text": text, "out": tmp_path / "out"}
    assert main(command.format(**places).split()) == 2
    assert f"{places['adapter']} is an adapter, not a model" in capsys.readouterr().err


def test_warnings_stand_before_the_text(packed, capsys):
    """Both streams in one: what a terminal shows."""
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lowra").addHandler(handler)
    former, sys.stdout = sys.stdout, types.SimpleNamespace(write=shown.append, flush=lambda: None)
    try:
        assert main(["generate", str(packed), "--prompt", "The history of", "--tokens", "3"]) == 0
    finally:
        sys.stdout = former
        logging.getLogger("lowra").removeHandler(handler)
    warned = next(place for place, words in enumerate(shown) if "packed together" in words)
    assert "The" not in "".join(shown[:warned]) and "The history of" in "".join(shown[warned:])
