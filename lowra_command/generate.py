"""`lowra generate`: text from a packed model and its adapter."""

import argparse

from .parser import Later, add_trust


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description="Continues a prompt with a packed (or dense) model and, if given, an adapter.",
    )
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add")
    parser.set_defaults(run=Later("lowra.commands.generate:run"))


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options of every command with which a model speaks."""
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--adapter", help="folder of an adapter, of PEFT or packed")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token every time")
    parser.add_argument("--seed", type=int, help="of the sampling (default: 0)")
    parser.add_argument("--force", action="store_true", help="use a packed adapter in spite of its label")
    parser.add_argument("--exact", action="store_true", help="on a processor, do not round activations to integers")
    parser.add_argument("--device", help="cpu, cuda … (default: a GPU if there is one)")
    add_trust(parser)
