"""`lowra compare`: a grid of fine-tuning runs, in one table and one picture."""

import argparse
import re

from lowra_command.recipe_files import find_recipe

from ..checkpoints.places import usable_folder
from ..optional import require
from ..training.grid import plan_grid, run_grid
from ..training.recipe import load_recipe

_COMMAS = r",(?![^\[]*\])"  # outside brackets: quantization.menu=[2,4] is one override


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError, ValueError: recipe, grid, model or data that cannot be used.
    """
    require("lowra compare", "matplotlib")
    output = usable_folder(args.output)
    recipe = load_recipe(find_recipe(args.config), args.overrides)
    cells = plan_grid(recipe, re.split(_COMMAS, args.methods), _numbers(args.bits, float), _numbers(args.seeds, int))
    result = run_grid(recipe, cells, output)
    print((output / "table.md").read_text(encoding="utf-8"))
    print(f"table in {result['table']}, picture in {result['picture']}")
    return result


def _numbers(text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected numbers apart by commas; got {text!r}.") from None
