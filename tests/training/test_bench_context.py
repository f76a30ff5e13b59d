"""The longest context by card: steps are those of a fine-tuning, and the search finds what fits with few of them."""

import argparse
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts")]

import bench_context  # noqa: E402
from bisection import search  # noqa: E402


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(
        caps=[8.0, 16.0], goals={8.0: 16_000}, shape="8b", rank=32, optimizer="adamw_8bit", without=[], trials=8,
        limit=1000, device="cpu", out=tmp_path / "context.json",
    )  # fmt: skip


class Card:
    """Fits so many tokens a GB."""

    asked: list

    def __init__(self, args, card):
        self.fits, self.asked = 3_000 * card, []

    def ask(self, tokens, blocks):
        self.asked.append((tokens, blocks))
        row = {
            "tokens": tokens,
            "blocks": blocks,
            "fits": tokens <= self.fits,
            "with_preparation": tokens * blocks / 1e5,
        }
        return row | ({"seconds": row["with_preparation"], "loss": 1.0} if row["fits"] else {"error": "no memory"})

    def end(self):
        self.asked.append("end")


def test_goals_come_first_then_bounds_and_the_longest_goes_through_the_whole_model(args):
    cards = {}

    def make(args, card):
        return cards.setdefault(card, Card(args, card))

    rows = bench_context.bench(args, make)
    first = rows[0]
    assert (first["card"], first["tokens"], first["blocks"], first["kind"]) == (8.0, 16_000, 32, "goal")
    for card in args.caps:
        whole = [row for row in rows if row["card"] == card and row["kind"] == "whole"]
        assert whole and all(row["blocks"] == 32 for row in whole)
        best = max(row["tokens"] for row in whole if row["fits"])
        assert 0.95 * 3_000 * card < best <= 3_000 * card
        assert {row["blocks"] for row in rows if row["card"] == card and row["kind"] == "trial"} == {4}
        assert cards[card].asked[-1] == "end"
    # a bound for each card before the longest of any
    first = [
        next(place for place, row in enumerate(rows) if row["card"] == card and row["kind"] == "whole")
        for card in args.caps
    ]
    assert [row["kind"] for row in rows[first[0] + 1 : first[1]]].count("whole") <= 1
    assert args.out.exists()


def test_what_would_last_too_long_is_left_out(args, capsys):
    args.limit = 10  # of which the goal takes 5
    rows = bench_context.bench(args, Card)
    assert [row["kind"] for row in rows].count("whole") < 2
    assert "left out, no time for it" in capsys.readouterr().out


@pytest.mark.parametrize("fits", [900, 20_000, 30_000, 31_500, 40_000])
def test_a_search_ends_at_what_fits(fits):
    found = search(lambda tokens: {"tokens": tokens, "fits": tokens <= fits}, 30_000, 40)
    longest = max((row["tokens"] for row in found if row["fits"]), default=0)
    assert longest == fits // 512 * 512


def test_a_step_runs_as_finetune_runs_it(args):
    args.shape, args.rank, args.optimizer = "tiny", 4, "adamw_torch"
    bench = bench_context.Bench(args, 8.0)
    whole, part = bench.step(96, 2), bench.step(96, 1)
    assert whole["fits"] and part["fits"] and 5 < whole["loss"] < 8 and whole["loss"] != part["loss"]
    assert bench._model.get_base_model().config.num_hidden_layers == 2
    assert not any(parameter.grad is not None for parameter in bench._model.parameters())


def test_one_that_has_no_room_leaves_nothing_behind(args, monkeypatch):
    args.shape, args.rank, args.optimizer = "tiny", 4, "adamw_torch"
    bench = bench_context.Bench(args, 8.0)

    def full(*_):
        raise torch.OutOfMemoryError("no room\nand more")

    monkeypatch.setattr(bench, "_train", full)
    row = bench.step(96, 1)
    assert not row["fits"] and row["error"] == "no room"
    assert bench._model.get_base_model().config.num_hidden_layers == 2
