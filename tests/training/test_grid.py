"""Grids: cells, kept results, table and picture, and the three commands over them."""

import argparse
import dataclasses
import json

import pytest
import yaml

from lowra.training.grid import adapter_folder, plan_grid, run_grid
from lowra_command import compare, evaluate
from lowra_command import finetune as finetune_command


def test_cells_without_a_form_are_left_out(recipe):
    cells = plan_grid(recipe, ["lora16", "loftq", "lowra", "hqq"], [1.5, 2], [0, 1])
    assert [cell.name for cell in cells[::2]] == [
        "lora16-seed0", "loftq-2bit-seed0", "lowra-1.5bit-seed0", "lowra-2bit-seed0", "hqq-2bit-seed0",
    ]  # fmt: skip
    for methods, bits, message in ((["lofq"], [2], "no method 'lofq'"), (["loftq"], [1.5], "has a form at 1.5")):
        with pytest.raises(ValueError, match=message):
            plan_grid(recipe, methods, bits, [0])


def test_a_grid_keeps_what_is_finished(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, max_steps=2)
    methods = ["lora16", "lowra", "lowra:quantization.sensitivity=none"]
    folder = tmp_path / "grid"
    first = run_grid(recipe, plan_grid(recipe, methods, [1.5], [0]), folder, progress=False)
    assert (first["cells"], first["run"]) == (3, 3)
    second = run_grid(recipe, plan_grid(recipe, methods, [1.5], [0, 1]), folder, progress=False)
    assert (second["cells"], second["run"]) == (6, 3)
    assert len(list((folder / "bases").iterdir())) == 2
    rows = json.loads((folder / "table.json").read_text())
    assert [row["label"] for row in rows] == methods
    assert rows[1]["seeds"] == [0, 1] and rows[1]["tuned"]["perplexity"]["spread"] > 0
    assert rows[1]["true_bits"] > rows[1]["nominal_bits"]
    table = (folder / "table.md").read_text()
    assert "| lora16 | 32 | 32.000 |" in table and "±" in table
    assert (folder / "comparison.png").stat().st_size > 1000
    longer = dataclasses.replace(recipe, max_steps=3)
    assert run_grid(longer, plan_grid(longer, ["lora16"], [], [0]), folder, progress=False)["run"] == 1


def test_a_cell_that_diverged_is_finished_and_has_no_adapter(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=1e30)
    cells = plan_grid(recipe, ["lora16"], [], [0])
    for run in (1, 0):
        result = run_grid(recipe, cells, tmp_path, progress=False, keep_adapters=True)
        assert result["run"] == run and result["rows"][0]["tuned"]["accuracy"]["mean"] is None
    assert "| diverged |" in (tmp_path / "table.md").read_text()
    assert not adapter_folder(cells[0], tmp_path).exists()


def test_commands(recipe, tmp_path, text_files, capsys):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({**recipe.to_dict(), "max_steps": 2}))
    tuned = _run(finetune_command, "finetune", config, "bits=1.5", f"output={tmp_path / 'one'}")
    assert "perplexity" in capsys.readouterr().out
    measured = _run(
        evaluate, "evaluate", tmp_path / "one" / "base", "--adapter", tmp_path / "one" / "adapter",
        "--data", text_files / "validation.txt", "--block-size", 32,
    )  # fmt: skip
    assert measured["perplexity"] == pytest.approx(tuned["tuned"]["perplexity"], rel=0.2)  # all blocks, not the first 8
    result = _run(
        compare,
        "compare",
        config,
        "--methods",
        "lora16,lowra:quantization.menu=[1,2]",
        "--bits",
        "1.5",
        "--output",
        tmp_path / "grid",
    )
    assert result["cells"] == 2 and "| lowra:quantization.menu=[1,2] | 1.5 |" in capsys.readouterr().out
    json.dumps([tuned, measured, result], allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--block-size", 1024], ValueError, "has 128 positions"),
        (["--adapter", "nowhere", "--block-size", 32], FileNotFoundError, "nowhere"),
        (["--batch-size", 0], ValueError, "must be at least"),
    ],
)
def test_evaluate_refuses(tiny_llama, text_files, arguments, error, message):
    with pytest.raises(error, match=message):
        _run(evaluate, "evaluate", tiny_llama, "--data", text_files / "validation.txt", *arguments)


def test_compare_refuses_what_are_no_numbers(recipe, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe.to_dict()))
    with pytest.raises(ValueError, match="Expected numbers"):
        _run(compare, "compare", config, "--methods", "lowra", "--bits", "two", "--output", tmp_path / "grid")


def _run(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.run(args)
