"""Trained tables under the Trainer: a learning rate of their own, and a place in its checkpoints."""

import pathlib
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints.atomic import save_tensors
from ..checkpoints.guarded import read_tensors

_FILE = "table_changes.safetensors"


def has_tables(checkpoint: pathlib.Path) -> bool:
    """Whether the run of a checkpoint trains tables."""
    return (checkpoint / _FILE).exists()


def set_tables_learning_rate(trainer: Trainer, parameters: dict[str, nn.Parameter], rate: float) -> None:
    """Moves the parameters of trained tables into a group of the optimiser with this peak rate and no weight decay.

    They are changes of levels between -1 and 1 and relative changes of scales, so what rate suits them does not follow
    that of the adapter (docs/lab/accuracy.md).
    """
    optimizer = trainer.create_optimizer()
    own = {id(parameter) for parameter in parameters.values()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    optimizer.add_param_group({"params": list(parameters.values()), "lr": rate, "weight_decay": 0.0})


class TableCheckpoints(TrainerCallback):
    """Writes the parameters of trained tables into every checkpoint, itself only an adapter, and reads them back."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        """Args: parameters: as `lowra.nn.trained_tables.train_tables` returns them."""
        self.parameters = parameters

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = pathlib.Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            save_tensors({name: p.detach().cpu() for name, p in self.parameters.items()}, folder / _FILE)

    @torch.no_grad()
    def restore(self, checkpoint: str | pathlib.Path) -> None:
        """
        Raises:
            ValueError: the checkpoint's run trained other tables.
        """
        path = pathlib.Path(checkpoint) / _FILE
        stored = read_tensors(path, "tables that were being trained")[0] if path.exists() else {}
        if set(stored) != set(self.parameters):
            raise ValueError(f"{checkpoint} belongs to a run that trained other tables: give another output.")
        for name, parameter in self.parameters.items():
            parameter.copy_(stored[name])
