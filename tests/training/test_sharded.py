"""`lowra finetune` with the model sharded over two processes (FSDP2 of Accelerate, gloo): as one process trains."""

import dataclasses
import json
import pathlib
import shutil

import fsdp_on_cpu
import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from other_processes import run_pair
from safetensors.torch import load_file

from lowra.training import finetune

SUMMARIES = {"source_column": "document", "target_column": "summary"}
WORKER = pathlib.Path(__file__).parent / "ddp_worker.py"


def metrics_of_a_pair(recipe, folder, gpus="", **options):
    """What two processes wrote. gpus: those they see; options: of FSDP."""
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe.to_dict()))
    run_pair(WORKER, config, CUDA_VISIBLE_DEVICES=gpus, **fsdp_on_cpu.environment(**options))
    return json.loads((pathlib.Path(recipe.output) / "metrics.json").read_text())


def asked_by(name):
    """What `accelerate launch` sets for one of our files."""
    file = pathlib.Path(__file__).parents[2] / "configs" / "accelerate" / name
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    arguments, _, _ = launch._validate_launch_command(arguments)
    return prepare_multi_gpu_env(arguments)


def test_the_files_for_accelerate_ask_for_what_is_tested():
    found = asked_by("fsdp2.yaml")
    for name, value in fsdp_on_cpu.environment().items():
        assert found[name].lower() == value.lower(), name
    assert "ACCELERATE_USE_FSDP" not in asked_by("ddp.yaml")


@pytest.mark.parametrize(
    ("options", "state", "message"),
    [
        ({}, "SHARDED_STATE_DICT", "checkpoints have no adapter: set it to FULL_STATE_DICT"),
        ({"tables": "levels"}, "FULL_STATE_DICT", "tables=levels cannot be trained with a sharded model"),
        ({"tiled_mlp": True}, "FULL_STATE_DICT", "tiled_mlp=true has not been tried with a sharded model"),
        ({"task": "summarization", **SUMMARIES}, "FULL_STATE_DICT", "task=summarization generates while it evaluates"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_any_work(recipe, monkeypatch, options, state, message):
    for name, value in fsdp_on_cpu.environment(FSDP_STATE_DICT_TYPE=state).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        finetune(dataclasses.replace(recipe, **options), progress=False)
    assert not pathlib.Path(recipe.output).exists()


def check_same(together, alone, close):
    losses = [[entry["loss"] for entry in result["curve"]] for result in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=close)
    for when in ("untuned", "tuned"):
        assert together[when]["perplexity"] == pytest.approx(alone[when]["perplexity"], rel=close), when


@pytest.mark.slow
def test_two_processes_with_half_the_model_each_have_the_loss_of_one(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, bits=1.5, gradient_checkpointing=True)
    alone = finetune(recipe, progress=False)
    pair = dataclasses.replace(recipe, batch_size=recipe.batch_size // 2, output=str(tmp_path / "pair"), save_steps=3)
    check_same(metrics_of_a_pair(pair, tmp_path), alone, 1e-4)
    found, expected = (
        load_file(pathlib.Path(output) / "adapter" / "adapter_model.safetensors")
        for output in (pair.output, recipe.output)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    resumed = dataclasses.replace(pair, resume=True)
    check_same(metrics_of_a_pair(resumed, tmp_path), alone, 1e-4)  # of which nothing is left to train
    shutil.rmtree(tmp_path / "pair" / "checkpoints" / "checkpoint-6")
    check_same(metrics_of_a_pair(resumed, tmp_path), alone, 1e-4)


@pytest.mark.slow
def test_shares_in_the_memory_of_the_host_train_in_bfloat16_too(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, bits=1.5, bf16=True)
    alone = finetune(recipe, progress=False)
    pair = dataclasses.replace(recipe, batch_size=recipe.batch_size // 2, output=str(tmp_path / "pair"))
    check_same(metrics_of_a_pair(pair, tmp_path, FSDP_OFFLOAD_PARAMS="true"), alone, 5e-3)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("offload", ["false", "true"])
def test_two_gpus_have_the_loss_of_one(recipe, tmp_path, offload):
    recipe = dataclasses.replace(recipe, bits=1.5, bf16=True, gradient_checkpointing=True)
    alone = finetune(recipe, progress=False)
    pair = dataclasses.replace(recipe, batch_size=recipe.batch_size // 2, output=str(tmp_path / "pair"), save_steps=3)
    check_same(metrics_of_a_pair(pair, tmp_path, "0,1", FSDP_OFFLOAD_PARAMS=offload), alone, 5e-3)
    shutil.rmtree(tmp_path / "pair" / "checkpoints" / "checkpoint-6")
    resumed = dataclasses.replace(pair, resume=True)
    check_same(metrics_of_a_pair(resumed, tmp_path, "0,1", FSDP_OFFLOAD_PARAMS=offload), alone, 5e-3)
