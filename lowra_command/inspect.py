"""`lowra inspect`: where the bits of a packed checkpoint went, and what they cost."""

import argparse

from .parser import Later, add_trust, place


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show bits, bytes and errors of a packed checkpoint, and draw them",
        description="Shows which layers and channels of a packed checkpoint got which bits, nominal against true bits, "
        "its bytes against bf16 and NF4, and the memory it needs. With --original also how far every channel is from "
        "the original. With --plot the paper's pictures for this model (figures 2 and 7 to 10).",
    )
    parser.add_argument("model", help="folder written by `lowra quantize`")
    parser.add_argument("--original", metavar="MODEL", help="the checkpoint it was made from, for errors and pictures")
    parser.add_argument(
        "--plot",
        type=place,
        metavar="PLACE",
        help="folder, .pdf, or an image name such as small.png (small-bits.png …)",
    )
    parser.add_argument("--layers", action="store_true", help="list every layer, not only every kind of layer")
    add_trust(parser)
    parser.set_defaults(run=Later("lowra.commands.inspect:run"))
