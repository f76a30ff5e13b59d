"""README's table by card: what the benchmark runs is what it says, and `lowra plan` lets it fit."""

import argparse
import pathlib
import re
import sys

import pytest

from lowra.commands.memory import named_card
from lowra.training.recipe import Recipe

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts")]

import bench_cards  # noqa: E402


def test_the_rows_are_those_of_the_readme():
    table = (ROOT / "README.md").read_text().partition("| card |")[2].partition("\n\n")[0]
    found = []
    for line in table.splitlines()[2:]:
        card, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for cell in cells:
            size, bits, tokens = re.fullmatch(r"(\d+)B at ([\d.]+) bits, ([\d,]+) tokens", cell).groups()
            found.append(f"{card.removesuffix(' GB')}:{size}b:{bits}:{tokens.replace(',', '')}")
    assert found == list(bench_cards.README_ROWS)


@pytest.mark.parametrize("text", bench_cards.README_ROWS)
def test_each_row_fits_by_the_plan(text):
    row = bench_cards.Row.parse(text)
    recipe = Recipe(
        model="x", dataset="x", rank=16, bits=row.bits, block_size=row.tokens, batch_size=1, accumulation=16,
        eval_batch_size=1,
    )  # fmt: skip
    card = named_card(f"{row.card:g}GB")
    assert bench_cards.planned(row, recipe, card).on_card <= card.size


def test_a_row_runs_as_finetune_runs_it(tmp_path, capsys):
    args = argparse.Namespace(together=72, alone=False, steps=2, device="cpu", out=tmp_path / "cards.json")
    (result,) = bench_cards.run_rows([bench_cards.Row.parse("8:tiny:2:48")], args)
    assert result["fits"] and len(result["loss"]) == 4 and all(5 < loss < 8 for loss in result["loss"])
    assert result["planned"] < result["planned_on_card"] < result["card_bytes"] == named_card("8GB").size
    assert "8:tiny:2:48" in capsys.readouterr().out and args.out.exists()


@pytest.mark.parametrize("text", ["8:tiny:2", "8:none:2:48", "8:tiny:7:48", "x:tiny:2:48"])
def test_rows_of_something_else_are_refused(text):
    with pytest.raises(ValueError):
        bench_cards.Row.parse(text)
