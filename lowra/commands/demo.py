"""`lowra demo`: the main job on the model that comes with lowra, or on any model given."""

import argparse
import pathlib
import sys
import time

from ..checkpoints.atomic import save_text
from ..checkpoints.configs import packing_described
from ..checkpoints.dense import safetensors_files
from ..checkpoints.hub import local_folder
from ..checkpoints.places import expanded, usable_folder
from ..corpus import load_tokenizer
from ..demo import BASE, comparison_table, demo_cells, order_problems, write_texts
from ..generation.loading import load_model
from ..generation.text import continue_text
from ..optional import require
from ..training.grid import adapter_folder, run_grid
from ..training.recipe import Recipe
from .ranges import MOST_SEEDS, check_range, refuse_idle

_RANK = 8
_PROMPT, _WORDS = "This function returns", 32  # and the tokens that the tuned model adds
_TEMPERATURE = 0.6  # at 0 so small a model repeats itself


def run(args: argparse.Namespace) -> dict:
    """Runs the comparison, shows its table, and lets the smallest tuned model speak.

    Raises:
        FileNotFoundError, ValueError: a model or text that cannot be used.
        SystemExit: with status 1, the methods did not end in the order they should, on the demo's own model and text.
    """
    require("lowra demo", "matplotlib")
    if (args.train is None) != (args.validation is None):
        raise ValueError("Give --train and --validation together, or neither.")
    refuse_idle(args, [(args.model is None, "trust_remote_code", "without --model")])
    check_range(args, "steps", 1)
    check_range(args, "learning_rate", sys.float_info.min)
    check_range(args, "seed", 0, MOST_SEEDS)
    folder = None if args.model is None else local_folder(args.model)
    if folder is not None and packing_described(folder) is not None:
        raise ValueError(f"{args.model} is packed already, and the demo packs: give a checkpoint in 16 or 32 bits.")
    output = usable_folder(args.output)
    start = time.perf_counter()
    recipe = _recipe(args, output)
    cells = demo_cells(recipe)
    _introduce(args, recipe, len(cells))
    result = run_grid(recipe, cells, output, keep_adapters=True)
    bases = [output / "bases" / cell.base_key for cell in cells[1:]]  # of all but the first, whose base stays dense
    sizes = [_bytes(base) for base in (expanded(recipe.model), *bases)]
    table = comparison_table(result["rows"], sizes)
    save_text(table, output / "table.md")
    print(f"\n{table}\nPerplexity on held-out text, before and after {args.steps} steps: lower is better.")
    print("True bits count all that a packed weight takes; the base on disk has its embeddings in 16 bits besides.")
    speaks = result["rows"][-1]["tuned"]["perplexity"]["mean"] is not None
    said = _last_words(bases[-1], adapter_folder(cells[-1], output), args) if speaks else None
    problems = order_problems(result["rows"])
    seconds = round(time.perf_counter() - start, 1)
    _conclude(args, output, problems, seconds)
    if problems and args.model is None and args.train is None:
        raise SystemExit(1)
    return {**result, "bytes": sizes, "text": said, "problems": problems, "seconds": seconds}


def _recipe(args: argparse.Namespace, output: pathlib.Path) -> Recipe:
    texts = {"train": args.train, "validation": args.validation}
    if args.train is None:
        texts = {name: str(path) for name, path in write_texts(output / "text").items()}
    own = args.model is None
    return Recipe(
        model=str(BASE) if own else args.model,
        output=str(output),
        rank=_RANK,
        train_file=texts["train"],
        validation_file=texts["validation"],
        block_size=128,
        max_eval_samples=32,
        batch_size=4,
        accumulation=1,
        eval_batch_size=8,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        max_grad_norm=1.0,
        weight_decay=0.0,
        gradient_checkpointing=not own,
        bf16=not own,  # few processors have instructions for it
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
    )


def _introduce(args: argparse.Namespace, recipe: Recipe, runs: int) -> None:
    if args.model is None:
        print("Model: base-6m, a LLaMA of 6.4 million parameters that comes with lowra, trained on books and articles.")
    else:
        print(f"Model: {args.model}.")
    if args.train is None:
        print("Text: docstrings of Python's standard library, which it has never seen.")
    print(f"{runs} fine-tunings of {recipe.max_steps} steps each, the same but for the base's bits and the method:")


def _bytes(folder: pathlib.Path) -> int | None:
    """Of a base's weights on disk; None for a name on the hub."""
    return sum(path.stat().st_size for path in safetensors_files(folder)) if folder.is_dir() else None


def _last_words(base: pathlib.Path, adapter: pathlib.Path, args: argparse.Namespace) -> str:
    """What the smallest tuned model makes of a prompt."""
    model = load_model(str(base), str(adapter), trust_remote_code=args.trust_remote_code)
    tokenizer = load_tokenizer(base, args.trust_remote_code)
    text = continue_text(model, tokenizer, _PROMPT, _WORDS, _TEMPERATURE, args.seed).text
    print(f"\nThe tuned 1.5-bit model, far too small to make sense, continues {_PROMPT!r}:")
    print(f"\n  {' '.join(text.split())} ...\n")
    print(f'Try it: lowra generate {base} --adapter {adapter} --temperature {_TEMPERATURE} --prompt "..."')
    return text


def _conclude(args: argparse.Namespace, output: pathlib.Path, problems: list[str], seconds: float) -> None:
    print(f"Table: {output / 'table.md'}. Picture: {output / 'comparison.png'}. Done in {seconds:.0f} s.")
    if not problems:
        print("lowra at 2 bits and at 1.5 bits ended below LoftQ at 2. Next, a model of yours: lowra plan MODEL")
    elif args.model is None and args.train is None:
        print("\nSOMETHING IS WRONG: " + " ".join(problems), file=sys.stderr)
        print("Both must end below. Please report it, with the table and what computer this is.", file=sys.stderr)
    else:
        print(f"Not below LoftQ this time: {' '.join(problems)} Other --steps or --learning-rate may show more.")
