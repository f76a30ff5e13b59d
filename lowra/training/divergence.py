"""A training that diverges is ended: once the adapter is no longer made of numbers, no step brings it back.

A loss that is no number does not tell by itself: in float16 the Trainer passes such steps by, and lowers the scale of
the loss. So it is what is trained that is looked at: after such a loss, before each checkpoint, and at the end.
"""

import math
import pathlib
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..nn.row_layout import is_sharded
from ..nn.trained_tables import have_storage
from .recipe import Recipe
from .whole_checkpoints import newest_whole


class Divergence(TrainerCallback):
    """Ends the run at the step where it is found, without a checkpoint of it.

    Attributes:
        step: the optimiser step, or None.
    """

    step: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self._look(kwargs["model"], state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self._look(kwargs["model"], state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._look(kwargs["model"], state, control)

    def _look(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> None:
        if self.step is None and not _is_finite(model):
            self.step = state.global_step
        if self.step is not None:
            control.should_save = control.should_evaluate = False
            control.should_training_stop = True


@torch.no_grad()
def _is_finite(model: nn.Module) -> bool:
    """Whether all that is trained is, and would be as it is stored, on all processes, which call it together."""
    parts: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = torch.stack([(part.to_local() if is_sharded(part) else part).isfinite().all() for part in parts])
    return all(gather_object([bool(own.cpu().all()) and have_storage(model)]))


def why_none(result: dict, recipe: Recipe, checkpoints: pathlib.Path) -> str:
    """Why a run has no adapter, and what to do.

    Args:
        result: of a training that diverged.
        recipe: of it.
        checkpoints: of it, all of them from before.
    """
    if None in result["untuned"].values():
        return (
            "There is no adapter: the base gives no finite loss even before training, which in float16 is an overflow. "
            "Give bf16=true, or fp16=false and bf16=false, and another output."
        )
    sound = newest_whole(checkpoints, warn=False)
    kept = "" if sound is None else f" {sound} is from before."
    rates = f"learning_rate (it was {recipe.learning_rate:g})"
    if recipe.tables != "frozen":
        rates += f" or tables_learning_rate ({recipe.tables_learning_rate:g})"
    return (
        f"The training diverged: by step {result['diverged_at']} the adapter or its loss was NaN or infinite, and none "
        f"was written.{kept} Give a lower {rates} and another output; "
        f"{result['base']} serves again as model."
    )
