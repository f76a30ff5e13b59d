"""A run that goes on goes on with its own recipe, which is kept as OUTPUT/recipe.json.

Otherwise the checkpoint's optimiser and schedule would go on with the learning rate of before while metrics.json names
the new one, the base of one model would be trained on the tokens of another, and the steps would count batches that
nobody has seen.
"""

import json
import pathlib
from typing import Any

from ..checkpoints.atomic import save_json
from ..checkpoints.guarded import read_json
from ..checkpoints.places import expanded
from .recipe import Recipe
from .settled import used

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


def keep_recipe(recipe: Recipe, output: pathlib.Path) -> None:
    """Writes a settled recipe into the folder of its run."""
    save_json(_of_the_run(recipe), output / RECIPE_FILE)


def check_continued(recipe: Recipe, output: pathlib.Path) -> None:
    """Holds the settled recipe of a run that goes on against the one it began with; runs of before have none.

    Raises:
        OSError, ValueError: it is another one.
    """
    path = output / RECIPE_FILE
    if not recipe.resume or not path.exists():
        return
    then, now = read_json(path, "the recipe of a run"), _of_the_run(recipe)
    changed = [name for name in _OF_THE_RUN if then.get(name) != now.get(name)]
    if changed:
        words = ", ".join(f"{name}={_word(now.get(name))} (was {_word(then.get(name))})" for name in changed)
        raise ValueError(
            f"resume=true goes on with the recipe of {output}, and this one has {words}: leave it as it was, or give "
            "another output."
        )


def _of_the_run(recipe: Recipe) -> dict[str, Any]:
    content = {name: value for name, value in used(recipe).items() if name in _OF_THE_RUN}
    for name in _PLACES:
        if content.get(name) and (place := expanded(content[name])).exists():
            content[name] = str(place.resolve())
    return json.loads(json.dumps(content))


def _word(value: object) -> str:
    return "its default" if value is None else str(value)
