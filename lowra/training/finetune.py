"""One fine-tuning run: base -> initial adapter -> Transformers' Trainer -> adapter, loss curve and metrics.

OUTPUT/base         packed base with its initial adapter; absent for dense bases and for models packed already
OUTPUT/checkpoints  of the Trainer, each whole or not there, from which a run resumes
OUTPUT/adapter      the trained PEFT adapter, with tables.safetensors if tables were trained
OUTPUT/curve.json, curve.png, metrics.json
metrics.json comes last: where it is, everything is there and belongs to it. Of a run that diverged there is the curve.
"""

import contextlib
import logging
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints.atomic import finite, locked, save_json, save_text
from ..checkpoints.configs import CONFIG_FILE
from ..checkpoints.hub import local_folder
from ..checkpoints.places import expanded, usable_folder
from ..checkpoints.records import ADAPTER_CONFIG
from ..device import choose_device
from ..integrations.fsdp import is_sharded_run
from ..nn.checkpointing import enable_checkpointing
from ..nn.trained_tables import bake_tables, save_tables, train_tables
from ..optional import require
from .adapter_card import CARD_FILE, adapter_card
from .continued import RecipeCheckpoints, ScheduleFromHere, as_begun, check_continued
from .curve import Evaluations, mean_loss, save_curve
from .data import TaskData, load_data
from .divergence import Divergence, why_none
from .evaluation import autocast, language_model_metrics, summary_metrics
from .methods import Base, attach_adapter, compute_dtype, load_base, prepare_base
from .packing import check_packing
from .problems import Problems
from .quick_steps import quicken_steps
from .recipe import Recipe
from .settled import check_idle_overrides, on_device, settle, used
from .sharding import OnceSharded, check_sharded_run, gathered, share_out, untuned_of
from .table_checkpoints import TRAINED_TABLES, set_tables_learning_rate
from .trainer import make_trainer, steps_of, training_arguments
from .whole_checkpoints import WholeCheckpoints, keep_newest, newest_whole, put_in_place

logger = logging.getLogger(__name__)


def finetune(recipe: Recipe, progress: bool = True, at_start: Callable[[int], object] | None = None) -> dict:
    """Runs a recipe from the model to the metrics.

    Args:
        recipe: what to do.
        progress: show it.
        at_start: called with the number of optimiser steps once data and base are there, before anything is trained.

    Returns:
        the content of `OUTPUT/metrics.json`: bits, untuned and tuned metrics, loss curve, seconds, peak bytes, paths.

    Raises:
        FileNotFoundError, ValueError: recipe, model or data that cannot be used, or another run that writes there;
            nothing has been written then. ValueError too where the training diverged.
    """
    asked = recipe = as_begun(recipe)
    check_start(recipe)
    recipe = settle(recipe)
    # Of several processes the first decides: to one that starts later the folder is already the run's own.
    first = os.environ.get("RANK", "0") == "0"
    output = usable_folder(recipe.output) if first else expanded(recipe.output)
    if first and output.exists() and any(output.iterdir()) and not recipe.resume:
        raise ValueError(f"{output} exists and is not empty: give another output, or resume=true to go on there.")
    check_continued(recipe, output)
    if first and recipe.tables != asked.tables and recipe.tables != "frozen":
        logger.warning(
            "tables=%s: the base was calibrated, so its levels and scales learn with the adapter and are saved beside "
            "it; tables=frozen leaves them as they are, for vLLM or lowra export.",
            recipe.tables,
        )
    checkpoints = output / "checkpoints"
    with locked(checkpoints) if first else contextlib.nullcontext():  # the same run may have been started twice
        return _run(recipe, output, checkpoints, progress, at_start)


def _run(
    recipe: Recipe,
    output: pathlib.Path,
    checkpoints: pathlib.Path,
    progress: bool,
    at_start: Callable[[int], object] | None,
) -> dict:
    data = load_data(recipe, progress)
    arguments = training_arguments(recipe, checkpoints)  # starts the process group where there are several
    with arguments.main_process_first(desc="quantising the base"):
        base = prepare_base(recipe, output / "base", arguments.device, progress and arguments.process_index == 0)
    if at_start is not None:
        at_start(steps_of(recipe, len(data.train), arguments.world_size))
    result, model = train(recipe, base, data, arguments, progress=progress)
    diverged = result["diverged_at"] is not None
    trained = None if diverged else gathered(model)
    result["adapter"] = str(output / "adapter")
    if arguments.process_index == 0:
        if not diverged:
            (output / "metrics.json").unlink(missing_ok=True)  # of a run that goes on from a finished one
            write_adapter(model, recipe, base, data, result["steps"], output / "adapter", trained)
        save_curve(result["curve"], output, f"{recipe.method}, {base.nominal_bits:.3g} bits")
        if not diverged:
            save_json(result, output / "metrics.json")
    if diverged:
        arguments.distributed_state.wait_for_everyone()  # the first process that fails ends the others
        raise ValueError(why_none(result, recipe, checkpoints))
    return result


def check_start(recipe: Recipe) -> None:
    """Holds a recipe against the machine, before anything is read, downloaded or written.

    Raises:
        FileNotFoundError, ValueError: everything that is missing or cannot be used, in one line.
    """
    problems = Problems("The run")
    with problems.noted():
        check_idle_overrides(recipe)
    with problems.noted():
        _refuse_adapter(local_folder(recipe.model))
    for name in ("train_file", "validation_file", "chat_template"):
        place = getattr(recipe, name)
        with problems.noted():
            if place is not None and not expanded(place).exists():
                kind = "chat template" if name == "chat_template" else "data file"
                raise FileNotFoundError(f"There is no {kind} {place} ({name}).")
    first = os.environ.get("RANK", "0") == "0"
    with problems.noted():
        if first:
            usable_folder(recipe.output)
    if "WORLD_SIZE" not in os.environ:  # of several processes each would wait for the others
        with problems.noted():
            training_arguments(on_device(recipe, choose_device()), pathlib.Path(recipe.output) / "checkpoints")
    with problems.noted():
        check_sharded_run(recipe)
    with problems.noted():
        if recipe.task == "summarization":
            require("task=summarization", "rouge_score")
    problems.report()


def _refuse_adapter(model: pathlib.Path | None) -> None:
    if model is not None and not (model / CONFIG_FILE).exists() and (model / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{model} is an adapter, not a model to begin from: its own run goes on with resume=true and more steps, "
            "and on other data it is trained in Python, by any Trainer, from PeftModel.from_pretrained(base, adapter, "
            "is_trainable=True)."
        )


def write_adapter(
    model: PeftModel,
    recipe: Recipe,
    base: Base,
    data: TaskData,
    steps: int,
    folder: pathlib.Path,
    trained: dict | None = None,
) -> None:
    """The adapter, its card, tables and tokenizer at once: PEFT's users load both from one folder.

    Args:
        trained: the adapter's parameters where the model's own are sharded.
    """
    # it belongs to the packed base: with the dense one it would add the error it makes up for
    adapter: Any = model.peft_config["default"]
    adapter.base_model_name_or_path = base.name
    partial = folder.parent / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial / folder.name), state_dict=trained)
    card = adapter_card(recipe, base, adapter.r, adapter.lora_alpha, steps, adapter.task_type)
    save_text(card, partial / folder.name / CARD_FILE)  # in place of PEFT's, which is a form to fill in
    if recipe.tables != "frozen":
        save_tables(model, partial / folder.name, scales=recipe.tables != "levels")
    data.tokenizer.save_pretrained(str(partial / folder.name))
    put_in_place(partial / folder.name, folder)
    shutil.rmtree(partial)


def train(
    recipe: Recipe,
    base: Base,
    data: TaskData,
    arguments: TrainingArguments,
    untuned: dict | None = None,
    progress: bool = True,
) -> tuple[dict, PeftModel]:
    """Trains an adapter on a prepared base, and measures it before (unless `untuned` is given) and after.

    Returns:
        the metrics, and the model with its trained adapter; of a training that diverged, `diverged_at` names the step,
        and the metrics after it are None.
    """
    main = arguments.process_index == 0
    set_seed(recipe.seed)
    if arguments.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(arguments.device)
    model = attach_adapter(load_base(base, recipe, arguments.device), base, recipe)
    bare: Any = model.get_base_model()
    bare.config.use_cache = recipe.task == "summarization"
    if recipe.gradient_checkpointing:
        enable_checkpointing(bare)
    sharded = is_sharded_run()

    def check() -> None:
        if recipe.packing:
            vocabulary = len(data.tokenizer)
            with autocast(arguments.device, compute_dtype(recipe)):
                check_packing(model, vocabulary, lambda **inputs: model(**inputs, use_cache=False).logits)

    def untuned_metrics() -> dict:
        return measure(model, recipe, data, progress and main) if untuned is None else untuned

    if not sharded:
        check()
    quicken_steps(model, recipe, arguments)  # and what evaluations need for long sequences
    before = None if sharded else untuned_metrics()
    tables = {}
    if recipe.tables != "frozen":
        tables = train_tables(model, **TRAINED_TABLES[recipe.tables])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    partial = pathlib.Path(str(arguments.output_dir))
    if main:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run was writing
    trainer = make_trainer(model, recipe, data, arguments, progress and main)
    checkpoint = newest_whole(partial.parent, main) if recipe.resume else None
    if recipe.resume and main:
        logger.warning("Going on from %s.", checkpoint or "the start: there is no whole checkpoint")
    if tables:
        set_tables_learning_rate(trainer, tables, recipe.tables_learning_rate)
    if sharded:
        trainer.add_callback(OnceSharded(check, untuned_metrics))
    trainer.add_callback(RecipeCheckpoints(recipe))
    trainer.add_callback(ScheduleFromHere())
    trainer.add_callback(divergence := Divergence())
    trainer.add_callback(WholeCheckpoints())
    evaluations = Evaluations()
    trainer.add_callback(evaluations)
    started = time.perf_counter()
    done = None if checkpoint is None else _finished_state(recipe, checkpoint)
    if done is None:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    else:  # of which the Trainer would train one more step
        model.load_adapter(str(checkpoint), "default", is_trainable=True)
        trainer.state = done
        if sharded:
            share_out(trainer)
    arguments.distributed_state.wait_for_everyone()  # each process looks into these folders as long as it trains
    if main:
        if done is not None:
            keep_newest(partial.parent, done.global_step)
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.perf_counter() - started
    curve = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    peak = torch.cuda.max_memory_allocated(arguments.device) if arguments.device.type == "cuda" else None
    if before is None:
        before = untuned_of(trainer.state)
    tuned: dict = dict.fromkeys(before)
    if divergence.step is None:
        if tables:
            bake_tables(model)
        tuned = measure(model, recipe, data, progress and main)
        if None in finite(tuned).values():  # an adapter of numbers with which the model gives none
            divergence.step = trainer.state.global_step
    adapter: Any = model.peft_config["default"]
    result = finite(
        {
            "recipe": used(recipe),
            "method": recipe.method,
            "rank": adapter.r,
            "bits": recipe.bits,
            "nominal_bits": base.nominal_bits,
            "true_bits": base.true_bits,
            "untuned": before,
            "tuned": tuned,
            "diverged_at": divergence.step,
            "train_loss": mean_loss(curve),
            "curve": curve,
            "steps": trainer.state.global_step,
            "steps_before": 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
            "train_seconds": round(seconds, 3),
            "evaluating_seconds": round(evaluations.seconds, 3),  # of these
            "peak_bytes": peak,
            "trainable_parameters": trainable,
            "device": str(arguments.device),
            "base": str(base.folder),
        }
    )
    return result, model


def _finished_state(recipe: Recipe, checkpoint: pathlib.Path) -> TrainerState | None:
    """The state of a checkpoint from which nothing is left to train, or None.

    Raises:
        ValueError: it has more steps than the recipe asks for.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    steps = recipe.max_steps
    if steps is None and state.num_train_epochs == math.ceil(recipe.epochs):
        steps = state.max_steps
    if steps is not None and state.global_step > steps:
        raise ValueError(
            f"{checkpoint} has {state.global_step} steps behind it and the recipe asks for {steps}: remove it, or give "
            "another output."
        )
    return state if state.global_step == steps else None


def measure(model: PeftModel, recipe: Recipe, data: TaskData, progress: bool = True) -> dict:
    """The task's metrics on the validation data."""
    if recipe.task == "summarization":
        return summary_metrics(
            model,
            data.validation,
            data.references or [],
            data.tokenizer,
            data.collate,
            recipe.eval_batch_size,
            recipe.target_length,
            num_beams=recipe.num_beams,
            dtype=compute_dtype(recipe),
            progress=progress,
        )
    dtype = compute_dtype(recipe)
    return language_model_metrics(model, data.validation, data.collate, recipe.eval_batch_size, dtype, progress)
