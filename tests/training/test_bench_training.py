"""The benchmarks of steps run: a plain loop in both halves, the public door, and the whole way from a dense model."""

import argparse
import pathlib
import sys
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts")]

import bench_training  # noqa: E402
import bench_whole_way  # noqa: E402


@pytest.mark.parametrize("half, ways", [("bfloat16", ["eager"]), ("float16", ["eager", "trainer"])])
def test_ways_of_a_step_are_measured(half, ways, capsys):
    args = argparse.Namespace(
        shape="tiny", rank=4, dtype=getattr(torch, half), half=half, shapes=[(1, 48)], steps=1, ready=60, tables=None,
        optimizer="adamw_torch", device="cpu",
    )  # fmt: skip
    for way in ways:
        (row,) = bench_training.measure(args, 1.25, way)
        assert row["ms"] > 0 and 5 < row["loss"] < 8 and row.get("dtype", "bfloat16") == half


def test_what_is_not_ready_in_time_is_told():
    with pytest.raises(bench_training.NotReady):
        bench_training.prepared(lambda: time.sleep(5), 0.05)


def test_the_whole_way_goes_through_quantising_and_training(tmp_path):
    args = argparse.Namespace(
        shape="tiny", card=8.0, bits=3.0, rank=4, tokens=48, steps=1, optimizer="adamw_torch", liger=False,
        folder=tmp_path / "way", device="cpu",
    )  # fmt: skip
    result = bench_whole_way.whole_way(args)
    assert result["quantise"]["true_bits"] < 3 and 5 < result["train"]["loss"] < 8
    assert all(result[stage]["host_gib"] >= 0 for stage in ("quantise", "load", "train"))
