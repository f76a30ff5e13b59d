"""`lowra verify`: whether a packed checkpoint or an adapter is, byte for byte, what was written."""

import argparse

from .parser import Later, add_trust


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="check every byte of a packed checkpoint or an adapter against what was written",
        description="Reads a packed checkpoint with its initial adapter, or an adapter, through and checks names, "
        "shapes, every byte of the tensors and the config against what was written. Exit status 2, with the names, "
        "where something differs.",
    )
    parser.add_argument("model", metavar="DIR", help="folder or hub name of a packed checkpoint, or of an adapter")
    add_trust(parser)
    parser.set_defaults(run=Later("lowra.commands.verify:run"))
