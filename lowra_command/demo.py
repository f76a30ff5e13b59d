"""`lowra demo`: the main job on a model trained on the spot, or on any model given."""

import argparse
import pathlib

from .parser import Later, add_trust


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="compare 16-bit, QLoRA, LoftQ and LowRA at 4, 2 and 1.5 bits in one table and picture",
        description="Without --model: trains a small LLaMA (4 million parameters) on Python's language reference, then "
        "fine-tunes it on docstrings of the standard library with every method. Both texts ship with Python. The model "
        "is far too small to be useful, and at 2 bits and above too young to tell the methods apart: it shows that "
        "everything works. With --model and --train/--validation the same comparison runs on any checkpoint.",
    )
    parser.add_argument("--output", type=pathlib.Path, default="demo", help="folder of everything the demo writes")
    parser.add_argument("--model", help="checkpoint to use in place of the small one, local or on the hub")
    add_trust(parser)
    parser.add_argument("--train", help="text to fine-tune on, a paragraph a line (default: docstrings)")
    parser.add_argument("--validation", help="text to measure on (default: held-out docstrings)")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of each run")
    # high, because 40 steps have to suffice and an adapter that starts at zero must not be left behind
    parser.add_argument("--learning-rate", type=float, default=1.5e-2, help="peak; about 3e-4 for a real model")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.set_defaults(run=Later("lowra.commands.demo:run"))
