"""The models of scripts/bench_generation.py: adapters of every kind go through the products of a decoding step."""

import pathlib
import sys
import types

import pytest
import torch

from lowra.generation import fast

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts")]

import bench_first_token  # noqa: E402
import bench_generation  # noqa: E402
import random_models  # noqa: E402


@pytest.mark.parametrize("kind, count", [("lora", 1), ("packed", 1), ("packed", 2), ("tables", 1)])
def test_adapters_of_every_kind_go_through_the_products(kind, count, caplog):
    fast._warn.cache_clear()
    model = random_models.make_model("tiny", 2.0, device="cpu", dtype=torch.float32)
    ids = torch.randint(5, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    bare = bench_generation.generate(model, ids, 12, fast=True)
    model = bench_generation.with_adapters(model, 8, count, kind)
    assert list(model.peft_config) == ["default", "another-1"][:count]
    for name, parameter in model.named_parameters():  # of a size that a model of two layers answers to
        if "lora_B" in name:
            parameter.data.mul_(30)
    found = bench_generation.generate(model, ids, 12, fast=True)
    assert torch.equal(found, bench_generation.generate(model, ids, 12, fast=False))
    assert not torch.equal(found, bare) and not caplog.records
    decoder = fast.session_of(model.get_base_model()).decoder
    for group in decoder._projections():
        assert group._in_product is not None and group._packed  # one launch on a GPU
        for weight, term in zip(group._packed, group._in_product.terms, strict=True):
            assert term.a.is_contiguous() and term.b.is_contiguous() and len(term.a) % 4 == 0
            assert term.a.dtype == term.b.dtype == model.dtype
            assert weight[0].scales.dtype == torch.uint8 and weight[0].levels.dtype == torch.float16
    tables = model.get_base_model().model.layers[0].mlp.down_proj.base_layer.adapter_tables
    assert bool(tables and tables.chosen()) == (kind == "tables")
    fast.release(model)
    assert torch.equal(bench_generation.generate(bench_generation.without_adapters(model), ids, 12, fast=True), bare)


@pytest.mark.parametrize("count, batch, others", [(1, 1, False), (2, 4, False), (3, 1, True)])
def test_a_first_token_reads_no_model_again(count, batch, others):
    model = bench_generation.with_adapters(random_models.make_model("tiny", 1.5, device="cpu"), 8, count)
    ids = torch.arange(5, 5 + 6 * batch).view(batch, 6)
    row = bench_first_token.first_token(model, ids, repeats=2, other_adapters=others)
    assert row["kept"] and row["reads"] == 0 < row["current"]
    assert count == 1 or row["hooks"] > 0
    parts = sum(value for name, value in row.items() if name not in ("kept", "first"))
    assert parts == pytest.approx(row["first"], abs=0.1)


def test_a_step_is_the_time_between_tokens(monkeypatch):
    moments = iter([0.0, 5.0, 5.5, 6.0, 7.0])  # the prompt, and four tokens
    monkeypatch.setattr(bench_generation.time, "perf_counter", lambda: next(moments))
    arrivals = bench_generation.Arrivals()
    for _ in range(5):
        arrivals.put(torch.zeros(1))
    assert arrivals.step() == pytest.approx(2 / 3)
    monkeypatch.undo()
    model = random_models.make_model("tiny", 1.5, device="cpu")
    args = types.SimpleNamespace(new=6, repeats=2)
    assert 0 < bench_generation.streamed_step(model, torch.arange(5, 17).view(2, 6), args) < 1
