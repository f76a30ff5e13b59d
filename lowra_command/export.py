"""`lowra export`: an adapter for the original of its packed base."""

import argparse

from .parser import Later, place


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export",
        help="make an adapter for the original 16-bit base, or one in NF4, of an adapter trained on a packed base",
        description="Writes what an adapter learned as a LoRA for the dense original: its difference from where it "
        "began, of twice the rank where its start makes up for the quantisation. PEFT, vLLM and others load it without "
        "lowra.",
        epilog="example: lowra export runs/mine/adapter --output lora",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a LoRA adapter that was trained on a packed base")
    parser.add_argument(
        "--initial",
        type=place,
        metavar="PATH",
        help="the initial adapter that it began with (default: initial_adapter of its packed base)",
    )
    parser.add_argument("--output", required=True, type=place, help="folder to create")
    parser.set_defaults(run=Later("lowra.commands.export:run"))
