"""`lowra finetune`: one fine-tuning run from a recipe."""

import argparse

from .parser import Later, add_memory_check


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
    add_memory_check(parser)
    parser.set_defaults(run=Later("lowra.commands.finetune:run"))
