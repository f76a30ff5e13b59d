"""A run that goes on goes on with its own recipe, which each checkpoint keeps as recipe.json.

Otherwise the checkpoint's optimiser and schedule would go on with the learning rate of before while metrics.json names
the new one, the base of one model would be trained on the tokens of another, and the steps would count batches that
nobody has seen.
"""

import dataclasses
import json
import pathlib
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints.atomic import save_json
from ..checkpoints.guarded import read_json
from ..checkpoints.places import expanded
from .recipe import Recipe
from .settled import used
from .table_checkpoints import has_tables
from .whole_checkpoints import newest_whole

RECIPE_FILE = "recipe.json"

_PLACES = ("model", "train_file", "chat_template")
# What makes a run the one that it is. How long it is, how often it is measured and saved, and how much is computed at a
# time may change: a card may have turned out too small.
_OF_THE_RUN = (
    *_PLACES,
    *("task", "method", "bits", "quantization", "init_steps", "rank", "alpha", "dropout", "target_modules", "rslora"),
    *("dora", "tables", "tables_learning_rate", "dataset", "dataset_config", "train_split", "text_column"),
    *("source_column", "target_column", "max_train_samples", "carve_validation", "data_seed", "block_size", "packing"),
    *("source_length", "target_length", "learning_rate", "scheduler", "warmup_ratio", "weight_decay", "beta2"),
    *("max_grad_norm", "optimizer", "group_by_length", "seed"),
)


class RecipeCheckpoints(TrainerCallback):
    """Writes the recipe into each checkpoint. Comes before `WholeCheckpoints`."""

    def __init__(self, recipe: Recipe):
        """Args: recipe: settled."""
        self._content = of_the_run(recipe)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_json(
                self._content, pathlib.Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / RECIPE_FILE
            )


class ScheduleFromHere(TrainerCallback):
    """Puts the learning rate where the schedule of this run has it.

    PyTorch takes the rate of the next step from the optimiser's state. At the end of a run that is the end of its
    schedule, most often 0, and a run that goes on for more steps would make its first one without learning.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        schedule = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])  # Accelerate wraps it
        if isinstance(schedule, LambdaLR):
            rates = [
                base * share(schedule.last_epoch)
                for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            for group, rate in zip(kwargs["optimizer"].param_groups, rates, strict=True):
                group["lr"] = rate


def check_continued(recipe: Recipe, output: pathlib.Path) -> None:
    """Holds the settled recipe of a run that goes on against the one it began with; checkpoints of before have none.

    Raises:
        OSError, ValueError: it is another one.
    """
    checkpoint = newest_whole(output / "checkpoints", warn=False) if recipe.resume else None
    if checkpoint is None or not (checkpoint / RECIPE_FILE).exists():
        return
    then, now = read_json(checkpoint / RECIPE_FILE, "the recipe of a run"), of_the_run(recipe)
    changed = [name for name in _OF_THE_RUN if then.get(name) != now.get(name)]
    if not changed and now.get("row_order") != then.get("row_order"):
        raise ValueError(
            f"{output} was begun by a version of lowra that put rows of one length in another order "
            "(group_by_length=true): finish it with that version, or give another output."
        )
    if changed:
        words = ", ".join(f"{name}={_word(now.get(name))} (was {_word(then.get(name))})" for name in changed)
        raise ValueError(
            f"resume=true goes on with the recipe of {output}, and this one has {words}: leave it as it was, or give "
            "another output."
        )


def as_begun(recipe: Recipe) -> Recipe:
    """The recipe of a run that goes on with the tables that it began with in place of `auto`.

    Earlier versions trained none unless asked, and wrote no recipe at first; `tables=auto` on the command line chooses
    anew.

    Raises:
        OSError, ValueError: the recipe of the run cannot be read.
    """
    if not recipe.resume or recipe.tables != "auto" or "tables" in recipe.given:
        return recipe
    checkpoint = newest_whole(expanded(recipe.output) / "checkpoints", warn=False)
    if checkpoint is None:
        return recipe
    if (checkpoint / RECIPE_FILE).exists():
        begun = read_json(checkpoint / RECIPE_FILE, "the recipe of a run").get("tables", "frozen")
    else:
        begun = "auto" if has_tables(checkpoint) else "frozen"
    return dataclasses.replace(recipe, tables=begun)


def of_the_run(recipe: Recipe) -> dict[str, Any]:
    """The fields of a settled recipe that make a run the one that it is."""
    content = {name: value for name, value in used(recipe).items() if name in _OF_THE_RUN}
    for name in _PLACES:
        if content.get(name) and (place := expanded(content[name])).exists():
            content[name] = str(place.resolve())
    if recipe.group_by_length:
        content["row_order"] = "seed and epoch"  # earlier versions had another
    return json.loads(json.dumps(content))


def _word(value: object) -> str:
    return "its default" if value is None else str(value)
