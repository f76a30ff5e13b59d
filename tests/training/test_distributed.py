"""Two processes over gloo train as one process does at the same global batch."""

import dataclasses
import json
import pathlib

import pytest
import yaml
from other_processes import run_pair

from lowra.training import finetune

WORKER = pathlib.Path(__file__).parent / "ddp_worker.py"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="launched"),
        pytest.param({"layer_graphs": True}, id="captured"),
        pytest.param({"offload_activations": True, "tiled_mlp": True}, id="long", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_loss_of_one(recipe, tmp_path, options):
    recipe = dataclasses.replace(recipe, bits=1.5, batch_size=2, accumulation=2, gradient_checkpointing=bool(options))
    alone = finetune(recipe, progress=False)
    pair = dataclasses.replace(recipe, accumulation=1, output=str(tmp_path / "pair"), **options)
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(pair.to_dict()))
    run_pair(WORKER, config)
    together = json.loads((tmp_path / "pair" / "metrics.json").read_text())
    losses = [[entry["loss"] for entry in result["curve"]] for result in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert together["tuned"]["perplexity"] == pytest.approx(alone["tuned"]["perplexity"], rel=1e-4)
    assert together["untuned"] == alone["untuned"]


def test_a_process_that_starts_late_finds_the_folder_of_its_own_run(recipe, tmp_path, monkeypatch):
    """Seen with NCCL, where the first process does not wait for the others before it quantises."""
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "base").touch()
    recipe = dataclasses.replace(recipe, output=str(tmp_path / "begun"))
    with pytest.raises(ValueError, match="exists and is not empty"):
        finetune(recipe, progress=False)
    monkeypatch.setitem(finetune.__globals__, "load_data", _reached)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InterruptedError, match="reading data"):
        finetune(recipe, progress=False)


def _reached(*_):
    raise InterruptedError("reading data")
