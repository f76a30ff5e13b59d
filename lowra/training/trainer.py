"""A recipe as Transformers' Trainer understands it."""

import contextlib
import functools
import logging
import math
import os
import pathlib
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PrinterCallback,
    ProgressCallback,
    SchedulerType,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.training_args import OptimizerNames

from ..integrations.model_patches import use_one_gpu
from .curve import LossBar
from .data import TaskData
from .fewer_walks import FewerWalks
from .head_by_parts import HeadByParts, head_by_parts
from .length_groups import LengthGroups
from .quick_steps import check_quick_steps
from .recipe import Recipe
from .whole_checkpoints import partial_folder

logger = logging.getLogger(__name__)

_FEW_STEPS = 10  # below which a run hardly leaves its start


def training_arguments(recipe: Recipe, checkpoints: pathlib.Path) -> TrainingArguments:
    """The recipe in Transformers' terms.

    Raises:
        ValueError: a schedule, an optimiser or a tracker that is not there or needs more than a recipe can say; the
            Trainer itself would find out after the base has been quantised.
    """
    _check_listed(recipe)
    kind = Seq2SeqTrainingArguments if recipe.task == "summarization" else TrainingArguments
    evaluation = "steps" if recipe.eval_steps else "epoch" if recipe.eval_epochs else "no"
    arguments = kind(
        output_dir=str(partial_folder(checkpoints)),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        per_device_eval_batch_size=recipe.eval_batch_size,
        max_steps=recipe.max_steps or -1,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=min(recipe.warmup_ratio, math.nextafter(1, 0)),  # from 1 on it would be a number of steps
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.beta2,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        bf16=recipe.bf16,
        fp16=recipe.fp16,
        use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU is refused without it
        seed=recipe.seed,
        eval_strategy=evaluation,
        eval_steps=recipe.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # a run that diverges has to show it
        dataloader_num_workers=min(recipe.workers, len(os.sched_getaffinity(0))),  # PyTorch warns of more than cores
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[name.strip() for name in recipe.report_to.split(",")],
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_timeout=4 * 3600,  # the other processes wait while the first one quantises
    )
    use_one_gpu(arguments)  # several are for several processes (torchrun)
    _check_names(recipe, arguments)
    check_quick_steps(recipe, arguments)
    return arguments


def _check_listed(recipe: Recipe) -> None:
    for name, listed in (("optimizer", OptimizerNames), ("scheduler", SchedulerType)):
        values = [value.value for value in listed]
        if getattr(recipe, name) not in values:
            raise ValueError(f"{name}={getattr(recipe, name)} is none of those that there are: {', '.join(values)}.")


def _check_names(recipe: Recipe, arguments: TrainingArguments) -> None:
    layer: Any = torch.nn.Linear(1, 1)  # in the place of the model

    def make_trackers() -> None:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()

    makers = {
        "scheduler": lambda: get_scheduler(recipe.scheduler, torch.optim.SGD(layer.parameters()), 1, 2),
        "optimizer": lambda: Trainer.get_optimizer_cls_and_kwargs(arguments, layer),
        "report_to": make_trackers,
    }
    for name, make in makers.items():
        try:
            make()
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{name}={getattr(recipe, name)} cannot be used here: {reason}") from error


class _ResumableTrainer(FewerWalks):
    """The Trainer, whose rows come in the same order where a run is resumed in a later epoch."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if type(sampler) is LengthGroupedSampler:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return LengthGroups(sampler.batch_size, sampler.lengths, seed)
        return sampler


class _LanguageTrainer(_ResumableTrainer):
    """With the logits of some tokens at a time where the model allows it."""

    @functools.cached_property
    def _head(self) -> HeadByParts | None:
        return head_by_parts(self.accelerator.unwrap_model(self.model))

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if self._head is None else self._head.active():
            return super().compute_loss(*args, **kwargs)


class _SummaryTrainer(_ResumableTrainer, Seq2SeqTrainer):
    pass


def steps_of(recipe: Recipe, rows: int, processes: int) -> int:
    """Optimiser steps of a run, as the Trainer counts them."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    batches = math.ceil(rows / (recipe.batch_size * processes))
    return math.ceil(recipe.epochs * max(1, math.ceil(batches / recipe.accumulation)))


def make_trainer(
    model: PeftModel, recipe: Recipe, data: TaskData, arguments: TrainingArguments, progress: bool = True
) -> Trainer:
    """The Trainer of a run, with `training_arguments`."""
    kind = _SummaryTrainer if recipe.task == "summarization" else _LanguageTrainer
    steps = steps_of(recipe, len(data.train), arguments.world_size)
    if steps == 1:
        arguments.warmup_steps = 0  # or the only step would have the rate at which a warm-up begins, 0
    if steps < _FEW_STEPS and recipe.max_steps is None and progress:
        logger.warning(
            "Only %d optimiser step(s): %d rows, %d x %d a step, %g epoch(s). For more give epochs= or a smaller "
            "accumulation=.",
            steps,
            len(data.train),
            recipe.batch_size * arguments.world_size,
            recipe.accumulation,
            recipe.epochs,
        )
    examples: dict[str, Any] = {"train_dataset": data.train, "eval_dataset": data.validation}  # lists serve
    trainer = kind(
        model=model,
        args=arguments,
        **examples,
        data_collator=data.collate,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if progress:
        trainer.add_callback(LossBar())
    return trainer
