"""`lowra compare`: a grid of fine-tuning runs, in one table and one picture."""

import argparse
import pathlib
import re

from ..checkpoints.places import usable_folder
from ..training.grid import plan_grid, run_grid
from ..training.methods import METHODS
from ..training.recipe import load_recipe

_COMMAS = r",(?![^\[]*\])"  # outside brackets: quantization.menu=[2,4] is one override


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="fine-tune by several methods at several budgets and tabulate the results",
        description="Run methods x bits x seeds of one recipe and write one table (Markdown and JSON) and one picture. "
        "Cells that are finished are kept; combinations that a method has no form for are left out.",
        epilog="example: lowra compare configs/base-30m-wikitext2.yaml --methods lora16,loftq,lowra --bits 1.5,2,4 "
        "--seeds 0,1,2 --output runs/table2",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe of everything that does not vary")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="fields of the recipe set otherwise")
    parser.add_argument(
        "--methods",
        required=True,
        help=f"comma-separated, of {', '.join(METHODS)}; overrides may follow: lowra:quantization.sensitivity=none",
    )
    parser.add_argument("--bits", default="2", help="comma-separated nominal bits (default 2)")
    parser.add_argument("--seeds", default="0", help="comma-separated seeds (default 0)")
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR", help="folder of the grid")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError, ValueError: recipe, grid, model or data that cannot be used.
    """
    output = usable_folder(args.output)
    recipe = load_recipe(args.config, args.overrides)
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
