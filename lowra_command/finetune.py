"""`lowra finetune`: one fine-tuning run from a recipe."""

import argparse

from .parser import Later, add_memory_check, add_overrides


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="quantise a model (where it is not yet) and fine-tune an adapter on it",
        description="Run the recipe of a YAML file: quantise the base by the chosen method, fine-tune the adapter, and "
        "write adapter, loss curve and metrics to the recipe's output folder. Every save_steps steps a checkpoint is "
        "written: after a crash the same command with resume=true goes on from the newest.",
        epilog="example: lowra finetune 8gb-chat train_file=conversations.jsonl output=runs/first",
    )
    parser.add_argument(
        "config", metavar="RECIPE", help="a YAML file, or the name of a recipe that comes with lowra (lowra recipes)"
    )
    add_overrides(parser)
    add_memory_check(parser)
    parser.set_defaults(
        run=Later("lowra.commands.finetune:run"), interrupted="; resume=true goes on from the newest checkpoint"
    )
