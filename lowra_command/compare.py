"""`lowra compare`: a grid of fine-tuning runs, in one table and one picture."""

import argparse

from .parser import GOES_ON, Later, add_overrides, place


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="fine-tune by several methods at several budgets and tabulate the results",
        description="Run methods x bits x seeds of one recipe and write one table (Markdown and JSON) and one picture. "
        "Cells that are finished are kept; combinations that a method has no form for are left out.",
        epilog="example: lowra compare base-30m-wikitext2 --methods lora16,loftq,lowra --bits 1.5,2,4 "
        "--seeds 0,1,2 --output runs/table2",
    )
    parser.add_argument(
        "config", metavar="RECIPE", help="of everything that does not vary: a YAML file or a name of lowra recipes"
    )
    add_overrides(parser)
    parser.add_argument(
        "--methods",
        required=True,
        help="comma-separated, of lora16, qlora, loftq, pissa, assigner_only, lowra, hqq; overrides may follow: "
        "lowra:quantization.sensitivity=none",
    )
    parser.add_argument("--bits", default="2", help="comma-separated nominal bits (default 2)")
    parser.add_argument("--seeds", default="0", help="comma-separated seeds (default 0)")
    parser.add_argument("--output", type=place, required=True, metavar="DIR", help="folder of the grid")
    parser.set_defaults(run=Later("lowra.commands.compare:run"), interrupted=GOES_ON)
