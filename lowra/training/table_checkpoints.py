"""Trained tables under the Trainer: a learning rate of their own, and whether its checkpoints hold them."""

import pathlib

from torch import nn
from transformers import Trainer

from ..checkpoints.records import CHANGES_FILE

# Options of `train_tables` by the recipe's `tables`.
TRAINED_TABLES: dict[str, dict[str, bool]] = {
    "shared": {"shared": True},
    "levels": {},
    "levels_and_scales": {"scales": True},
}


def has_tables(checkpoint: pathlib.Path) -> bool:
    """Whether the run of a checkpoint trains tables."""
    return (checkpoint / CHANGES_FILE).exists()


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
