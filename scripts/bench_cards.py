"""README's table by card: each row's fine-tuning in as much memory as that card has, beside what `lowra plan` says.

    python scripts/bench_cards.py --out docs/lab/cards.json        # all rows
    python scripts/bench_cards.py --rows 8:13b:2:3000 24:70b:1.5:1000
    python scripts/bench_cards.py --rows 8:7b:2:2048 --alone       # and what the driver's context takes

A row is CARD:MODEL:BITS:TOKENS, with the GB of the card. Its run is what `lowra finetune` does with a packed base:
PEFT's adapter on all packed layers, gradient checkpointing, the recipe's Trainer with accumulation, layers as CUDA
graphs where it would choose them, an evaluation before and after. Only the weights are random, packed ones of a fixed
mix of precisions, made in the memory of the GPU. PyTorch may take what `lowra plan` counts as the card's: 97 % of its
GB, less the driver's context. A row that does not fit so is run again without graphs. Rows that fit this GPU together
run at once, each in its own process: peaks do not depend on it, times do and are not told.
"""

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from random_models import MIXES, SHAPES, make_model, model_config
from transformers import set_seed

import lowra
from lowra.commands.memory import named_card, run_of
from lowra.inspection.requirements import CONTEXT_BYTES, finetuning
from lowra.inspection.shapes import read_shape
from lowra.training.data import TaskData
from lowra.training.finetune import measure
from lowra.training.quick_steps import quicken_steps
from lowra.training.recipe import Recipe
from lowra.training.trainer import make_trainer, training_arguments
from lowra_command import ALLOCATOR

README_ROWS = (
    "8:8b:2:5000", "8:13b:2:3000", "12:8b:3:12000", "12:33b:1.5:1500", "16:13b:4:4096",
    "16:33b:2:2048", "24:33b:4:2048", "24:70b:1.5:1000", "48:70b:2:8192", "48:70b:4:2500",
)  # fmt: skip
_RANK = 16
_PASSES = 2  # of a step: from two on, gradients stay from one to the next
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """GB of a card, a shape of `random_models`, nominal bits, and tokens of the one sequence of a forward pass."""

    card: float
    shape: str
    bits: float
    tokens: int

    @staticmethod
    def parse(text: str) -> "Row":
        card, shape, bits, tokens = text.split(":")
        row = Row(float(card), shape, float(bits), int(tokens))
        if row.shape not in SHAPES or row.bits not in MIXES:
            raise ValueError(f"{text}: shapes are {', '.join(SHAPES)}, bits {', '.join(map(str, MIXES))}.")
        return row

    def __str__(self) -> str:
        return f"{self.card:g}:{self.shape}:{self.bits:g}:{self.tokens}"


def measured(row: Row, steps: int, device: str, graphs: bool | None) -> dict[str, Any]:
    """Runs a row in a process of its own: what was planned and what came, in bytes."""
    said = _Said()
    logging.getLogger("lowra").addHandler(said)
    recipe = Recipe(
        model=row.shape, dataset="random tokens", rank=_RANK, bits=row.bits, block_size=row.tokens, batch_size=1,
        accumulation=_PASSES, eval_batch_size=1, max_steps=steps, save_steps=None, layer_graphs=graphs,
    )  # fmt: skip
    card = named_card(f"{row.card:g}GB")
    cap = card.size - CONTEXT_BYTES
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info()[1])
        card = dataclasses.replace(card, large_workspace=torch.cuda.get_device_capability()[0] >= 9)
    needed = planned(row, recipe, card)
    found = {"row": str(row), "graphs": graphs, "card_bytes": card.size, "cap_bytes": cap}
    found |= {"planned_on_card": needed.on_card, "planned": needed.allocated, "moment": needed.moment}
    started = time.perf_counter()
    try:
        found |= {"fits": True, "loss": fine_tune(row, recipe, device)}
    except torch.OutOfMemoryError as error:
        found |= {"fits": False, "error": str(error).splitlines()[0]}
    found["said"] = said.lines
    found["seconds"] = round(time.perf_counter() - started, 1)
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.max_memory_reserved()
        found |= {"peak": torch.cuda.max_memory_allocated(), "reserved": reserved, "torch": torch.__version__}
        found |= {"gpu": torch.cuda.get_device_name(), "used_on_device": total - free}
        found["reserved_now"] = torch.cuda.memory_reserved()
    return found


def planned(row: Row, recipe: Recipe, card: Any) -> Any:
    """What `lowra finetune` announces for a base of this shape, from its config.json."""
    with tempfile.TemporaryDirectory() as folder:
        config = model_config(row.shape, max(4096, row.tokens))
        config.dtype = "bfloat16"
        config.save_pretrained(folder)
        shape = read_shape(folder)
    return finetuning(shape, run_of(recipe, shape, card))


def fine_tune(row: Row, recipe: Recipe, device: str) -> list[float]:
    """The losses of the steps, and of the evaluations before and after."""
    set_seed(recipe.seed)
    model = make_model(row.shape, row.bits, max(4096, row.tokens), device)
    names = [name for name, module in model.named_modules() if isinstance(module, lowra.LowRALinear)]
    model = get_peft_model(model, LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=names, task_type="CAUSAL_LM"))
    bare: Any = model.get_base_model()
    bare.config.use_cache = False
    bare.gradient_checkpointing_enable({"use_reentrant": False})
    count = recipe.max_steps * recipe.accumulation
    tokens = torch.randint(0, bare.config.vocab_size, (count + 1, row.tokens)).tolist()
    examples = [{"input_ids": ids, "labels": ids} for ids in tokens]
    data = TaskData(examples[:count], examples[count:], tokenizer=None, collate=collate)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(recipe, pathlib.Path(folder) / "checkpoints")
        untuned = measure(model, recipe, data, progress=False)
        quicken_steps(model, recipe, arguments)
        trainer = make_trainer(model, recipe, data, arguments, progress=False)
        trainer.train()
        tuned = measure(model, recipe, data, progress=False)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [untuned["loss"], *losses, tuned["loss"]]


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    batch = {name: torch.tensor([example[name] for example in examples]) for name in ("input_ids", "labels")}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


class _Said(logging.Handler):
    """The warnings that a user would see."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_rows(rows: list[Row], args: argparse.Namespace) -> list[dict]:
    """All rows, the largest cards first, as many at once as `together` GB hold."""
    waiting: list[tuple[Row, str]] = [(row, "chosen") for row in sorted(rows, key=lambda row: -row.card)]
    running: list[tuple[subprocess.Popen, Row, str, pathlib.Path]] = []
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            room = args.together - sum(row.card for _, row, *_ in running)
            started = next((one for one in waiting if one[0].card <= room and not (args.alone and running)), None)
            if started is not None or not running:
                row, graphs = started or waiting[0]
                waiting.remove((row, graphs))
                out = pathlib.Path(scratch) / f"{row}-{graphs}.json"
                command = [sys.executable, __file__, "--row", str(row), "--graphs", graphs, "--out", str(out)]
                command += ["--steps", str(args.steps), "--device", args.device]
                running.append((subprocess.Popen(command, env=ALLOCATOR | os.environ), row, graphs, out))
                continue
            time.sleep(0.2)
            for one in [one for one in running if one[0].poll() is not None]:
                running.remove(one)
                process, row, graphs, out = one
                failed = {"row": str(row), "fits": False, "error": f"its process ended with {process.returncode}"}
                result = json.loads(out.read_text()) if out.exists() else failed
                results.append(result)
                print(_line(result), flush=True)
                if not result["fits"] and graphs == "chosen" and args.device == "cuda":
                    waiting.append((row, "none"))
                if args.out:
                    args.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _line(result: dict) -> str:
    if "planned" not in result:
        return f"{result['row']}: {result['error']}"
    text = f"{result['row']:<16} graphs {'left out' if result['graphs'] is False else 'as chosen'}"
    text += f"  planned {result['planned'] / _GIB:.2f} GiB"
    if "peak" in result:
        text += f"  peak {result['peak'] / _GIB:.2f} ({result['peak'] / result['planned'] - 1:+.1%})"
        text += f"  reserved {result['reserved'] / _GIB:.2f} of {result['cap_bytes'] / _GIB:.2f}"
        text += f"  beside it {(result['used_on_device'] - result['reserved_now']) / _GIB:.2f}"
    text += "  fits" if result["fits"] else f"  DOES NOT FIT: {result['error']}"
    return "\n    ".join([f"{text}  {result['seconds']} s", *result["said"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows",
        nargs="+",
        type=Row.parse,
        default=[*map(Row.parse, README_ROWS)],
        help="CARD:MODEL:BITS:TOKENS (default: README's)",
    )
    parser.add_argument("--steps", type=int, default=2, help=f"of the optimiser, {_PASSES} passes each")
    parser.add_argument("--together", type=float, default=72, help="GB of cards that run at once on this GPU")
    parser.add_argument("--alone", action="store_true", help="one after the other")
    parser.add_argument("--device", default="cuda", help="cpu: nothing is measured but that it runs")
    parser.add_argument("--row", type=Row.parse, help=argparse.SUPPRESS)  # one, in this process
    parser.add_argument("--graphs", choices=("chosen", "none"), default="chosen", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.row is not None:
        result = measured(args.row, args.steps, args.device, None if args.graphs == "chosen" else False)
        args.out.write_text(json.dumps(result))
        return
    run_rows(args.rows, args)


if __name__ == "__main__":
    main()
