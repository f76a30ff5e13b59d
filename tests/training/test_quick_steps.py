"""What makes steps quicker: where it applies, what refuses it, and that a run learns the same with it."""

import contextlib
import copy
import dataclasses
import importlib
import pickle

import pytest
import torch
from layer_recorder import StandIn, stand_in
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments

from lowra.integrations import offloading, tiled_mlp
from lowra.nn.host_store import HostStore
from lowra.training import finetune, quick_steps
from lowra.training.fewer_walks import FewerWalks
from lowra.training.settled import settle
from lowra.training.trainer import training_arguments


@pytest.fixture
def without_gpu(monkeypatch):
    stand_in(monkeypatch.setattr)
    module = importlib.import_module("lowra.training.trainer")
    monkeypatch.setattr(module, "check_quick_steps", lambda recipe, arguments: None)


def losses(result):
    return [entry["loss"] for entry in result["curve"] if "loss" in entry]


@pytest.mark.parametrize("tables", ["frozen", "levels_and_scales"])
def test_a_run_learns_the_same(recipe, without_gpu, tables):
    found = []
    for captured in (True, False):
        run = dataclasses.replace(
            recipe, output=f"{recipe.output}{captured}", gradient_checkpointing=True, layer_graphs=captured,
            tables=tables, max_steps=5, accumulation=2, dropout=0.1, eval_steps=2,
        )  # fmt: skip
        found.append(finetune(run, progress=False))
        assert bool(StandIn.recorded)  # by the first
    assert losses(found[0]) == losses(found[1])
    assert found[0]["tuned"] == found[1]["tuned"]


def test_a_summariser_runs_on_without_where_its_layers_take_more(tiny_bart, recipe, without_gpu, tmp_path):
    rows = "".join(f'{{"document": "a b c {number}", "summary": "b {number}"}}\n' for number in range(24))
    (tmp_path / "rows.jsonl").write_text(rows)
    file = str(tmp_path / "rows.jsonl")
    found = []
    for captured in (True, False):
        run = dataclasses.replace(
            recipe, model=str(tiny_bart), output=f"{recipe.output}{captured}", task="summarization", train_file=file,
            validation_file=file, source_column="document", target_column="summary", gradient_checkpointing=True,
            layer_graphs=captured, max_steps=4, max_eval_samples=2,
        )  # fmt: skip
        found.append(finetune(run, progress=False))
    assert losses(found[0]) == losses(found[1])


def test_on_a_processor_nothing_is_captured_unless_asked(recipe, monkeypatch):
    monkeypatch.setattr(quick_steps, "capture_layers", lambda model: pytest.fail("captured"))
    finetune(dataclasses.replace(recipe, gradient_checkpointing=True, max_steps=1), progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, for which it is")
@pytest.mark.parametrize("field", ["layer_graphs", "liger", "offload_activations"])
def test_what_needs_a_gpu_is_refused_before_any_work(recipe, tmp_path, field):
    recipe = dataclasses.replace(recipe, gradient_checkpointing=True, **{field: True})
    with pytest.raises(ValueError, match=f"{field}=true is for NVIDIA GPUs, and this runs on cpu"):
        training_arguments(recipe, tmp_path / "checkpoints")


@pytest.mark.parametrize("field", ["layer_graphs", "offload_activations"])
def test_what_replaces_gradient_checkpointing_needs_it(recipe, field):
    with pytest.raises(ValueError, match=f"{field}=True has no effect without gradient_checkpointing"):
        settle(dataclasses.replace(recipe, given=frozenset({field}), **{field: True}))


@pytest.mark.parametrize("field", ["tiled_mlp", "offload_activations"])
def test_long_contexts_are_without_graphs(recipe, field):
    asked = {"gradient_checkpointing": True, "layer_graphs": True, field: True}
    with pytest.raises(ValueError, match=f"layer_graphs=True has no effect beside {field}=true"):
        settle(dataclasses.replace(recipe, given=frozenset({"layer_graphs"}), **asked))
    assert settle(dataclasses.replace(recipe, **asked)).layer_graphs is None


def test_a_run_with_long_contexts(recipe, without_gpu, monkeypatch):
    """That numbers are the same is tried in integration/test_long_contexts.py."""
    monkeypatch.setattr(tiled_mlp, "TILE", 24)
    monkeypatch.setattr(offloading._Offloading, "takes", staticmethod(lambda device: True))
    put, tiles = [], []
    monkeypatch.setattr(HostStore, "put", lambda self, x, put_=HostStore.put: put.append(x) or put_(self, x))
    monkeypatch.setattr(tiled_mlp, "tiled", lambda *args, tiled_=tiled_mlp.tiled: tiles.append(1) or tiled_(*args))
    run = dataclasses.replace(
        recipe, gradient_checkpointing=True, offload_activations=True, tiled_mlp=True, max_steps=1, max_eval_samples=1
    )
    result = finetune(run, progress=False)
    assert result["recipe"]["tiled_mlp"] and len(put) == 2  # layers
    assert len(tiles) == 7 + 6 + 2 * 7  # forward, recomputation of blocks, evaluations before and after


def test_walks_that_are_left_out_change_nothing(recipe, monkeypatch):
    """Dropout is active in steps, also after an evaluation, gradients are clipped, and are gone after a step."""
    run = dataclasses.replace(recipe, max_steps=6, accumulation=2, dropout=0.3, eval_steps=2, max_grad_norm=0.1)
    walks, found, walk = [], [], torch.nn.Module.train

    def train(module, mode=True):
        walks[-1] += isinstance(module, PeftModel)
        return walk(module, mode)

    monkeypatch.setattr(torch.nn.Module, "train", train)
    for quick in (True, False):
        walks.append(0)
        if not quick:
            module = importlib.import_module("lowra.training.fewer_walks")
            monkeypatch.setattr(module, "_remembered", lambda trainer: contextlib.nullcontext())
        found.append(finetune(dataclasses.replace(run, output=f"{run.output}{quick}"), progress=False))
    assert losses(found[0]) == losses(found[1])
    assert found[0]["tuned"] == found[1]["tuned"]
    assert walks[0] < walks[1] - 6


@pytest.mark.parametrize("fails", [False, True])
def test_parts_in_another_mode_are_trained_again(tmp_path, fails):
    """As after a callback that evaluates the model below the adapters, and whatever ends the run."""

    class Samples(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model[0].training)
            model[0].eval()
            if fails and state.global_step == 2:
                raise KeyError("on purpose")

    class Model(torch.nn.Sequential):
        def forward(self, x, labels=None):
            return {"loss": super().forward(x).mean()}

    seen, model = [], Model(torch.nn.Sequential(torch.nn.Dropout(0.5)), torch.nn.Linear(3, 1))
    arguments = TrainingArguments(tmp_path, max_steps=3, report_to=[], save_strategy="no", use_cpu=True)
    rows = [{"x": torch.ones(3), "labels": 0}] * 8
    trainer = FewerWalks(model, arguments, train_dataset=rows, callbacks=[Samples()])
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        trainer.train()
    assert seen == [True] * (2 if fails else 3)
    assert not {"train", "zero_grad"} & vars(model).keys()
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    model.train()
    assert model[0][0].training


def test_a_copy_made_in_a_run_is_a_model_of_its_own(tmp_path):
    """As one that keeps a mean of the weights: no call of it may reach the model that is trained."""

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                model[0].weight.grad = torch.ones_like(model[0].weight)
                copied[0].weight.grad = torch.ones_like(copied[0].weight)
                assert copied.eval() is copied and not copied.training and not copied[0].training and model.training
                copied.zero_grad()
                assert copied[0].weight.grad is None and model[0].weight.grad is not None
                copied[0] = torch.nn.Identity()
                assert copied.num_parameters() == 0 and model.num_parameters() == 4
                seen.append(copied)

    seen, model = [], Counted(torch.nn.Linear(3, 1))
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
    rows = [{"x": torch.ones(3)}] * 4
    FewerWalks(model, arguments, train_dataset=rows, callbacks=[Copies()]).train()
    assert len(seen) == 4 and not {"train", "zero_grad", "num_parameters"} & set(vars(model))


class Counted(torch.nn.Sequential):
    def forward(self, x, labels=None):
        return {"loss": super().forward(x).mean()}

    def num_parameters(self):
        return sum(parameter.numel() for parameter in self.parameters())
