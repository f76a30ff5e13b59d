"""Fine-tuning with the model sharded over processes: FSDP2, as `accelerate launch` asks for it.

Accelerate tells a process by its environment, so what cannot be is refused before any work. The model lies in the
host's memory until the Trainer has it sharded, block by block, so nothing is computed with it before. An adapter is
gathered once, after training; what evaluates passes whole batches through the model's own forward, since FSDP gathers a
module when that is called and not when its parts are.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..integrations.fsdp import is_sharded_run
from ..nn.row_layout import is_sharded
from .recipe import Recipe


def check_sharded_run(recipe: Recipe) -> None:
    """
    Raises:
        ValueError: the recipe asks for what cannot be sharded, or Accelerate for what loses the adapter.
    """
    if not is_sharded_run():
        return
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if kind != "FULL_STATE_DICT":
        raise ValueError(
            f"fsdp_state_dict_type is {kind}, with which checkpoints have no adapter: set it to FULL_STATE_DICT, as "
            "configs/accelerate/fsdp2.yaml does."
        )
    if recipe.tables not in ("auto", "frozen"):
        raise ValueError(
            f"tables={recipe.tables} cannot be trained with a sharded model: give tables=frozen, or train with one "
            "copy on each GPU (torchrun, without FSDP)."
        )
    for field in ("offload_activations", "tiled_mlp"):
        if getattr(recipe, field):
            raise ValueError(
                f"{field}=true has not been tried with a sharded model: leave it out, or train with one copy on each "
                "GPU (torchrun, without FSDP)."
            )
    if recipe.task == "summarization":
        raise ValueError(
            "task=summarization generates while it evaluates, which a sharded model cannot: train with one copy on "
            "each GPU (torchrun, without FSDP)."
        )


class OnceSharded(TrainerCallback):
    """Checks and measures the untuned model when it has been sharded; a run that goes on has that in its state."""

    def __init__(self, check: Callable[[], None], measure: Callable[[], dict]):
        """Args: check, measure: called by all processes, in this order."""
        self._check, self._measure = check, measure

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._check()
            found: Any = {"untuned": self._measure(), "step": 0}  # the state's type knows numbers alone
            state.log_history.append(found)


def untuned_of(state: TrainerState) -> dict:
    """What `OnceSharded` measured, in this run or in the one that it goes on from."""
    history: Any = state.log_history
    return next(entry["untuned"] for entry in history if "untuned" in entry)


def computing_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs, which is not where offloaded shares lie."""
    parameter: Any = next(model.parameters())
    return torch.device(parameter.device_mesh.device_type) if is_sharded(parameter) else parameter.device


def share_out(trainer: Trainer) -> None:
    """Shards the model where nothing is left to train, for which the Trainer would do it."""
    from accelerate.utils import fsdp2_prepare_model

    fsdp2_prepare_model(trainer.accelerator, trainer.model)


def gathered(model: nn.Module) -> dict[str, Any] | None:
    """What is trained of a sharded model, whole and on the CPU (empty but on the first process); else None.

    All processes call it together.
    """
    if not any(map(is_sharded, model.parameters())):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)
