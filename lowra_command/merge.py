"""`lowra merge`: a packed base and its adapter to a plain dense checkpoint."""

import argparse

from .parser import Later, add_trust, place


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="merge a packed base and its adapter into a dense checkpoint that needs no lowra",
        description="Writes the 16-bit weights that base and adapter together stand for, with tokenizer and chat "
        "template: a checkpoint for any engine. With --original, what was learned is put onto the original weights "
        "instead. The dense model is held in memory.",
        epilog="example: lowra merge runs/mine/adapter --output merged",
    )
    parser.add_argument("model", metavar="DIR", help="folder of an adapter, or folder or hub name of a packed base")
    parser.add_argument("--adapter", metavar="PATH", help="adapter of the packed base, where DIR is one")
    parser.add_argument("--output", required=True, type=place, help="folder to create")
    parser.add_argument("--original", metavar="MODEL", help="the dense checkpoint that the base was packed from")
    parser.add_argument("--device", default="cpu", help="where the model is merged: cpu, cuda, cuda:1 …")
    add_trust(parser)
    parser.set_defaults(run=Later("lowra.commands.merge:run"))
