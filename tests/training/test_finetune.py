"""One run from recipe to folder; resuming; what is refused, and that nothing is written then."""

import dataclasses
import json
import math
import pathlib

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from lowra.commands.finetune import _show as show
from lowra.generation.loading import load_model
from lowra.training import finetune
from lowra.training.curve import LossBar
from lowra.training.divergence import Divergence, why_none
from lowra.training.finetune import load_data, measure


def test_a_run_learns_and_its_adapter_reloads(recipe, monkeypatch, tmp_path, capsys):
    output = pathlib.Path(recipe.output)
    monkeypatch.chdir(output.parent)
    recipe = dataclasses.replace(recipe, bits=1.5, max_steps=20, eval_steps=10, output=output.name)
    result = finetune(recipe, progress=False)
    monkeypatch.chdir("/")  # paths that were written are whole
    assert result["tuned"]["perplexity"] < 0.9 * result["untuned"]["perplexity"]
    assert result == json.loads((output / "metrics.json").read_text())
    assert [entry["step"] for entry in result["curve"] if "loss" in entry] == list(range(1, 21))
    assert [entry["step"] for entry in result["curve"] if "eval_loss" in entry] == [10, 20]
    assert (output / "curve.png").stat().st_size > 1000
    assert result["nominal_bits"] <= 1.5
    model = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, output / "adapter")
    again = measure(model, recipe, load_data(recipe, progress=False), progress=False)
    assert again["perplexity"] == pytest.approx(result["tuned"]["perplexity"], rel=1e-5)
    for folder in (output / "adapter", output / "base" / "initial_adapter"):
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            output / "base"
        )
    assert 0 < result["evaluating_seconds"] < result["train_seconds"]
    show(recipe, result)
    shown = capsys.readouterr().out
    assert "s of that evaluating" in shown and "--block-size 32 to compare" in shown


def test_evaluations_on_the_way_have_a_bar(capsys):
    bar, state = LossBar(), TrainerState(max_steps=2)
    bar.on_train_begin(None, state, None)
    for _ in range(2):
        for _ in range(3):
            bar.on_prediction_step(None, state, None, eval_dataloader=range(3))
        bar.on_evaluate(None, state, None)
    bar.on_train_end(None, state, None)
    assert capsys.readouterr().err.count("evaluating:") == 2  # one for each


@pytest.mark.parametrize("method", ["qlora", "lora16", "hqq"])
def test_other_methods_learn(recipe, method):
    result = finetune(dataclasses.replace(recipe, method=method), progress=False)
    assert result["tuned"]["perplexity"] < result["untuned"]["perplexity"]


def test_bfloat16_with_gradient_checkpointing_has_the_same_loss(recipe):
    plain = finetune(recipe, progress=False)
    other = dataclasses.replace(recipe, output=recipe.output + "16", bf16=True, gradient_checkpointing=True)
    for a, b in zip(plain["curve"], finetune(other, progress=False)["curve"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


@pytest.mark.parametrize("tables", ["levels", "levels_and_scales"])
def test_tables_are_trained_saved_and_reloaded(recipe, tables):
    frozen = finetune(recipe, progress=False)
    recipe = dataclasses.replace(recipe, tables=tables, output=recipe.output + "-tables")
    result = finetune(recipe, progress=False)
    assert result["trainable_parameters"] > frozen["trainable_parameters"]
    assert result["untuned"] == frozen["untuned"]
    assert result["tuned"]["perplexity"] < frozen["tuned"]["perplexity"]
    output = pathlib.Path(recipe.output)
    model = load_model(str(output / "base"), str(output / "adapter"), "cpu").float()
    again = measure(model, recipe, load_data(recipe, progress=False), progress=False)
    assert again["perplexity"] == pytest.approx(result["tuned"]["perplexity"], rel=1e-5)


def test_tables_have_a_learning_rate_of_their_own(recipe):
    """With an adapter that cannot move, what is learned is in the tables."""
    recipe = dataclasses.replace(recipe, learning_rate=1e-12, tables="levels_and_scales", tables_learning_rate=1e-2)
    moved = finetune(recipe, progress=False)
    assert moved["tuned"]["perplexity"] < 0.99 * moved["untuned"]["perplexity"]
    still = dataclasses.replace(recipe, tables_learning_rate=1e-12, output=recipe.output + "-still")
    result = finetune(still, progress=False)
    assert result["tuned"]["perplexity"] == pytest.approx(result["untuned"]["perplexity"], rel=1e-3)


@pytest.mark.parametrize("tables", ["frozen", "levels_and_scales"])
def test_resuming_gives_the_same_curve(recipe, tables):
    recipe = dataclasses.replace(recipe, dropout=0.1, tables=tables)
    whole = finetune(recipe, progress=False)
    halves = dataclasses.replace(recipe, output=recipe.output + "-halves", save_steps=3)
    finetune(halves, progress=False)
    checkpoints = pathlib.Path(halves.output) / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-3", "checkpoint-6"}
    (checkpoints / "checkpoint-6").rename(checkpoints / "removed")
    state = checkpoints / "checkpoint-3" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["log_history"][0]["from_checkpoint"] = True  # to see that the run did go on from there
    state.write_text(json.dumps(content))
    resumed = finetune(dataclasses.replace(halves, resume=True), progress=False)
    assert resumed["curve"][0]["from_checkpoint"]
    losses = [[entry["loss"] for entry in run["curve"]] for run in (whole, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert resumed["tuned"]["perplexity"] == pytest.approx(whole["tuned"]["perplexity"], rel=1e-5)


def test_instruction_rows(recipe, json_files):
    rows = dict(train_file=str(json_files / "train.jsonl"), validation_file=str(json_files / "validation.jsonl"))
    recipe = dataclasses.replace(recipe, task="instruction", source_length=16, target_length=64, **rows)
    result = finetune(dataclasses.replace(recipe, group_by_length=True), progress=False)
    assert result["tuned"]["perplexity"] < result["untuned"]["perplexity"]


def test_summaries_of_an_encoder_decoder(recipe, tiny_bart, json_files):
    recipe = dataclasses.replace(
        recipe,
        model=str(tiny_bart),
        task="summarization",
        train_file=str(json_files / "train.jsonl"),
        validation_file=str(json_files / "validation.jsonl"),
        source_column="document",
        target_column="summary",
        source_length=64,
        target_length=16,
        num_beams=2,
        eval_steps=3,
    )
    result = finetune(recipe, progress=False)
    assert {"rouge1", "rouge2", "rougeL", "rougeLsum", "mean_length"} == set(result["tuned"])
    losses = [entry["eval_loss"] for entry in result["curve"] if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(model="./nowhere"), FileNotFoundError, "nowhere"),
        (dict(train_file="nowhere.txt"), FileNotFoundError, "no data file"),
        (dict(method="loftq", bits=1.5), ValueError, "no form at 1.5 bits"),
        (dict(rank=65), ValueError, "rank of 65"),
        (dict(quantization={"assigner": "best"}), ValueError, "assigner must be one of"),
    ],
)
def test_refusals_leave_nothing_behind(recipe, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(dataclasses.replace(recipe, **changes), progress=False)
    assert not pathlib.Path(recipe.output).exists()


def test_a_folder_with_content_is_not_overwritten(recipe):
    output = pathlib.Path(recipe.output)
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        finetune(recipe, progress=False)


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_a_run_that_diverges_says_so_and_leaves_no_adapter(recipe):
    recipe = dataclasses.replace(recipe, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=1e30, save_steps=1)
    recipe = dataclasses.replace(recipe, max_steps=50, logging_steps=40, tables="levels", tables_learning_rate=1e-9)
    with pytest.raises(ValueError, match=r"by step \d .* learning_rate \(it was 1e\+30\) .* serves again as model"):
        finetune(recipe, progress=False)
    output = pathlib.Path(recipe.output)
    assert not (output / "adapter").exists() and not (output / "metrics.json").exists()
    curve = json.loads((output / "curve.json").read_text(), parse_constant=no_constant)
    assert not curve or curve[-1]["loss"] is None
    for checkpoint in (output / "checkpoints").glob("checkpoint-*"):
        stored = load_file(checkpoint / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in stored.values())


def test_tables_that_have_no_storage_end_a_run_as_one_that_diverged(recipe, calibrated):
    """Numbers that float16 levels cannot be: the first checkpoint was to be written with them."""
    recipe = dataclasses.replace(recipe, model=str(calibrated), tables_learning_rate=1e6, save_steps=2)
    with pytest.raises(ValueError, match=r"diverged: by step 2 .* tables_learning_rate \(1e\+06\)"):
        finetune(recipe, progress=False)
    output = pathlib.Path(recipe.output)
    assert not [*(output / "checkpoints").glob("checkpoint-*")] and (output / "curve.json").is_file()


def test_a_loss_that_is_no_number_is_no_divergence_by_itself():
    divergence, model = Divergence(), torch.nn.Linear(2, 2)  # float16 passes by such steps
    state, control = TrainerState(global_step=3), TrainerControl()
    divergence.on_log(None, state, control, {"loss": math.nan}, model=model)
    assert divergence.step is None and not control.should_training_stop
    torch.nn.init.constant_(model.bias, math.inf)
    divergence.on_log(None, state, control, {"loss": 1.0}, model=model)
    assert divergence.step is None  # nothing is looked at without cause
    control.should_save = True
    divergence.on_step_end(None, state, control, model=model)
    assert divergence.step == 3 and control.should_training_stop and not control.should_save


def test_a_base_without_numbers_is_not_blamed_on_the_rate(recipe, tmp_path):
    result = {"untuned": {"loss": None}, "diverged_at": 1, "base": "base"}
    assert "even before training" in why_none(result, recipe, tmp_path)


@pytest.mark.parametrize("ways", [{"max_steps": 1}, {"max_steps": None, "epochs": 1, "accumulation": 10**6}])
def test_a_single_step_is_no_step_at_rate_0(recipe, ways, caplog):
    result = finetune(dataclasses.replace(recipe, warmup_ratio=0.1, **ways), progress=True)
    assert result["steps"] == 1 and result["tuned"]["loss"] != result["untuned"]["loss"]
    assert ("Only 1 optimiser step(s)" in caplog.text) == (ways["max_steps"] is None)
