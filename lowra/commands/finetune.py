"""`lowra finetune`: one fine-tuning run from a recipe."""

import argparse
import os

from lowra_command.recipe_files import find_recipe

from ..checkpoints.records import TABLES_FILE
from ..training.continued import as_begun
from ..training.finetune import check_start, finetune
from ..training.recipe import Recipe, load_recipe
from .memory import announce_finetuning


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError, ValueError: recipe, model or data that cannot be used.
    """
    recipe = as_begun(load_recipe(find_recipe(args.config), args.overrides))
    check_start(recipe)
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes of a distributed run
    announce_finetuning(recipe, not args.no_memory_check, first)

    def promise(steps: int) -> None:
        if first and recipe.save_steps:
            print(_promised(recipe, steps))

    result = finetune(recipe, progress=first, at_start=promise)
    if first:
        _show(recipe, result)
    return result


def _promised(recipe: Recipe, steps: int) -> str:
    """When checkpoints will be written: the Trainer adds one after the last step."""
    every = recipe.save_steps or steps
    if every >= steps:
        when = f"A checkpoint after the last step, {steps}, and none before it (save_steps={every})"
    else:
        when = f"A checkpoint every {every} steps" + (f" and after step {steps}, the last" if steps % every else "")
    return f"{when}, in {recipe.output}; after a crash add resume=true."


def _show(recipe: Recipe, result: dict) -> None:
    print(f"{recipe.method}: {result['nominal_bits']:.3g} nominal bits, {result['true_bits']:.3f} true bits per weight")
    evaluating = f", {result['evaluating_seconds']:.1f} s of that evaluating" if result["evaluating_seconds"] else ""
    steps = "1 step" if result["steps"] == 1 else f"{result['steps']} steps"
    resumed = f", {result['steps_before']} of them before it was resumed and the others"
    if result["steps_before"] == result["steps"]:
        print(f"{steps}, all of them before it was resumed: nothing was left to train")
    else:
        took = f" in {result['train_seconds']:.1f} s on {result['device']}{evaluating}"
        print(f"{steps}{resumed if result['steps_before'] else ''}{took}")
    for key, after in result["tuned"].items():
        before = result["untuned"].get(key)
        print(f"{key:<12} {_number(before):>12} -> {_number(after)}")
    if recipe.task == "language_modeling":  # perplexity depends on it
        size = result["recipe"]["block_size"]
        print(f"measured in blocks of {size} tokens: give `lowra evaluate` --block-size {size} to compare")
    tables = result["recipe"]["tables"]
    beside = "" if tables == "frozen" else f" with {TABLES_FILE} (tables={tables})"
    print(f"adapter in {result['adapter']}{beside}, to be used with the base in {result['base']}")
    verb = "chat" if recipe.task == "chat" else "generate"
    prompt = "" if recipe.task == "chat" else ' --prompt "..."'
    if recipe.task != "summarization":
        print(f"  lowra {verb} {result['base']} --adapter {result['adapter']}{prompt}")


def _number(value: object) -> str:
    if value is None:
        return "diverged"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
