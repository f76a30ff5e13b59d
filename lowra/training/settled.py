"""A recipe as it takes effect: on a packed base, and without fields that another one makes meaningless.

A file is written for many runs, so what has no effect there gives way with a word. What stands on the command line was
meant for this run: it is refused by its name. metrics.json records what was used.
"""

import dataclasses
import logging
import typing

import torch

from ..checkpoints.hub import resolve_folder
from ..device import choose_device, has_bfloat16
from .default_tables import with_tables_chosen
from .methods import METHODS, check_method
from .packed_base import on_packed_base, packed_config
from .problems import Problems
from .recipe import Recipe

logger = logging.getLogger(__name__)

# What an override is meant to take the place of goes without a word.
_REPLACED_BY = {
    "train_file": ("dataset", "dataset_config", "train_split", "validation_split"),
    "validation_file": ("validation_split", "carve_validation", "data_seed"),
    "max_steps": ("epochs",),
    "task": ("source_column", "target_column", "source_length", "target_length", "text_column", "block_size"),
}
_SOURCE_AND_TARGET = ("source_column", "target_column", "source_length", "target_length")


def settle(recipe: Recipe) -> Recipe:
    """The recipe as it takes effect.

    Raises:
        FileNotFoundError, ValueError: no such model, one that another program packed, a method that does not have these
            options, an override without effect, or a type of number that the device does not compute.
    """
    recipe = without_idle_fields(on_device(recipe, choose_device()))
    source = resolve_folder(recipe.model)
    packed = packed_config(source, recipe)
    if packed is None:
        check_method(recipe)
    else:
        recipe = on_packed_base(recipe, source, packed)
    return without_idle_fields(with_tables_chosen(recipe, source, packed))


def on_device(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with float16 in place of bfloat16 on a GPU that only emulates that.

    Raises:
        ValueError: an override asks for bfloat16 there, or fp16 is asked for on a CPU.
    """
    if recipe.fp16 and device.type == "cpu":
        raise ValueError(
            "fp16=true needs a GPU: on a CPU give bf16=true, or bf16=false for float32, and leave fp16 out."
        )
    if not recipe.bf16 or has_bfloat16(device):
        return recipe
    name = torch.cuda.get_device_name(device)
    if "bf16" in recipe.given:
        raise ValueError(
            f"bf16=true: {name} has no bfloat16 and emulates it, many times slower. Give fp16=true for float16 with "
            "loss scaling, or bf16=false for float32."
        )
    logger.warning("%s has no bfloat16: the run takes float16 with loss scaling (fp16=true).", name)
    return dataclasses.replace(recipe, bf16=False, fp16=True)


def used(recipe: Recipe) -> dict:
    """The keys of a settled recipe that have an effect, for the record."""
    idle = {*idle_fields(recipe)}
    if packed_config(resolve_folder(recipe.model), recipe) is not None:
        idle.add("init_steps")  # as many as the base was packed with
    return {name: value for name, value in recipe.to_dict().items() if name not in idle}


def without_idle_fields(recipe: Recipe) -> Recipe:
    """A copy in which fields without effect have their defaults.

    Raises:
        ValueError: one of them was set by an override.
    """
    idle = idle_fields(recipe)
    check_idle_overrides(recipe)
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    changes: dict[str, typing.Any] = {name: defaults[name] for name in idle}
    replaced = {name for given in recipe.given & _REPLACED_BY.keys() for name in _REPLACED_BY[given]}
    asked = [
        name
        for name, default in changes.items()
        if getattr(recipe, name) not in (None, default) and name not in replaced
    ]
    if asked:
        words = "; ".join(f"{name}={getattr(recipe, name)} {idle[name]}" for name in asked)
        logger.warning("These of the recipe have no effect: %s.", words)
    if recipe.method == "lora16":
        if "bits" in recipe.given and recipe.bits not in (16, 32):
            raise ValueError(
                f"bits={recipe.bits:g} has no effect with method=lora16, whose base is dense: leave it out."
            )
        changes["bits"] = 16.0
    return dataclasses.replace(recipe, **changes)


def check_idle_overrides(recipe: Recipe) -> None:
    """
    Raises:
        ValueError: a field without effect was set by an override.
    """
    idle, problems = idle_fields(recipe), Problems("The command")
    for name in sorted(recipe.given & idle.keys()):
        with problems.noted():
            if getattr(recipe, name) is not None:
                raise ValueError(f"{name}={getattr(recipe, name)} has no effect {idle[name]}: leave it out.")
    problems.report()


def idle_fields(recipe: Recipe) -> dict[str, str]:
    """Fields that other fields of the recipe make meaningless, each with the reason."""
    in_blocks = recipe.task in ("language_modeling", "chat")
    idle = dict.fromkeys(_SOURCE_AND_TARGET if in_blocks else ("block_size",), "")
    idle |= dict.fromkeys(() if recipe.task == "summarization" else ("num_beams",), "")
    idle |= dict.fromkeys(() if recipe.task == "chat" else ("chat_template", "packing"), "")
    if recipe.task in ("summarization", "chat") or recipe.task == "instruction" and recipe.target_column:
        idle["text_column"] = ""
    idle = dict.fromkeys(idle, f"with task={recipe.task}")
    if recipe.train_file:
        unread = ("dataset", "dataset_config", "train_split", "validation_split")
        idle |= dict.fromkeys(unread, "beside train_file")
    elif recipe.validation_file:
        idle["validation_split"] = "beside validation_file"
    if recipe.validation_file or not recipe.train_file and recipe.validation_split:
        idle |= dict.fromkeys(("carve_validation", "data_seed"), "where there is validation data")
    if recipe.max_steps is not None:
        idle["epochs"] = f"beside max_steps={recipe.max_steps} (max_steps= takes that away)"
    if recipe.eval_steps is not None:
        idle["eval_epochs"] = f"beside eval_steps={recipe.eval_steps}"
    if recipe.scheduler == "constant":
        idle["warmup_ratio"] = "with scheduler=constant (constant_with_warmup has one)"
    for field in ("offload_activations", "tiled_mlp"):
        if getattr(recipe, field):
            idle["layer_graphs"] = f"beside {field}=true"
    if not recipe.gradient_checkpointing:
        idle |= dict.fromkeys(("layer_graphs", "offload_activations"), "without gradient_checkpointing")
    if recipe.tables == "frozen":
        idle["tables_learning_rate"] = "with tables=frozen"
    if recipe.method in METHODS and METHODS[recipe.method].init != "loftq":
        idle["init_steps"] = f"with method={recipe.method}, which takes no steps to its start"
    return idle
