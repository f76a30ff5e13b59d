"""Mutants of packed checkpoints and adapters, loaded one after the other: `make fuzz`.

A small model is packed, adapters are made for it, and each mutant changes one thing in a copy: bytes of a header or a
body, the length of a file, tensors, or a value somewhere in a JSON file. Loading a mutant may end in

    clear     one ValueError or OSError
    harmless  the same logits as the original
    said      other logits, and a warning that tells why (settings in config.json that somebody may have meant)

and in nothing else. Everything else is a fault, listed with what was changed, and ends the run with exit status 1:

    silent    other logits, and no word
    obscure   another exception, or a message of many lines
    hang      no end within the limit
    crash     the process died

Mutant number n is the same in every run with the same seed: `--only n` makes it again and shows what it ends in.

    python scripts/fuzz_checkpoints.py --checkpoints 2000 --adapters 1000
"""

import argparse
import collections
import copy
import dataclasses
import json
import logging
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable

import torch
import transformers
from checkpoint_mutations import mutate
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lowra
from lowra.adapters import load_packed
from lowra.adapters.labels import make_label
from lowra.adapters.loraquant import quantize_rtn
from lowra.adapters.source import read_adapter
from lowra.adapters.storage import write_packed
from lowra.nn.trained_tables import bake_tables, train_tables

SECONDS = 30
MEMORY = 12 << 30
TOKENS = torch.arange(3, 35)[None] % 96
GOOD, BAD = ("clear", "harmless", "said"), ("silent", "obscure", "hang", "crash")


@dataclasses.dataclass
class Subject:
    """Something to mutate: a folder, and how the model in it is loaded."""

    name: str
    folder: pathlib.Path
    load: Callable[[pathlib.Path], torch.nn.Module]
    logits: torch.Tensor | None = None


@dataclasses.dataclass
class Outcome:
    number: int
    subject: str
    kind: str
    change: str
    verdict: str
    message: str


def make_subjects(work: pathlib.Path) -> tuple[list[Subject], list[Subject]]:
    """Packed checkpoints, and adapters on the first of them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(work / "dense")
    checkpoints = []
    for name, options in {
        "calibration-free": {"bits": 1.75},
        "float16 scales, packed embeddings": {"bits": 2, "scales": "float16", "quantize_embeddings": True},
    }.items():
        folder = work / f"packed-{len(checkpoints)}"
        recipe = lowra.LowRAConfig(**options)
        lowra.quantize_checkpoint(str(work / "dense"), folder, recipe, lowra.AdapterRecipe(4), progress=False)
        checkpoints.append(Subject(name, folder, load_base))
    sharded = work / "sharded"
    load_base(checkpoints[0].folder).save_pretrained(sharded, max_shard_size="40KB")
    checkpoints.append(Subject("in shards", sharded, load_base))

    base = load_base(checkpoints[0].folder)
    on_base = _OnBase(base)
    trained = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    _randomise(trained)
    trained.save_pretrained(work / "adapter")
    packed = quantize_rtn(read_adapter(work / "adapter"), 2)
    packed.label = make_label(packed, base=base)
    (work / "packed-adapter").mkdir()
    write_packed(work / "packed-adapter", packed)
    started = PeftModel.from_pretrained(copy.deepcopy(base), checkpoints[0].folder / "initial_adapter")
    _randomise(started)
    train_tables(started, scales=True)
    _randomise(started, "_change")
    bake_tables(started)
    started.save_pretrained(work / "with-tables")
    adapters = [
        Subject("a LoRA", work / "adapter", on_base.load),
        Subject("a LoRA with tables", work / "with-tables", on_base.load),
        Subject("a packed adapter", work / "packed-adapter", on_base.load_packed),
    ]
    for subject in (*checkpoints, *adapters):
        subject.logits = logits_of(subject.load(subject.folder))
    return checkpoints, adapters


def load_base(folder: pathlib.Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


class _OnBase:
    """Loads adapters on copies of one base."""

    def __init__(self, base):
        self.base = base

    def load(self, folder: pathlib.Path):
        return PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()

    def load_packed(self, folder: pathlib.Path):
        return load_packed(copy.deepcopy(self.base), folder).eval()


def _randomise(model, ending: str = "lora_B.default.weight") -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(ending):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


class _Said(logging.Handler):
    """Collects what lowra warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def try_mutant(subject: Subject, number: int, seed: int, work: pathlib.Path, seconds: int = SECONDS) -> Outcome:
    """Makes one mutant and loads it."""
    rng = random.Random(f"{seed} {subject.name} {number}")
    folder = pathlib.Path(tempfile.mkdtemp(dir=work))
    try:
        shutil.rmtree(folder)
        shutil.copytree(subject.folder, folder, ignore=shutil.ignore_patterns("initial_adapter", "lowra_report.json"))
        kind, change = mutate(folder, rng)
        verdict, message = judge(subject, folder, seconds)
        return Outcome(number, subject.name, kind, change, verdict, message)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def judge(subject: Subject, folder: pathlib.Path, seconds: int = SECONDS) -> tuple[str, str]:
    """What loading a folder ends in, and what was said."""
    said = _Said()
    logger = logging.getLogger("lowra")
    logger.addHandler(said)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(seconds)
    try:
        found = logits_of(subject.load(folder))
    except _TooLong:
        return "hang", f"no end within {seconds} s"
    except (ValueError, OSError) as error:
        text = str(error).strip()
        return ("obscure" if text.count("\n") > 2 or not text else "clear"), f"{type(error).__name__}: {text}"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "obscure", f"{type(error).__name__}: {error} ({pathlib.Path(place.filename).name}:{place.lineno})"
    finally:
        signal.alarm(0)
        logger.removeHandler(said)
    same = found.shape == subject.logits.shape and torch.equal(found, subject.logits)
    message = "; ".join(said.messages)
    return ("harmless" if same else "said" if said.messages else "silent"), message


class _TooLong(BaseException):
    """Not an Exception, so that nobody catches it on the way."""


def _too_long(signum, frame):
    raise _TooLong


def _work_off(pipe, subjects: list[Subject], seed: int, work: pathlib.Path) -> None:
    """A worker process: mutants in, outcomes out."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for stream in (1, 2):  # Transformers' progress and warnings
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for index, number in iter(pipe.recv, None):
        pipe.send(try_mutant(subjects[index], number, seed, work))


class Worker:
    """A process that can be lost to a mutant."""

    def __init__(self, subjects: list[Subject], seed: int, work: pathlib.Path):
        self.arguments = (subjects, seed, work)
        self.task: tuple[int, int] | None = None
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("fork")  # the subjects need not be made again
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work_off, args=(other, *self.arguments), daemon=True)
        self.process.start()
        other.close()

    def give(self, task: tuple[int, int]) -> None:
        self.task, self.since = task, time.monotonic()
        self.pipe.send(task)

    def take(self) -> Outcome | None:
        """The outcome of the task, if there is one."""
        index, number = self.task
        try:
            if self.pipe.poll(0.05):
                return self.pipe.recv()
        except EOFError:
            return self._lost(number, index, "crash", f"exit status {self.process.exitcode}")
        if time.monotonic() - self.since > 2 * SECONDS:
            return self._lost(number, index, "hang", f"no end within {2 * SECONDS} s, and deaf to signals")
        return None

    def _lost(self, number: int, index: int, verdict: str, message: str) -> Outcome:
        self.process.kill()
        self.process.join()
        self.start()
        return Outcome(number, self.arguments[0][index].name, "?", f"--only {number}", verdict, message)


def run(subjects: list[Subject], count: int, seed: int, work: pathlib.Path, workers: int) -> list[Outcome]:
    """Loads `count` mutants of the subjects in turn."""
    tasks = collections.deque((number % len(subjects), number) for number in range(count))
    pool = [Worker(subjects, seed, work) for _ in range(workers)]
    outcomes: list[Outcome] = []
    again: set[tuple[int, int]] = set()
    while len(outcomes) < count:
        for worker in pool:
            if worker.task is None and tasks:
                worker.give(tasks.popleft())
            if worker.task is not None and (outcome := worker.take()) is not None:
                task, worker.task = worker.task, None
                if outcome.verdict == "hang" and task not in again:  # or the machine had a bad minute
                    again.add(task)
                    tasks.append(task)
                    continue
                outcomes.append(outcome)
                if len(outcomes) % 100 == 0:
                    print(f"  {len(outcomes)} of {count}", file=sys.stderr)
    for worker in pool:
        worker.pipe.send(None)
        worker.process.join(5)
    return outcomes


def show(what: str, outcomes: list[Outcome]) -> None:
    """A table of verdicts by kind of change, and every fault."""
    verdicts = [v for v in (*GOOD, *BAD) if any(o.verdict == v for o in outcomes)]
    kinds = sorted({outcome.kind for outcome in outcomes})
    width = max(map(len, kinds))
    counts = collections.Counter((outcome.kind, outcome.verdict) for outcome in outcomes)
    print(f"\n{len(outcomes)} mutants of {what}")
    print(f"{'':{width}}  " + "".join(f"{verdict:>10}" for verdict in verdicts))
    for kind in kinds:
        print(f"{kind:{width}}  " + "".join(f"{counts[kind, verdict]:>10}" for verdict in verdicts))
    totals = collections.Counter(outcome.verdict for outcome in outcomes)
    print(f"{'all':{width}}  " + "".join(f"{totals[verdict]:>10}" for verdict in verdicts))
    for outcome in sorted(outcomes, key=lambda o: (o.verdict, o.number)):
        if outcome.verdict in BAD:
            print(f"{outcome.verdict} {outcome.number} ({outcome.subject}): {outcome.change}\n    {outcome.message}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=2000, help="mutants of packed checkpoints")
    parser.add_argument("--adapters", type=int, default=1000, help="mutants of adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", type=int, help="one mutant, in this process, with what it ends in")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for all outcomes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    everything, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        groups = dict(zip(("packed checkpoints", "adapters"), make_subjects(work), strict=True))
        for (what, subjects), count in zip(groups.items(), (args.checkpoints, args.adapters), strict=True):
            if args.only is not None and count:
                print(try_mutant(subjects[args.only % len(subjects)], args.only, args.seed, work))
            elif count:
                outcomes = run(subjects, count, args.seed, work, args.workers)
                show(what, outcomes)
                everything += outcomes
    print(f"\n{time.monotonic() - start:.0f} s")
    if args.output:
        args.output.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in everything], indent=1))
    return int(any(outcome.verdict in BAD for outcome in everything))


if __name__ == "__main__":
    sys.exit(main())
