"""Compare every adapter quantiser of lowra on adapters trained on a small base (LoraQuant, Table 1 and Figures 2-4).

The run is the data path, in stages that can be repeated on their own:

    python scripts/compare_adapters.py train --base ../shared/models/base-30m --data ../shared/data --work runs/adapters
    python scripts/compare_adapters.py compare ...the same, --picture docs/lab/adapters.png
    python scripts/compare_adapters.py library ...the same
    python scripts/compare_adapters.py speed

`train` fits one LoRA per task (rank 16, every linear layer), `compare` quantises the adapters with every method
through the same code as `lowra adapter quantize` and measures perplexity against AvgBits, `library` holds 500 packed
adapters at once and measures the memory of the process, `speed` times the shapes of LLaMA-2-7B. Tables are
printed as Markdown and kept in --work as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from adapters_report import draw, print_tables
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowra.adapters import (
    AdapterLibrary,
    LoraAdapter,
    LoraFactors,
    LoraQuantSettings,
    PackedAdapter,
    quantize_loraquant,
    read_adapter,
)
from lowra.adapters.binary_baselines import quantize_billm, quantize_pbllm
from lowra.adapters.gptq import input_hessians, quantize_gptq
from lowra.adapters.joint import quantize_joint
from lowra.adapters.labels import make_label
from lowra.adapters.library import attach
from lowra.adapters.loraquant import quantize_bin, quantize_rtn
from lowra.adapters.storage import write_packed
from lowra.checkpoints.atomic import written_beside

BLOCK = 256  # tokens in a block, in training and in evaluation
TASKS = {  # folder, ending and field of each task's data
    "wikitext": ("wikitext-2", "txt", None),
    "chat": ("oasst1", "jsonl", "text"),
    "news": ("xsum", "jsonl", "document"),
}


def read_blocks(data: Path, task: str, split: str, tokenizer) -> torch.Tensor:
    """Tokens of one split of a task as [blocks, BLOCK], the remainder dropped."""
    folder, ending, field = TASKS[task]
    text = (data / folder / f"{split}.{ending}").read_text(encoding="utf-8")
    if field is not None:
        text = "\n".join(json.loads(line)[field] for line in text.splitlines())
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    return tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)


def load_base(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def train_adapter(args: argparse.Namespace, task: str, output: Path) -> None:
    """Fit a rank-16 LoRA on one task: AdamW, cosine schedule with 5 % warm-up, gradients clipped at 0.3.

    A base quantised by lowra brings the adapter to start from in its folder; any other starts from a new one.
    """
    torch.manual_seed(0)
    steps, batch = args.steps, args.batch
    blocks = read_blocks(args.data, task, "train", AutoTokenizer.from_pretrained(args.base))
    initial = args.base / "initial_adapter"
    if initial.is_dir():
        model = PeftModel.from_pretrained(load_base(args.base), initial, is_trainable=True)
    else:
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load_base(args.base), config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    order = torch.cat([torch.randperm(len(blocks)) for _ in range(math.ceil(steps * batch / len(blocks)))])
    progress = tqdm(range(steps), desc=f"train {task}")
    for step in progress:
        ids = blocks[order[step * batch : (step + 1) * batch]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(output)


@torch.no_grad()
def perplexity(model, blocks: torch.Tensor) -> float:
    """exp of the mean next-token loss in nats over blocks [N, BLOCK]."""
    model.eval()
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in blocks.split(8) if len(ids)]
    counts = [len(ids) for ids in blocks.split(8)]
    return math.exp(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))


def run_train(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    for task in args.tasks:
        output = args.work / task
        if not (output / "adapter_config.json").exists():
            start = time.perf_counter()
            train_adapter(args, task, output)
            print(f"{task}: trained in {time.perf_counter() - start:.0f} s")
        blocks = read_blocks(args.data, task, "validation", tokenizer)[: args.blocks]
        base = load_base(args.base)
        before = perplexity(base, blocks)
        after = perplexity(PeftModel.from_pretrained(base, output), blocks)
        print(f"{task}: perplexity {before:.2f} without the adapter, {after:.2f} with it ({len(blocks)} blocks)")


# Rows of the main table (Table 1): name in the table, and how to quantise.
MAIN = {
    "BIN": quantize_bin,
    "RTN (1 bit)": lambda adapter: quantize_rtn(adapter, 1),
    "RTN (2 bits)": lambda adapter: quantize_rtn(adapter, 2),
    "PB-LLM": quantize_pbllm,
    "BiLLM": quantize_billm,
    "LoraQuant (2@0.8)": lambda adapter: quantize_loraquant(adapter, LoraQuantSettings(2, 0.8)),
    "LoraQuant (2@0.9)": lambda adapter: quantize_loraquant(adapter, LoraQuantSettings(2, 0.9)),
    "LoraQuant (3@0.8)": lambda adapter: quantize_loraquant(adapter, LoraQuantSettings(3, 0.8)),
    "LoraQuant (3@0.9)": lambda adapter: quantize_loraquant(adapter, LoraQuantSettings(3, 0.9)),
}
RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95)
STATIC = (1, 2, 4, 6, 8)


def ablations() -> dict[str, dict[str, LoraQuantSettings]]:
    """Curves of Figures 2 to 4: for each figure, settings by "curve at point"."""
    figures: dict[str, dict[str, LoraQuantSettings]] = {
        "split (Figure 2)": {},
        "parts (Figure 3)": {},
        "h (Figure 4)": {},
    }
    for h in STATIC:
        for split in ("svd", "norm", "random"):
            figures["split (Figure 2)"][f"{split} at h={h}"] = LoraQuantSettings(2, split=split, static_h=h)
        figures["h (Figure 4)"][f"static at h={h}"] = LoraQuantSettings(2, static_h=h)
    for ratio in RATIOS:
        whole = LoraQuantSettings(2, ratio)
        figures["parts (Figure 3)"][f"whole at {ratio}"] = whole
        figures["parts (Figure 3)"][f"not refined at {ratio}"] = replace(whole, refine=False)
        figures["parts (Figure 3)"][f"no 1-bit part at {ratio}"] = replace(whole, binary=False)
        figures["h (Figure 4)"][f"dynamic at {ratio}"] = whole
    return figures


def product_error(adapter: LoraAdapter, packed: PackedAdapter) -> float:
    """sum |B A - B^ A^|_F^2 over sum |B A|_F^2, all layers."""
    state, wrong, whole = packed.dequantize(), 0.0, 0.0
    for layer in adapter.layers:
        a, b = state[layer.name + layer.suffixes[0]], state[layer.name + layer.suffixes[1]]
        pair = torch.cat([layer.b, -b], dim=1), torch.cat([layer.a, a])
        wrong += ((pair[0].mT @ pair[0]) * (pair[1] @ pair[1].mT)).sum().item()
        whole += ((layer.b.mT @ layer.b) * (layer.a @ layer.a.mT)).sum().item()
    return wrong / whole


class Scorer:
    """Quantised adapters of one task, scored on its validation blocks."""

    def __init__(self, args: argparse.Namespace, task: str):
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        self.task, self.base_path, self.folder = task, args.base, args.work / task
        self.blocks = read_blocks(args.data, task, "validation", tokenizer)[: args.blocks]
        self.calibration = read_blocks(args.data, task, "train", tokenizer)[:64]
        self.adapter = read_adapter(self.folder)

    def reference(self) -> list[dict]:
        base = load_base(self.base_path)
        rows = [{"task": self.task, "method": "no adapter", "bits": 0.0, "perplexity": perplexity(base, self.blocks)}]
        model = PeftModel.from_pretrained(base, self.folder)
        return rows + [
            {"task": self.task, "method": "float16", "bits": 16.0, "perplexity": perplexity(model, self.blocks)}
        ]

    def row(self, name: str, packed: PackedAdapter, seconds: float) -> dict:
        model = attach(load_base(self.base_path), packed, "packed")
        row = {
            "task": self.task,
            "method": name,
            "bits": packed.average_bits,
            "perplexity": perplexity(model, self.blocks),
            "error": product_error(self.adapter, packed),
            "seconds": seconds,
        }
        print(
            f"{self.task:9} {name:24} {row['bits']:6.3f} bits  "
            f"perplexity {row['perplexity']:8.2f}  error {row['error']:.3f}"
        )
        return row

    def quantized(self, name: str, quantize) -> dict:
        start = time.perf_counter()
        packed = quantize(self.adapter)
        return self.row(name, packed, time.perf_counter() - start)

    def gptq(self) -> dict:
        start = time.perf_counter()
        model = PeftModel.from_pretrained(load_base(self.base_path), self.folder)
        hessians = input_hessians(model, self.calibration, [layer.name for layer in self.adapter.layers])
        packed = quantize_gptq(self.adapter, hessians, 2)
        return self.row("GPTQ (2 bits)", packed, time.perf_counter() - start)


def run_compare(args: argparse.Namespace) -> None:
    scorers = [Scorer(args, task) for task in args.tasks]
    main_rows = []
    for scorer in scorers:
        main_rows += scorer.reference()
        main_rows += [scorer.quantized(name, quantize) for name, quantize in MAIN.items()]
        main_rows.append(scorer.gptq())
    if len(scorers) > 1:
        start = time.perf_counter()
        joint = quantize_joint([scorer.adapter for scorer in scorers])
        seconds = (time.perf_counter() - start) / len(joint)
        main_rows += [scorer.row("JD-Diagonal", one, seconds) for scorer, one in zip(scorers, joint, strict=True)]
    print_tables(main_rows, args.tasks)
    (args.work / "compare.json").write_text(json.dumps(main_rows, indent=1))
    if args.picture is None:
        return
    figures = {}
    scorer = scorers[0]
    for figure, settings in ablations().items():
        print(figure)
        figures[figure] = [
            scorer.quantized(name, lambda adapter, chosen=chosen: quantize_loraquant(adapter, chosen))
            for name, chosen in settings.items()
        ]
    (args.work / "figures.json").write_text(json.dumps(figures, indent=1))
    draw([row for row in main_rows if row["task"] == scorer.task], figures, args.picture)


def resident_bytes() -> int:
    """Memory of this process that is in RAM, in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_library(args: argparse.Namespace) -> None:
    """Hold --count packed adapters at once, then the same number in float16, and measure the process."""
    store = args.work / "library"
    base = load_base(args.base)
    for index in tqdm(range(args.count), desc="pack"):
        folder = store / f"user{index}"
        if folder.exists():
            continue
        # Different users, same training: a trained adapter with a twentieth of noise. Values do not change the memory.
        adapter = read_adapter(args.work / list(TASKS)[index % len(TASKS)])
        generator = torch.Generator().manual_seed(index)
        for layer in adapter.layers:
            for side in (layer.b, layer.a):
                side += 0.05 * side.std() * torch.randn(side.shape, generator=generator)
        packed = quantize_loraquant(adapter, LoraQuantSettings(refine=False))
        packed.label = make_label(packed, base_name=str(args.base), base=base, task="library measurement")
        with written_beside(folder) as partial:
            write_packed(partial, packed)

    library = AdapterLibrary(base, cache_size=4)
    before, start = resident_bytes(), time.perf_counter()
    for index in tqdm(range(args.count), desc="add"):
        library.add(f"user{index}", store / f"user{index}")
    seconds, packed_resident = time.perf_counter() - start, resident_bytes() - before
    report = library.memory() | {"resident_bytes": packed_resident, "add_ms": 1000 * seconds / args.count}

    names = [f"user{index}" for index in (0, 1, 2, 0)]
    start = time.perf_counter()
    library.prepare(names)
    report["decode_ms"] = 1000 * (time.perf_counter() - start) / len(set(names))
    ids = torch.randint(10, 8000, (len(names), 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed = library.model(input_ids=ids, adapter_names=names).logits
        library.switch("user1")
        alone = library.model(input_ids=ids[1:2]).logits
    report["mixed_batch_difference"] = ((mixed[1:2] - alone).norm() / alone.norm()).item()

    before = resident_bytes()
    held = []
    for index in tqdm(range(args.count), desc="float16"):
        tensors = load_file(args.work / list(TASKS)[index % len(TASKS)] / "adapter_model.safetensors")
        held.append({name: tensor.to(torch.float16) for name, tensor in tensors.items()})
    report["float16_resident_bytes"] = resident_bytes() - before
    (args.work / "library.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def run_speed(args: argparse.Namespace) -> None:
    """Time quantisation and packing of a rank-16 adapter in the shapes of LLaMA-2-7B, on all cores and on a GPU if
    any.
    """
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    decay = 0.8 ** torch.arange(16)
    layers = [
        LoraFactors(f"{i}", (".lora_A.weight", ".lora_B.weight"), torch.randn(m, 16) * decay, torch.randn(16, n))
        for i, (m, n) in enumerate(shapes * 32)
    ]
    adapter = LoraAdapter({}, layers)
    for device in ["cpu"] + ["cuda"] * 2 * torch.cuda.is_available():  # the first call on a GPU loads its libraries
        start = time.perf_counter()
        packed = quantize_loraquant(adapter, LoraQuantSettings(2, 0.9), device=device)
        seconds = time.perf_counter() - start
        print(f"{device}: {packed.parameters:,} parameters to {packed.average_bits:.3f} bits in {seconds:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "compare", "library", "speed"])
    parser.add_argument("--base", type=Path, help="not needed by speed")
    parser.add_argument("--data", type=Path, help="not needed by library and speed")
    parser.add_argument("--work", type=Path, default=Path("runs/adapters"), help="where adapters and measurements go")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--picture", type=Path, help="run the ablations too, on the first task, and draw all of it here"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--blocks", type=int, default=128, help="validation blocks that are scored, at most")
    parser.add_argument("--count", type=int, default=500, help="adapters in the library")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"train": run_train, "compare": run_compare, "library": run_library, "speed": run_speed}[args.stage](args)


if __name__ == "__main__":
    main()
