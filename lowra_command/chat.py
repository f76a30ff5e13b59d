"""`lowra chat`: a conversation with a model that has a chat template."""

import argparse

from .generate import add_model
from .parser import Later


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description="Reads a line, prints the model's answer, and keeps both. /new forgets them, /quit or Ctrl-D ends.",
    )
    add_model(parser)
    parser.add_argument("--system", help="what the model is told before the first line")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of an answer, at most")
    parser.set_defaults(run=Later("lowra.commands.chat:run"))
