"""`lowra evaluate`: perplexity and next-token accuracy of a model on a text file."""

import argparse

from .parser import Later, add_trust, place


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure perplexity and next-token accuracy on text",
        description="Measure perplexity (exp of the mean loss over blocks of text) and next-token accuracy of a "
        "packed or dense model, with or without an adapter.",
        epilog="example: lowra evaluate runs/first/base --adapter runs/first/adapter --data validation.txt",
    )
    parser.add_argument("model", metavar="DIR", help="folder or hub name of a packed or dense model")
    parser.add_argument("--adapter", type=place, metavar="PATH", help="folder of an adapter, of PEFT or packed")
    parser.add_argument("--force", action="store_true", help="use a packed adapter in spite of its label")
    parser.add_argument("--data", required=True, metavar="FILE", help="UTF-8 text, or JSON lines with a field `text`")
    parser.add_argument("--block-size", type=int, help="tokens of a block (default 1024, or what the model has)")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks at a time (default 4)")
    parser.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")
    add_trust(parser)
    parser.set_defaults(run=Later("lowra.commands.evaluate:run"))
