"""`lowra finetune`: one fine-tuning run from a recipe."""

import argparse
import os

from ..training.finetune import finetune
from ..training.recipe import Recipe, load_recipe


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="quantise a model (where it is not yet) and fine-tune an adapter on it",
        description="Run the recipe of a YAML file: quantise the base by the chosen method, fine-tune the adapter, and "
        "write adapter, loss curve and metrics to the recipe's output folder.",
        epilog="example: lowra finetune configs/wikitext2.yaml model=PATH bits=1.75 output=runs/first",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="fields of the recipe set otherwise")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError, ValueError: recipe, model or data that cannot be used.
    """
    recipe = load_recipe(args.config, args.overrides)
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes of a distributed run
    result = finetune(recipe, progress=first)
    if first:
        _show(recipe, result)
    return result


def _show(recipe: Recipe, result: dict) -> None:
    print(f"{recipe.method}: {result['nominal_bits']:g} nominal bits, {result['true_bits']:.3f} true bits per weight")
    print(f"{result['steps']} steps in {result['train_seconds']:.1f} s on {result['device']}")
    for key, after in result["tuned"].items():
        before = result["untuned"].get(key)
        print(f"{key:<12} {_number(before):>12} -> {_number(after)}")
    print(f"adapter in {result['adapter']}, to be used with the base in {result['base']}")


def _number(value: object) -> str:
    if value is None:
        return "diverged"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
