"""Trained tables in the Trainer's checkpoints, which hold an adapter only."""

import pathlib

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from ..atomic import save_tensors

_FILE = "table_changes.safetensors"


class TableCheckpoints(TrainerCallback):
    """Writes the parameters of trained tables beside every checkpoint, and reads them back."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        """Args: parameters: as `lowra.tables.train_tables` returns them."""
        self.parameters = parameters

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_tensors({name: p.detach().cpu() for name, p in self.parameters.items()}, folder / _FILE)

    @torch.no_grad()
    def restore(self, checkpoint: str | pathlib.Path) -> None:
        """
        Raises:
            ValueError: the checkpoint's run trained other tables.
        """
        path = pathlib.Path(checkpoint) / _FILE
        stored = load_file(path) if path.is_file() else {}
        if set(stored) != set(self.parameters):
            raise ValueError(f"{checkpoint} belongs to a run that trained other tables: give another output.")
        for name, parameter in self.parameters.items():
            parameter.copy_(stored[name])
