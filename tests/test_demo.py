"""The demo shows what it promises: its table in the right order, on the model that comes with lowra."""

import dataclasses
import json
import pathlib
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowra.commands import build_parser, main
from lowra.commands.demo import _recipe
from lowra.demo import BASE, comparison_table, demo_cells, order_problems, write_texts
from lowra.training.grid import run_grid


def row(method, bits, tuned):
    measured = [{"perplexity": {"mean": value, "spread": None}} for value in (1000.0, tuned)]
    return {
        "method": method, "bits": bits, "nominal_bits": bits, "true_bits": bits + 0.3,
        "untuned": measured[0], "tuned": measured[1],
    }  # fmt: skip


def test_the_base_is_what_its_card_says():
    card = (BASE / "README.md").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    millions = float(re.search(r"\| parameters \| ([\d.]+) million", card)[1])
    assert millions == round(model.num_parameters() / 1e6, 1)
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 1024
    for source in ("Wikipedia", "CC BY-SA", "Gutenberg", "OpenStax", "CC BY 4.0", "CC0"):
        assert source in card


def test_texts_do_not_overlap(tmp_path):
    texts = {name: path.read_text(encoding="utf-8").splitlines() for name, path in write_texts(tmp_path).items()}
    assert len(texts["train"]) > 500 and len(texts["validation"]) > 50
    shared = {line for line in texts["validation"] if len(line) > 200} & set(texts["train"])
    assert len(shared) < 0.05 * len(texts["validation"])  # a docstring may stand in two classes


def test_the_wrong_order_is_told():
    rows = [row("loftq", 2.0, 60.0), row("lowra", 2.0, 40.0), row("lowra", 1.5, 50.0)]
    assert order_problems(rows) == []
    rows[2] = row("lowra", 1.5, 61.0)
    assert order_problems(rows) == [
        "lowra at 1.5 bits ended at a perplexity of 61.0, LoftQ at 2 bits ended at a perplexity of 60.0."
    ]
    rows[2] = row("lowra", 1.5, None)
    assert "lowra at 1.5 bits diverged" in order_problems(rows)[0]


def test_a_table_lines_up_and_leaves_out_what_is_not_known():
    lines = comparison_table([row("lora16", 16.0, 30.0), row("lowra", 1.5, None)], [12_789_400, None]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "12.79 MB" in lines[2] and "diverged" in lines[3]


def test_lowra_ends_below_loftq(tmp_path):
    """The last three runs of the demo, with a third of its steps."""
    args = build_parser().parse_args(["demo", "--output", str(tmp_path), "--steps", "10"])
    recipe = dataclasses.replace(_recipe(args, tmp_path), max_eval_samples=12)
    rows = run_grid(recipe, demo_cells(recipe)[-3:], tmp_path, progress=False)["rows"]
    assert [(r["method"], r["bits"]) for r in rows] == [("loftq", 2.0), ("lowra", 2.0), ("lowra", 1.5)]
    assert order_problems(rows) == []
    loftq, lowra, smaller = (r["tuned"]["perplexity"]["mean"] for r in rows)
    assert lowra < smaller < loftq


@pytest.mark.slow
def test_the_methods_end_in_the_order_of_the_paper(tmp_path, capsys):
    """All of the demo; `make demo` fails too where lowra does not end below LoftQ."""
    assert main(["demo", "--output", str(tmp_path / "demo"), "--json"]) == 0
    shown = capsys.readouterr().out
    result = json.loads(shown.strip().splitlines()[-1])
    assert result["problems"] == []
    ends = {(r["method"], r["bits"]): r["tuned"]["perplexity"]["mean"] for r in result["rows"]}
    order = [("lora16", 16.0), ("qlora", 4.0), ("lowra", 2.0), ("lowra", 1.5), ("loftq", 2.0), ("qlora", 2.0)]
    assert sorted(order, key=ends.__getitem__) == order
    assert ends["qlora", 2.0] > 3 * ends["lowra", 2.0]
    dense, four, *two, smallest = result["bytes"]
    assert dense > 2 * four and four > max(two) and min(two) > smallest
    assert result["text"].startswith("This function returns") and " ".join(result["text"].split()) in shown
    assert "| lowra" in pathlib.Path(result["table"]).read_text(encoding="utf-8")
    assert pathlib.Path(result["picture"]).stat().st_size > 1000


def test_a_demo_that_goes_wrong_says_so_and_fails(tmp_path, capsys, monkeypatch):
    rows = [row("lora16", 16.0, 30.0), row("qlora", 4.0, 31.0), row("qlora", 2.0, 300.0), row("loftq", 2.0, 60.0)]
    rows += [row("lowra", 2.0, 70.0), row("lowra", 1.5, 80.0)]
    wrong = {"rows": rows, "table": "table.md", "picture": "comparison.png"}
    monkeypatch.setattr("lowra.commands.demo.run_grid", lambda *args, **options: wrong)
    monkeypatch.setattr("lowra.commands.demo._bytes", lambda folder: None)
    monkeypatch.setattr("lowra.commands.demo._last_words", lambda *args: "")
    with pytest.raises(SystemExit) as left:
        main(["demo", "--output", str(tmp_path / "demo")])
    assert left.value.code == 1
    assert "SOMETHING IS WRONG: lowra at 2 bits ended at a perplexity of 70.0" in capsys.readouterr().err
