"""`lowra demo`: the main job on a model trained on the spot, or on any model given."""

import argparse
import pathlib
import sys
import time

from ..checkpoints.places import usable_folder
from ..corpus import load_tokenizer
from ..demo import train_base, write_texts
from ..generation.loading import load_model
from ..generation.text import continue_text
from ..training.grid import plan_grid, run_grid
from ..training.recipe import Recipe
from .parser import MOST_SEEDS, add_trust, check_range

_METHODS = ("lora16", "qlora", "loftq", "lowra")
_BITS = (4.0, 2.0, 1.5)
_RANK = 8


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict:
    """Trains the base where none is given, runs the comparison, and lets the smallest model speak.

    Raises:
        FileNotFoundError, ValueError: a model or text that cannot be used.
    """
    if (args.train is None) != (args.validation is None):
        raise ValueError("Give --train and --validation together, or neither.")
    check_range(args, "steps", 1)
    check_range(args, "learning_rate", sys.float_info.min)
    check_range(args, "seed", 0, MOST_SEEDS)
    output = usable_folder(args.output)
    start = time.perf_counter()
    texts = write_texts(output / "text")
    model = args.model
    if model is None:
        model = str(output / "base")
        if not (output / "base" / "tokenizer_config.json").exists():
            train_base(texts["base"], output / "base", args.seed)
    recipe = Recipe(
        model=model,
        output=str(output),
        rank=_RANK,
        train_file=args.train or str(texts["train"]),
        validation_file=args.validation or str(texts["validation"]),
        block_size=256,
        batch_size=8,
        accumulation=1,
        eval_batch_size=16,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        max_grad_norm=1.0,
        weight_decay=0.0,
        gradient_checkpointing=args.model is not None,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
    )
    result = run_grid(recipe, plan_grid(recipe, list(_METHODS), list(_BITS), [args.seed]), output)
    print()
    print((output / "table.md").read_text(encoding="utf-8"))
    print(f"Perplexity on held-out text before (untuned) and after {args.steps} steps; lower is better.")
    print(f"Table: {result['table']}. Picture: {result['picture']}.")
    smallest = next(path for path in (output / "bases").iterdir() if path.name.startswith("lowra-1.5bit"))
    loaded = load_model(str(smallest), str(smallest / "initial_adapter"), trust_remote_code=args.trust_remote_code)
    sizes = [sum(path.stat().st_size for path in pathlib.Path(at).glob("*.safetensors")) for at in (model, smallest)]
    if sizes[0]:  # a name on the hub has no folder
        print(
            f"The base on disk: {sizes[0] / 1e6:.1f} MB dense, {sizes[1] / 1e6:.1f} MB at 1.5 bits (embeddings dense)."
        )
    tokenizer = load_tokenizer(smallest, args.trust_remote_code)
    words = continue_text(loaded, tokenizer, "The class statement", 24, 0.0, args.seed).text
    print(f"The 1.5-bit base with its initial adapter, before training, continues: {words!r}")
    seconds = round(time.perf_counter() - start, 1)
    print(f"Done in {seconds:.0f} s.")
    return {**result, "seconds": seconds}
