"""Perplexity of many quantisation variants of one model, untuned and after a short fine-tuning, in one table.

    python scripts/accuracy_grid.py MODEL TEXT_FOLDER --variants list.json --workers 12 --output results.json

Every variant is a dictionary of the keys of `Variant`; variants run in parallel processes on one GPU. Weights are
quantised by the library's own functions and then kept dense, which gives the same values as packed ones. Fine-tuning is
plain LoRA on every linear layer of the blocks: AdamW, cosine schedule, warmup 0.03, gradients clipped at 0.3.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import queue
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accuracy_variants import DEFAULTS, Variant, log_scales, plain_start, quantise  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from bitsandbytes.backends.lowra.reference import decode_scales  # noqa: E402
from lowra.calibration import SEQUENCE, collect  # noqa: E402
from lowra.quantize import store_scales  # noqa: E402
from lowra.refine import group_sums, widen  # noqa: E402
from lowra.targets import find_targets, replace_module  # noqa: E402


class Tables(torch.autograd.Function):
    """levels[codes] * scales * gain, [N, K]; its gradient is summed over the weights of a code and of a group."""

    @staticmethod
    def forward(ctx, levels, gain, codes, scales, group):
        ctx.save_for_backward(levels, gain, codes, scales)
        ctx.group = group
        return levels.gather(1, codes.long()) * widen(scales * gain, group, codes.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        levels, gain, codes, scales = ctx.saved_tensors
        codes, for_gain, for_levels = codes.long(), None, None
        if ctx.needs_input_grad[1]:
            for_gain = group_sums(gradient * levels.gather(1, codes), ctx.group) * scales
        if ctx.needs_input_grad[0]:
            product = gradient * widen(scales * gain, ctx.group, codes.shape[1])
            for_levels = torch.zeros_like(levels).scatter_add_(1, codes, product)
        return for_levels, for_gain, None, None, None


class Adapted(nn.Module):
    """x (W + B A)^T; W frozen, or levels[codes] * scales with both trainable."""

    def __init__(self, dense, a, b, parts=None):
        super().__init__()
        self.lora_a, self.lora_b = nn.Parameter(a.float().clone()), nn.Parameter(b.float().clone())
        self.register_buffer("dense", dense, persistent=False)
        self.parts = None
        if parts is not None:
            codes, levels, scales, self.order, group, which = parts
            self.parts = (codes, scales, group)
            self.levels = nn.Parameter(levels.clone(), requires_grad=which in ("levels", "both"))
            # as a relative change per group, so that one learning rate suits all of them
            self.gain = nn.Parameter(torch.ones_like(scales), requires_grad=which in ("scales", "both"))

    def forward(self, x):
        weight = self.dense if self.parts is None else Tables.apply(self.levels, self.gain, *self.parts)
        weight = weight.to(torch.bfloat16)
        low = nn.functional.linear(nn.functional.linear(x, self.lora_a.to(weight.dtype)), self.lora_b.to(weight.dtype))
        return nn.functional.linear(x, weight) + low

    @torch.no_grad()
    def pack(self, storage):
        """Levels and scales as the format stores them."""
        codes, scales, group = self.parts
        wanted = (scales * self.gain).clamp(min=0).cpu()[self.order]
        stored, steps = log_scales(wanted) if storage == "log4" else store_scales(wanted, storage)
        decoded = torch.empty(stored.shape)
        decoded[self.order] = decode_scales(stored, steps)
        self.parts = (codes, decoded.to(scales.device), group)
        self.gain.fill_(1)
        self.levels.copy_(self.levels.half())


class Session:
    """Model, text and calibration, loaded once per process."""

    def __init__(self, model, text, device, calibration_tokens, eval_blocks):
        self.device = torch.device(device)
        self.folder = model
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.train = self._blocks(tokenizer, text / "train.txt")
        self.valid = self._blocks(tokenizer, text / "validation.txt")[:eval_blocks]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(self.device)
        self.model.config.use_cache = False
        self.targets = find_targets(self.model, None)
        modules = {name: self.model.get_submodule(t.name) for name, t in self.targets.items()}
        self.weights = {name: module.weight.detach().cpu().clone() for name, module in modules.items()}
        count = max(1, calibration_tokens // SEQUENCE)
        self.calibration = collect(self.model, modules, self.train[:count], True, False)
        self._fitted = None, None  # the last variant's quantisation and its result

    def _blocks(self, tokenizer, path):
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        blocks = []
        for first in range(0, len(rows), 1000):
            ids = tokenizer("".join(rows[first : first + 1000])).input_ids
            blocks += [ids[i : i + SEQUENCE] for i in range(0, len(ids) - SEQUENCE + 1, SEQUENCE)]
        return torch.tensor(blocks)

    def quantised(self, v: Variant):
        """What `quantise` returns, made once for variants in a row that differ in their training alone."""
        key = quantisation_of(v)
        if self._fitted[0] != key:
            self._fitted = key, quantise(self, v)
        return self._fitted[1]

    def perplexity(self):
        self.model.eval()
        total = 0.0
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            for part in self.valid.split(16):
                part = part.to(self.device)
                total += float(self.model(input_ids=part, labels=part).loss) * len(part)
        return math.exp(total / len(self.valid))


def quantisation_of(v: Variant) -> dict:
    """The switches that decide what is trained later."""
    training = ("train", "table_rate", "lr", "train_steps")
    return {key: value for key, value in dataclasses.asdict(v).items() if key not in training}


def run(session: Session, v: Variant) -> dict:
    start = time.perf_counter()
    torch.manual_seed(v.seed)
    device, model = session.device, session.model
    true_bits, output_error = 16.0, 0.0
    if v.bits < 16:
        fitted, true_bits = session.quantised(v)
    for name, target in session.targets.items():
        weight = session.weights[name]
        if v.bits < 16:
            dense, a, b, parts, _ = fitted[name]
            left, moment = weight - dense - b @ a, session.calibration.moment(name)
            output_error += float(((left @ moment) * left).sum() / ((weight @ moment) * weight).sum())
        else:
            dense, parts = weight, None
            a, b = plain_start(weight, v.rank)
        dense, a, b = dense.to(device), a.to(device), b.to(device)
        if v.train == "lora" or parts is None:
            parts = None
        else:
            *tables, order = parts
            parts = (*(table.to(device) for table in tables), order, v.group_size, v.train)
        dense = dense.to(torch.bfloat16)
        replace_module(model, target.name, Adapted(dense, a, b, parts))
    prepared = time.perf_counter() - start
    untuned = session.perplexity()
    trained = fine_tune(session, v) if v.train_steps else {}
    return {
        **dataclasses.asdict(v),
        "true_bits": true_bits,
        "output_error": output_error / len(session.targets),
        "untuned": untuned,
        **trained,
        "prepared_s": prepared,
        "seconds": time.perf_counter() - start,
    }


def fine_tune(session, v):
    tables = optimise(session, v)
    if not tables:
        return {"tuned": session.perplexity()}
    unpacked = session.perplexity()
    for module in session.model.modules():
        if isinstance(module, Adapted):
            module.pack(v.scales)
    return {"tuned": session.perplexity(), "tuned_unpacked": unpacked}


def optimise(session, v, batch=8, warmup=0.03):
    """Trains adapters, and tables where the variant says so; returns the parameters of these."""
    model, blocks, steps = session.model, session.train, v.train_steps
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapters, tables = [], []
    for module in model.modules():
        if isinstance(module, Adapted):
            adapters += [module.lora_a.requires_grad_(True), module.lora_b.requires_grad_(True)]
            if module.parts is not None:
                tables += [module.levels.requires_grad_(v.train in ("levels", "both"))]
                tables += [module.gain.requires_grad_(v.train in ("scales", "both"))]
    tables = [p for p in tables if p.requires_grad]
    groups = [{"params": adapters, "lr": v.lr}, {"params": tables, "lr": v.lr * v.table_rate, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups[: 2 if tables else 1], weight_decay=0.1)
    warm = max(1, round(warmup * steps))

    def factor(step):
        if step < warm:
            return step / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    generator = torch.Generator().manual_seed(v.seed)
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(8)])
    while len(order) < batch * steps:
        order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
    model.train()
    for step in range(steps):
        ids = blocks[order[step * batch : (step + 1) * batch]].to(session.device)
        with torch.autocast(session.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters + tables, 0.3)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
    return tables


def _work(jobs, results, threads, arguments):
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    model, *others = arguments
    sessions = {}
    while True:
        for job in jobs.get():
            try:
                variant = Variant(**job)
                folder = variant.model or model
                if folder not in sessions:
                    sessions[folder] = Session(folder, *others)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path, help="folder with train.txt and validation.txt")
    parser.add_argument("--variants", type=pathlib.Path, required=True, help="JSON list of variants, most wanted first")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no variant after this long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calibration-tokens", type=int, default=25_000)
    parser.add_argument("--eval-blocks", type=int, default=10_000)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # at exit the workers are ended too
    start = time.perf_counter()
    variants = json.loads(args.variants.read_text())
    groups = {}  # a process quantises once for variants that differ in their training alone
    for variant in variants:
        groups.setdefault(json.dumps(quantisation_of(Variant(**variant))), []).append(variant)
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    arguments = (args.model, args.text, args.device, args.calibration_tokens, args.eval_blocks)
    threads = max(1, len(os.sched_getaffinity(0)) // args.workers)
    workers = [
        context.Process(target=_work, args=(jobs, results, threads, arguments), daemon=True)
        for _ in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    rows, waiting = [], list(groups.values())
    for group in waiting[: args.workers]:
        jobs.put(group)
    running = min(args.workers, len(waiting))
    del waiting[: args.workers]
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
