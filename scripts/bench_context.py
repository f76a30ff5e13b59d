"""The longest sequence that fine-tunes in as much memory as a card has, by bisection.

    python scripts/bench_context.py --out docs/lab/context.json          # Llama-3.1-8B's shape on 8, 12, 16 and 24 GB
    python scripts/bench_context.py --caps 8 --goals --without tiled_mlp # what one of the two options is worth

A step is one of `lowra finetune`: PEFT's adapter on all packed layers, the recipe's Trainer, gradient checkpointing,
with `offload_activations` and `tiled_mlp` unless left out. Weights are random ones, packed at two true bits, embeddings
and head too. PyTorch may take what `lowra plan` counts as a card's: 97 % of its GB, less the driver's context.

Each card has a process of its own. It first fills the optimiser's states with a step of a short sequence, then takes
one of the length that is tried: that is when `seconds` and the peak are taken. First come the goals, in the whole
model; then, card by card, what `lowra plan` says less 3 %, in the whole model too, which is a lower bound of the
longest; at last, as far as --limit goes, the longest is looked for and taken through the whole model. With the blocks'
inputs on the host all blocks need the same, so what may not fit is tried with fewer of them first, while the weights,
adapters, gradients and optimiser states of the others lie in memory as ever: a step at 100,000 tokens takes most of a
minute, and this hardly a tenth. A row says how many blocks it ran. Nothing is begun that would not end before --limit.
"""

import argparse
import dataclasses
import gc
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_cards import collate
from bisection import STRIDE, UNIT, rounded, search
from peft import LoraConfig, get_peft_model
from random_models import SHAPES, make_model, model_config, pack_tables
from transformers import TrainerCallback, set_seed

import lowra
from lowra.commands.memory import named_card, run_of
from lowra.commands.plan import longest
from lowra.inspection.requirements import CONTEXT_BYTES, finetuning
from lowra.inspection.shapes import ModelShape, read_shape
from lowra.training.data import TaskData
from lowra.training.quick_steps import quicken_steps
from lowra.training.recipe import Recipe
from lowra.training.trainer import make_trainer, training_arguments
from lowra_command import ALLOCATOR

GOALS = {8.0: 16_000, 16.0: 60_000, 24.0: 100_000}
_OPTIONS = ("offload_activations", "tiled_mlp")
_BITS = 1.86  # nominal, of a mix that takes two bits with all its tables
_SHORT = 64  # tokens of the step before
_FEW_BLOCKS = 4
_BELOW_PLAN = 0.97
_GROWTH = 1.3  # of a step's seconds with its tokens, from 16,000 to 100,000: attention's part grows with the square
_GIB = 2**30


def recipe_of(args: argparse.Namespace, tokens: int) -> Recipe:
    asked = {name: name not in args.without for name in _OPTIONS}
    asked["offload_activations"] &= args.device == "cuda"
    return Recipe(
        model=args.shape, dataset="random tokens", rank=args.rank, bits=2.0, block_size=tokens, batch_size=1,
        accumulation=1, eval_batch_size=1, max_steps=2, save_steps=None, optimizer=args.optimizer, **asked,
    )  # fmt: skip


def shape_of(name: str) -> ModelShape:
    """As `lowra plan` reads it from a config.json."""
    with tempfile.TemporaryDirectory() as folder:
        config = model_config(name, 2**20)
        config.dtype = "bfloat16"
        config.save_pretrained(folder)
        return read_shape(folder)


def planned(args: argparse.Namespace, shape: ModelShape, card: float) -> tuple[Any, float]:
    """The run that `lowra plan` would be asked for, of any length, and the bytes of the card."""
    there = dataclasses.replace(named_card(f"{card:g}GB"), large_workspace=args.device == "cuda" and _is_large())
    run = run_of(recipe_of(args, 1024), shape, there)
    return dataclasses.replace(run, true_bits=2.0, embeddings=True, head=True), there.size


def _is_large() -> bool:
    return torch.cuda.get_device_capability()[0] >= 9


class Bench:
    """One card's model, and steps of it.

    Args:
        card: its GB.
    """

    def __init__(self, args: argparse.Namespace, card: float):
        self._args, self._on_gpu = args, args.device == "cuda"
        self.cap = named_card(f"{card:g}GB").size - CONTEXT_BYTES
        if self._on_gpu:
            torch.cuda.set_per_process_memory_fraction(self.cap / torch.cuda.mem_get_info()[1])
        set_seed(0)
        model = make_model(args.shape, _BITS, 2**20, args.device)
        pack_tables(model, _BITS, args.device)
        head = model.get_output_embeddings()
        names = [n for n, m in model.named_modules() if isinstance(m, lowra.LowRALinear) and m is not head]
        lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=names, task_type="CAUSAL_LM")
        self._model: Any = get_peft_model(model, lora)
        bare = self._model.get_base_model()
        bare.config.use_cache = False
        bare.gradient_checkpointing_enable({"use_reentrant": False})
        self._scratch = tempfile.TemporaryDirectory()
        recipe = recipe_of(args, UNIT)
        quicken_steps(self._model, recipe, self._arguments(recipe))
        self._tidy()

    def _arguments(self, recipe: Recipe) -> Any:
        arguments = training_arguments(recipe, pathlib.Path(self._scratch.name) / "checkpoints")
        arguments.train_sampling_strategy = "sequential"
        return arguments

    def step(self, tokens: int, blocks: int) -> dict[str, Any]:
        """What a step of so many tokens takes, of the first so many blocks."""
        found: dict[str, Any] = {"tokens": tokens, "blocks": blocks}
        watch = _Watch(self._model, blocks, self._on_gpu)
        started = time.perf_counter()
        try:
            found |= {"fits": True, "loss": self._train(recipe_of(self._args, tokens), watch)} | watch.found
        except torch.OutOfMemoryError as error:
            found |= {"fits": False, "error": str(error).splitlines()[0]}
        watch.end()
        self._tidy()
        return found | {"with_preparation": round(time.perf_counter() - started, 3)}

    def _tidy(self) -> None:
        self._model.zero_grad(set_to_none=True)
        vars(self._model).pop("forward", None)  # of a Trainer that has done its step
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()

    def _train(self, recipe: Recipe, watch: "_Watch") -> float:
        generator = torch.Generator().manual_seed(1)
        lengths, vocabulary = (_SHORT, recipe.block_size), SHAPES[self._args.shape][-1]
        rows = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
        examples = [{"input_ids": ids, "labels": ids} for ids in rows]
        data = TaskData(examples, examples[:1], tokenizer=None, collate=collate)
        trainer = make_trainer(self._model, recipe, data, self._arguments(recipe), progress=False)
        trainer.add_callback(watch)
        trainer.train()
        loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
        if not math.isfinite(loss):
            raise ValueError(f"The loss is {loss}.")
        return loss


class _Watch(TrainerCallback):
    """Takes time and peak of the second step, which it lets go through some blocks only."""

    def __init__(self, model: Any, blocks: int, on_gpu: bool):
        self._config, self._on_gpu, self._blocks = model.get_base_model().config, on_gpu, blocks
        self._all = self._config.num_hidden_layers
        self._trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._gradients: torch.Tensor | None = None
        self.found: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != 1:
            return
        self._config.num_hidden_layers = self._blocks
        if self._on_gpu:
            # of the blocks that have none in this step
            missing = 4 * self._trained * (self._all - self._blocks) // self._all
            self._gradients = torch.empty(missing, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != 2:
            return
        if self._on_gpu:
            torch.cuda.synchronize()
            self.found["peak"] = torch.cuda.max_memory_allocated()
            self.found["reserved"] = torch.cuda.max_memory_reserved()
        self.found["seconds"] = round(time.perf_counter() - self._started, 3)

    def end(self) -> None:
        self._config.num_hidden_layers, self._gradients = self._all, None


class Worker:
    """A `Bench` in another process, and in a new one after a step that did not fit: one that breaks off within backward
    can leave tensors of autograd behind.
    """

    def __init__(self, args: argparse.Namespace, card: float):
        command = [sys.executable, __file__, "--card", str(card), "--shape", args.shape, "--rank", str(args.rank)]
        command += ["--optimizer", args.optimizer, "--device", args.device, "--without", *args.without]
        self._command = command
        self._process: subprocess.Popen | None = self._started()

    def _started(self) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen(self._command, env=ALLOCATOR | os.environ, stdin=pipe, stdout=pipe, text=True)

    def ask(self, tokens: int, blocks: int) -> dict[str, Any]:
        self._process = self._process or self._started()
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([tokens, blocks]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"tokens": '):
                found = json.loads(line)
                break
        else:
            failed = f"its process ended with {self._process.wait()}"
            found = {"tokens": tokens, "blocks": blocks, "fits": False, "error": failed, "with_preparation": 0.0}
        if not found["fits"]:
            self.end()
        return found

    def end(self) -> None:
        if self._process is not None:
            assert self._process.stdin
            self._process.stdin.close()
            self._process.wait()
            self._process = None


def serve(args: argparse.Namespace) -> None:
    """Answers a `Worker`."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    bench = Bench(args, args.card)
    for line in sys.stdin:
        print(json.dumps(bench.step(*json.loads(line))), flush=True)


class Session:
    """What was asked and found, and how much time is left.

    Args:
        workers: by card.
    """

    def __init__(self, args: argparse.Namespace, workers: dict[float, Any]):
        self._args, self._workers, self._began = args, workers, time.perf_counter()
        self._shape = shape_of(args.shape)
        self.blocks = SHAPES[args.shape][2]
        self.rows: list[dict[str, Any]] = []

    def step(self, card: float, tokens: int, blocks: int, kind: str) -> dict | None:
        """Takes a step, and tells of it; None where it, or after a trial that of all blocks, would last too long."""
        seconds = self._expected(tokens, blocks)
        if blocks < self.blocks:
            seconds += self._expected(tokens, self.blocks)
        if time.perf_counter() - self._began + seconds > self._args.limit:
            print(f"{card:g} GB: {tokens:,} tokens, {kind}: left out, no time for it", flush=True)
            return None
        run, size = planned(self._args, self._shape, card)
        need = finetuning(self._shape, dataclasses.replace(run, length=tokens))
        row = {"card": card, "kind": kind, "cap": size - CONTEXT_BYTES, "planned": need.allocated, "host": need.host}
        row |= self._workers[card].ask(tokens, blocks)
        self.rows.append(row)
        print(_line(row), flush=True)
        if self._args.out:
            self._args.out.write_text(json.dumps(self._record(), indent=1) + "\n")
        return row

    def _expected(self, tokens: int, blocks: int) -> float:
        """Seconds, from the longest step so far, of as many blocks if there is one."""
        timed = [row for row in self.rows if "seconds" in row]
        if not timed:
            return 0.0
        row = max(timed, key=lambda row: (row["blocks"] == blocks, row["tokens"]))
        times = tokens / row["tokens"]
        step = row["seconds"] * times ** (_GROWTH if times > 1 else 1) * max(1.0, blocks / row["blocks"])
        return step + row["with_preparation"] - row["seconds"]

    def lower_bound(self, card: float, few: int) -> None:
        """What is planned less 3 %, or what is left of it until it fits, through the whole model."""
        run, size = planned(self._args, self._shape, card)
        tokens = rounded(_BELOW_PLAN * longest(self._shape, run, size))
        if tokens <= self._known(card):
            return
        for _ in range(self._args.trials):
            row = self.step(card, tokens, few, "trial")
            if row is None:
                return
            if row["fits"]:
                self._through_all(card, tokens)
                return
            tokens = rounded(tokens * (1 - STRIDE))

    def longest(self, card: float, few: int) -> None:
        """Looks for longer ones, and takes the longest through the whole model."""
        known = self._known(card)
        if not known:
            return
        fails = min((row["tokens"] for row in self.rows if row["card"] == card and not row["fits"]), default=0)
        guess = (known + fails) // 2 if fails else max(known + UNIT, round(known * (1 + STRIDE)))
        found = search(lambda tokens: self.step(card, tokens, few, "trial"), guess, self._args.trials, known, fails)
        best = max((row["tokens"] for row in found if row["fits"]), default=0)
        if best > known:
            self._through_all(card, best)

    def _known(self, card: float) -> int:
        """The longest so far that fits."""
        return max((row["tokens"] for row in self.rows if row["card"] == card and row["fits"]), default=0)

    def _through_all(self, card: float, tokens: int) -> None:
        """A length that fits with few blocks, or a little less, in the whole model."""
        for share in (1.0, 0.98):
            if rounded(tokens * share) > 0:
                row = self.step(card, rounded(tokens * share), self.blocks, "whole")
                if row is None or row["fits"]:
                    return

    def _record(self) -> dict[str, Any]:
        known = {"torch": torch.__version__, "shape": self._args.shape, "rank": self._args.rank}
        known["device"] = torch.cuda.get_device_name() if self._args.device == "cuda" else "cpu"
        return known | {"optimizer": self._args.optimizer, "without": self._args.without, "rows": self.rows}


def _line(row: dict) -> str:
    text = f"{row['card']:g} GB: {row['tokens']:>7,} tokens, {row['blocks']:>2} blocks, {row['kind']:<7}"
    text += f"  planned {row['planned'] / _GIB:.2f} GiB"
    if not row["fits"]:
        return f"{text}  DOES NOT FIT ({row['with_preparation']:.1f} s): {row['error']}"
    if "peak" in row:
        text += f"  peak {row['peak'] / _GIB:.2f} ({row['peak'] / row['planned'] - 1:+.1%})"
        text += f"  reserved {row['reserved'] / _GIB:.2f} of {row['cap'] / _GIB:.2f}"
    return f"{text}  {row['seconds']:.2f} s ({row['with_preparation']:.1f} with all)  loss {row['loss']:.3f}"


def bench(args: argparse.Namespace, make_worker: Callable[[argparse.Namespace, float], Any] = Worker) -> list[dict]:
    """All cards: goals, lower bounds, and the longest, as far as time goes."""
    workers = {card: make_worker(args, card) for card in args.caps}
    session = Session(args, workers)
    try:
        for card, tokens in args.goals.items():
            if card in workers:
                session.step(card, tokens, session.blocks, "goal")
        few = session.blocks if "offload_activations" in args.without else min(_FEW_BLOCKS, session.blocks)
        for card in args.caps:
            session.lower_bound(card, few)
        for card in args.caps:
            session.longest(card, few)
    finally:
        for worker in workers.values():
            worker.end()
    return session.rows


def _goal(text: str) -> tuple[float, int]:
    card, tokens = text.split(":")
    return float(card), int(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", type=float, nargs="+", default=[8.0, 12.0, 16.0, 24.0], help="GB of the cards")
    parser.add_argument("--goals", type=_goal, nargs="*", default=[*GOALS.items()], help="CARD:TOKENS")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--optimizer", default="adamw_8bit")
    parser.add_argument("--without", nargs="*", default=[], choices=_OPTIONS)
    parser.add_argument("--trials", type=int, default=4, help="steps of a bound, and of a search")
    parser.add_argument("--limit", type=float, default=225, help="seconds in all")
    parser.add_argument("--device", default="cuda", help="cpu: nothing is measured but that it runs")
    parser.add_argument("--card", type=float, help=argparse.SUPPRESS)  # one, in this process
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.card is not None:
        serve(args)
        return
    args.goals = dict(args.goals)
    bench(args)


if __name__ == "__main__":
    main()
