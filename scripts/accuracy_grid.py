"""Perplexity of many quantisation variants of one model, untuned and after a short fine-tuning, in one table.

    python scripts/accuracy_grid.py MODEL TEXT_FOLDER --variants list.json --workers 12 --output results.json

Every variant is a dictionary of the keys of `Variant`; variants run in parallel processes on one GPU. Weights are
quantised by the library's own functions; layers and trained tables are the library's too. Fine-tuning:
accuracy_tuning.py.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import queue
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import accuracy_own_text  # noqa: E402
import torch  # noqa: E402
from accuracy_blocks import divergence  # noqa: E402
from accuracy_tuning import Adapted, base_layer, fine_tune  # noqa: E402
from accuracy_variants import (  # noqa: E402
    DEFAULTS,
    Variant,
    as_packed,
    load_fitted,
    plain_start,
    quantise,
    reconstructed,
    save_fitted,
    true_bits,
)
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from lowra.checkpoints.targets import find_targets, replace_module  # noqa: E402
from lowra.corpus import read_text  # noqa: E402
from lowra.quantization.calibration import SEQUENCE, collect  # noqa: E402
from lowra.quantization.joint_training import JointTraining  # noqa: E402
from lowra.quantization.token_tables import token_tables  # noqa: E402
from lowra.quantization.trained_weight import TrainedWeight  # noqa: E402

TRAINING = ("train", "table_rate", "lr", "train_steps", "tuning_seed")
QUANTISED = (*TRAINING, "end_to_end")
FITTED = (*QUANTISED, "blocks", "reconstruct", "reconstruct_blocks", "reconstruct_on", "rates")
HELD_OUT = 16  # of the sequences that the model writes, for the divergence from it
MOST_THREADS = 4  # of a process: its matrices are small, and more threads wait for each other
WRITTEN = 2048  # sequences of one file of them; the first file is shorter, because all wait for it


class Session:
    """Model, text and calibration, loaded once per process."""

    def __init__(self, model, text, device, calibration_tokens, eval_blocks, own_text, shared):
        self.device = torch.device(device)
        self.folder = model
        self._tokenizer, self._given, self._eval_blocks = AutoTokenizer.from_pretrained(model), {}, eval_blocks
        self.read(text)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(self.device)
        self.model.config.use_cache = False
        self.targets = find_targets(self.model, None)
        self.modules = {name: self.model.get_submodule(t.name) for name, t in self.targets.items()}
        self.weights = {name: module.weight.detach().cpu().clone() for name, module in self.modules.items()}
        tables = token_tables(self.model)
        self._token_tables = {name: self.model.get_parameter(name).detach().clone() for name in tables}
        self._own_text, texts = own_text
        self._written, self._own = texts.get(str(model), 0), []
        self._count = max(1, calibration_tokens // SEQUENCE)
        self._calibrations = {}
        self._shared = shared
        self._trained = None, None  # blocks of the last variant, which the next may train on
        self._ended = None, None  # the same after their end-to-end training

    def read(self, text: pathlib.Path) -> None:
        """Takes the text of a folder for what is given."""
        if text not in self._given:
            train, valid = (self._blocks(text, part) for part in ("train", "validation"))
            self._given[text] = train, valid[: self._eval_blocks]
        self.given, (self.train, self.valid) = text, self._given[text]

    def _blocks(self, folder, part):
        path = folder / f"{part}.txt"
        rows = read_text(path) if path.exists() else [f"{row}\n\n" for row in read_text(folder / f"{part}.jsonl")]
        blocks = []
        for first in range(0, len(rows), 1000):
            ids = self._tokenizer("".join(rows[first : first + 1000])).input_ids
            blocks += [ids[i : i + SEQUENCE] for i in range(0, len(ids) - SEQUENCE + 1, SEQUENCE)]
        return torch.tensor(blocks)

    def text(self, origin: str, count: int) -> torch.Tensor:
        """Token ids [count, T], or all that there are; waits for the process that lets the model write."""
        if origin == "given":
            return self.train[:count]
        given = self.train if origin == "both" else self.train[:0]
        own = self._own_up_to(HELD_OUT + max(0, count - len(given)))[HELD_OUT:]
        return torch.cat([given, own])[:count]

    def _own_up_to(self, count):
        """The first sequences that the model wrote, of which there are so many at least if it writes so many."""
        while sum(map(len, self._own)) < min(count, self._written):
            path = own_path(self._own_text, self.folder, len(self._own))
            while not path.exists():
                time.sleep(0.5)
            self._own.append(load_file(path)["tokens"].long())
        return torch.cat(self._own)

    def calibration(self, origin: str):
        """Statistics over the first sequences of a text, from the dense model."""
        key = origin, None if origin == "own" else self.given
        if key not in self._calibrations:
            for name, target in self.targets.items():
                replace_module(self.model, target.name, self.modules[name])
            self.set_token_tables({})
            sequences = self.text(origin, self._count)
            self._calibrations[key] = collect(self.model, self.modules, sequences, True, False)
        return self._calibrations[key]

    def quantised(self, v: Variant):
        """Packed weights and factors by name, embeddings and head where an end-to-end training changed them, and what
        that reports; each stage is made once for variants in a row that differ in later ones alone.
        """
        fitted = self._fitted(v)
        if not v.reconstruct:
            return fitted, {}, {}
        key = stage_of(v, QUANTISED)
        if self._trained[0] != key:
            self._trained = key, reconstructed(self, v, fitted)
        (trained, found), tables = self._trained[1], {}
        if v.end_to_end:
            key = stage_of(v, TRAINING)
            if self._ended[0] != key:
                self._ended = None, None
                self._ended = key, self._end_to_end(v, trained)
            trained, tables, ends = self._ended[1]
            found = found | ends
        return as_packed(fitted, trained), tables, found

    @torch.no_grad()
    def set_token_tables(self, trained):
        """Puts embeddings and head into the model, and the dense ones where a variant has none of its own."""
        for name, dense in self._token_tables.items():
            self.model.get_parameter(name).copy_(trained.get(name, dense))

    def _end_to_end(self, v, trained):
        """What was trained after the blocks, on all of them together; embeddings and head; and what that reports."""
        options = dict(v.end_to_end)
        trained = {  # as the library begins: from what was packed
            name: TrainedWeight(self.weights[name].to(self.device), weight.packed(), weight.factors(), weight.scaling)
            for name, weight in trained.items()
        }
        sequences = self.text(options.pop("on"), options.pop("blocks"))
        seconds = options.pop("seconds", math.inf)
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).to(self.device)
        learning = self._token_tables if options.pop("token_tables", True) else ()
        stored_as = dict.fromkeys(learning, AutoConfig.from_pretrained(self.folder).dtype)
        training = JointTraining(
            model, self.targets, trained, sequences, seed=v.seed, token_tables=stored_as, **options
        )
        found = {"kl_before": training.divergence(self.held_out())}
        losses, begun = [], time.perf_counter()
        for some in (8, 80, 240, 640):  # fewer steps where the GPU is shared, or nothing recorded
            clock, last = time.perf_counter(), training.done
            losses.append(training.run(min(some, training.steps)))
            losses[-1].sum().item()  # waits for the device
            now = time.perf_counter()
            each = (now - clock) / max(1, training.done - last)
            left = (begun + seconds - now) / max(each, 1e-6) if some > 8 else math.inf
            training.steps = int(max(training.done, min(training.steps, training.done + left)))
        losses.append(training.run(training.steps))
        losses, few = torch.cat(losses), max(1, training.steps // 16)
        found["kl"] = [float(part.mean()) for part in losses.split(few)]
        found["kl_steps"], found["kl_step_s"] = training.steps, (time.perf_counter() - begun) / training.steps
        found["kl_recorded"], found["kl_after"] = training.recorded, training.divergence(self.held_out())
        training.finish()
        print(json.dumps({"bits": v.bits, **v.end_to_end, **found}), file=sys.stderr, flush=True)
        return trained, training.token_tables.stored(), found

    def _fitted(self, v: Variant):
        """What `quantise` returns, made by the first process that needs it and read by the others."""
        key = hashlib.sha256(json.dumps(stage_of(v, FITTED)).encode()).hexdigest()[:16]
        path = self._shared / f"{key}.safetensors"
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                fitted = quantise(self, v)
                save_fitted(fitted, path)
        return load_fitted(path)

    def held_out(self):
        """Token ids [count, T] that the model wrote and nothing is trained on."""
        return self._own_up_to(HELD_OUT)[:HELD_OUT]

    def own_divergence(self):
        """KL divergence from the dense model on text that it wrote, of the model as it is; None without such text."""
        if not self._written:
            return None
        self.model.eval()
        total = 0.0
        dense = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            for part in self.held_out().split(4):
                part = part.to(self.device)
                wanted = dense(input_ids=part, use_cache=False).logits
                total += float(divergence(wanted, self.model(input_ids=part).logits)) * len(part)
        return total / HELD_OUT

    def perplexity(self):
        self.model.eval()
        total = 0.0
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            for part in self.valid.split(16):
                part = part.to(self.device)
                total += float(self.model(input_ids=part, labels=part).loss) * len(part)
        return math.exp(total / len(self.valid))


def stage_of(v: Variant, later: tuple) -> dict:
    """The switches of a stage: all but those of later ones, and the text that is given only where it takes part."""
    stage = {key: value for key, value in dataclasses.asdict(v).items() if key not in later}
    origins = {v.calibrate_on, v.reconstruct_on if v.reconstruct else "own", v.end_to_end.get("on", "own")}
    if origins == {"own"}:
        del stage["text"]
    return stage


def run(session: Session, v: Variant) -> dict:
    start = time.perf_counter()
    torch.manual_seed(v.seed + v.tuning_seed)
    device, model = session.device, session.model
    bits, output_error, tables, ends = 16.0, 0.0, {}, {}
    if v.bits < 16:
        fitted, tables, ends = session.quantised(v)
        bits = true_bits(session, v, fitted)
    for name, target in session.targets.items():
        weight = session.weights[name]
        if v.bits < 16:
            stored, a, b = fitted[name]
            if v.tuning_seed and not b.any():  # a start from nothing may start anywhere
                a, _ = plain_start(weight, v.rank)
            dense = stored if isinstance(stored, torch.Tensor) else stored.dequantize()
            left, moment = weight - dense - b @ a, session.calibration(v.calibrate_on).moment(name)
            output_error += float(((left @ moment) * left).sum() / ((weight @ moment) * weight).sum())
        else:
            stored, (a, b) = weight, plain_start(weight, v.rank)
        replace_module(model, target.name, Adapted(base_layer(stored), a, b).to(device))
    session.set_token_tables(tables)
    prepared = time.perf_counter() - start
    untuned, own_kl = session.perplexity(), session.own_divergence()
    trained = fine_tune(session, v) if v.train_steps else {}
    return {
        **dataclasses.asdict(v),
        "text": session.given.name,
        "true_bits": bits,
        "output_error": output_error / len(session.targets),
        "untuned": untuned,
        "own_kl": own_kl,
        **ends,
        **trained,
        "prepared_s": prepared,
        "seconds": time.perf_counter() - start,
    }


def _work(jobs, results, threads, deadline, arguments):
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    model, *others = arguments
    sessions, text = {}, others[0]
    while True:
        for job in jobs.get():
            if time.time() > deadline:
                continue
            try:
                variant = Variant(**job)
                folder = variant.model or model
                if folder not in sessions:
                    sessions[folder] = Session(folder, *others)
                sessions[folder].read(pathlib.Path(variant.text) if variant.text else text)
                results.put(run(sessions[folder], variant))
            except Exception as error:  # one bad variant must not cost the table
                results.put({**job, "failed": f"{type(error).__name__}: {error}"})
        results.put(None)  # ready for the next variants


def _next(results, workers):
    """The next row, or None when a worker has none left to make.

    Raises:
        RuntimeError: a worker has died, so that its row will never come.
    """
    while True:
        try:
            return results.get(timeout=5)
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                raise RuntimeError("A worker died; its traceback is above.") from None


def writers_of(variants, model):
    """Folders of the models of which some variant takes text of their own; `model` where it names none."""
    uses = {
        variant.get("model") or model: None
        for variant in variants
        for key in ("calibrate_on", "reconstruct_on", "end_to_end")
        if (variant[key].get("on") if isinstance(variant.get(key), dict) else variant.get(key)) in ("own", "both")
    }
    return list(uses)


def own_path(folder, model, number):
    """A file of the text that a model writes."""
    return folder / f"{pathlib.Path(model).name}-{number:02d}.safetensors"


def write(folder, counts, own_text, device):
    accuracy_own_text.write(folder, counts, SEQUENCE, lambda number: own_path(own_text, folder, number), device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path, help="folder with train and validation, .txt or .jsonl")
    parser.add_argument("--variants", type=pathlib.Path, required=True, help="JSON list of variants, most wanted first")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no variant after this long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calibration-tokens", type=int, default=25_000)
    parser.add_argument("--eval-blocks", type=int, default=10_000)
    parser.add_argument(
        "--write-text",
        type=int,
        default=0,
        help="sequences for each model to write, if a variant of it takes text of its own",
    )
    parser.add_argument("--own-text", type=pathlib.Path, help="folder for them")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # at exit the workers are ended too
    start = time.perf_counter()
    variants = json.loads(args.variants.read_text())
    groups = {}  # a process trains blocks once for variants that differ in what comes after them
    for variant in variants:
        groups.setdefault(json.dumps(stage_of(Variant(**variant), QUANTISED)), []).append(variant)
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    folder = tempfile.TemporaryDirectory()
    shared = pathlib.Path(folder.name)
    own_text = args.own_text or shared / "own"
    counts = [min(WRITTEN // 2, args.write_text), *[WRITTEN] * (max(0, args.write_text - WRITTEN // 2) // WRITTEN)]
    texts = {name: sum(counts) for name in writers_of(variants, str(args.model))} if args.write_text else {}
    own = own_text, texts
    arguments = (args.model, args.text, args.device, args.calibration_tokens, args.eval_blocks, own, shared)
    threads = min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // args.workers))
    workers = [
        context.Process(target=_work, args=(jobs, results, threads, time.time() + args.seconds, arguments), daemon=True)
        for _ in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    rows, waiting = [], list(groups.values())
    for group in waiting[: args.workers]:
        jobs.put(group)
    running = min(args.workers, len(waiting))
    del waiting[: args.workers]
    if texts:
        own_text.mkdir(parents=True, exist_ok=True)
        for model in texts:
            if not own_path(own_text, model, len(counts) - 1).exists():
                arguments = (model, counts, own_text, args.device)
                workers.append(context.Process(target=write, args=arguments, daemon=True))
                workers[-1].start()
    while running:
        row = _next(results, workers)
        if row is None:
            running -= 1
            if waiting and time.perf_counter() - start < args.seconds:
                jobs.put(waiting.pop(0))
                running += 1
            continue
        rows.append(row)
        changed = {k: x for k, x in row.items() if k not in DEFAULTS or x != DEFAULTS[k]}
        print(json.dumps({k: round(x, 4) if isinstance(x, float) else x for k, x in changed.items()}), flush=True)
        if args.output:
            args.output.write_text(json.dumps(rows, indent=1))
    print(f"{len(rows)} of {len(variants)} variants in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
