"""`lowra demo`: the main job on the model that comes with lowra, or on any model given."""

import argparse

from .parser import GOES_ON, Later, add_trust, place


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="compare 16-bit LoRA, QLoRA, LoftQ and lowra down to 1.5 bits in one table and picture",
        description="Fine-tunes one model six times on the same text: 16-bit LoRA, QLoRA at 4 and 2 bits, LoftQ at 2, "
        "lowra at 2 and 1.5. Without --model that is a LLaMA of 6.4 million parameters which comes with lowra, and the "
        "text docstrings of Python's standard library: a minute or two on two processor cores, no download. With "
        "--model, --train and --validation the same comparison runs on any checkpoint and text.",
    )
    parser.add_argument("--output", type=place, default="demo", help="folder of everything the demo writes")
    parser.add_argument("--model", help="checkpoint to use in place of the small one, local or on the hub")
    add_trust(parser)
    parser.add_argument("--train", help="text to fine-tune on, a paragraph a line (default: docstrings)")
    parser.add_argument("--validation", help="text to measure on (default: held-out docstrings)")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps of each run")
    # high, because 30 steps have to suffice and an adapter that starts at zero must not be left behind
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak; about 3e-4 for a real model")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.set_defaults(run=Later("lowra.commands.demo:run"), interrupted=GOES_ON)
