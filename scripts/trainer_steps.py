"""The public door of `bench_training.py`: steps of the recipe's Trainer, as `lowra finetune` makes it."""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

import torch
from bench_cards import collate
from gpu_clock import PREPARING, busy, memory, reset_peak, synchronize
from peft import LoraConfig, get_peft_model
from random_models import make_model
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

import lowra
from lowra.nn.trained_tables import train_tables
from lowra.training.data import TaskData
from lowra.training.default_tables import chosen_tables
from lowra.training.quick_steps import quicken_steps
from lowra.training.recipe import Recipe
from lowra.training.table_checkpoints import TRAINED_TABLES, set_tables_learning_rate
from lowra.training.trainer import make_trainer, training_arguments


def through_trainer(args: argparse.Namespace, base: float, liger: bool, batch: int, length: int) -> dict[str, Any]:
    """What is found of a model of random weights."""
    recipe = Recipe(
        model=args.shape, dataset="random tokens", rank=args.rank, bits=base, block_size=length, batch_size=batch,
        accumulation=1, optimizer=args.optimizer, liger=liger, bf16=args.dtype == torch.bfloat16,
        fp16=args.dtype == torch.float16, tables=args.tables or "frozen",
    )  # fmt: skip
    model = make_model(args.shape, base, device=args.device, dtype=args.dtype)
    reset_peak()
    return trained(model, recipe, args.steps)


def trained(model: Any, recipe: Recipe, steps: int) -> dict[str, Any]:
    """A packed model's steps as `lowra finetune` takes them, on random tokens.

    Args:
        model: gets an adapter on all packed layers but the head.
        recipe: of the run, but for its length.
        steps: timed ones.

    Returns:
        milliseconds of a step, from one step's end to the next one's: with the loader, clipping, schedule and log.
    """
    every = PREPARING + steps + 1  # the last under the profiler
    tables = chosen_tables(recipe, None)  # "auto" as on a base that was not calibrated
    recipe = dataclasses.replace(recipe, max_steps=every, save_steps=None, tables=tables)
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, lowra.LowRALinear)]
    names = [name for name in names if model.get_submodule(name) is not head]
    lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    bare = model.get_base_model()
    bare.config.use_cache = False
    bare.gradient_checkpointing_enable({"use_reentrant": False})
    rows = torch.randint(0, bare.config.vocab_size, (every * recipe.batch_size, recipe.block_size)).tolist()
    examples = [{"input_ids": ids, "labels": ids} for ids in rows]
    clock = _Clock(steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(recipe, pathlib.Path(folder) / "checkpoints")
        quicken_steps(model, recipe, arguments)
        changes = {}
        if recipe.tables != "frozen":
            changes = train_tables(model, **TRAINED_TABLES[recipe.tables])
        data = TaskData(examples, examples[:1], tokenizer=None, collate=collate)
        trainer = make_trainer(model, recipe, data, arguments, progress=False)
        if changes:
            set_tables_learning_rate(trainer, changes, recipe.tables_learning_rate)
        trainer.add_callback(clock)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.found | {"loss": losses[-1], "optimizer": recipe.optimizer}


class _Clock(TrainerCallback):
    """Takes the time of steps in the middle of a run, and looks at the GPU's in the last one."""

    def __init__(self, steps: int):
        self._steps, self._ends = steps, [time.perf_counter()]
        activities = [ProfilerActivity.CUDA] if torch.cuda.is_available() else None
        self._profiler = profile(activities=activities)
        self.found: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize()
        self._ends.append(time.perf_counter())
        if state.global_step == PREPARING + self._steps:
            times = [1e3 * (end - start) for start, end in zip(self._ends, self._ends[1:], strict=False)]
            self.found = {"ms": statistics.median(times[PREPARING:])} | memory()
            self.found["preparing_s"] = sum(times[:PREPARING]) / 1e3
            self._profiler.start()
        elif state.global_step > PREPARING + self._steps:
            self._profiler.stop()
            self.found["gpu_ms"], self.found["kernels"] = busy(self._profiler)
