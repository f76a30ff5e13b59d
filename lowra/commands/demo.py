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
from .ranges import MOST_SEEDS, check_range

_METHODS = ("lora16", "qlora", "loftq", "lowra")
_BITS = (4.0, 2.0, 1.5)
_RANK = 8


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
