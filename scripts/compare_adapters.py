"""Compare every adapter quantiser of lowra on adapters trained on a small base (LoraQuant, Table 1 and Figures 2-4).

The run is the data path, in three stages that can be repeated on their own:

    python scripts/compare_adapters.py train --base ../shared/models/base-30m --data ../shared/data --work runs/adapters
    python scripts/compare_adapters.py compare ...the same
    python scripts/compare_adapters.py library ...the same

`train` fits one LoRA per task (rank 16, every linear layer), `compare` quantises the adapters with every method
through the same code as `lowra adapter quantize` and measures perplexity against AvgBits, `library` holds 500 packed
adapters at once and measures the memory of the process. Tables go to --work as JSON and to docs/ as Markdown and a
picture.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def train_adapter(
    base: Path, data: Path, task: str, output: Path, steps: int, batch: int, learning_rate: float
) -> None:
    """Fit a rank-16 LoRA on one task: AdamW, cosine schedule with 5 % warm-up, gradients clipped at 0.3."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    blocks = read_blocks(data, task, "train", tokenizer)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(base), config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
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
    for task in TASKS:
        output = args.work / task
        if not (output / "adapter_config.json").exists():
            start = time.perf_counter()
            train_adapter(args.base, args.data, task, output, args.steps, args.batch, args.learning_rate)
            print(f"{task}: trained in {time.perf_counter() - start:.0f} s")
        blocks = read_blocks(args.data, task, "validation", tokenizer)[: args.blocks]
        base = load_base(args.base)
        before = perplexity(base, blocks)
        after = perplexity(PeftModel.from_pretrained(base, output), blocks)
        print(f"{task}: perplexity {before:.2f} without the adapter, {after:.2f} with it ({len(blocks)} blocks)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "compare", "library"])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where adapters and tables go")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--blocks", type=int, default=64, help="validation blocks that are scored")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"train": run_train}[args.stage](args)


if __name__ == "__main__":
    main()
