"""Fine-tuning a LLaMA-2-7B-shaped model: seconds of a step and peak GPU memory, lowra beside QLoRA (bitsandbytes NF4).

    python scripts/bench_training.py --dense FOLDER --packed FOLDER [FOLDER ...]

FOLDERs as `scripts/bench_scale.py --keep` leaves them. Both bases get the same adapters (r = 64 on all linear layers of
the blocks, float32), gradient checkpointing, AdamW and bfloat16 autocast, in one process, one after the other; medians
of the timed steps. Prints a table and one JSON object last.
"""

import argparse
import gc
import json
import pathlib
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lowra  # noqa: F401 - registers the format
from lowra.nn.trained_tables import train_tables

RANK = 64
SHAPES = [(1, 256), (1, 512), (1, 1024), (2, 256), (2, 512), (2, 1024)]
WARMUP = 2
_PEER = "QLoRA NF4"


def load(folder: pathlib.Path, nf4: bool) -> torch.nn.Module:
    """The base with frozen weights on the GPU."""
    if nf4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cuda"}
        )
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cuda"})


def measure(name: str, folder: pathlib.Path, steps: int, tables: bool = False) -> list[dict]:
    """Rows of the table for one base; with levels and scales trained beside the adapter."""
    model = load(folder, name == _PEER)
    base_bytes = torch.cuda.memory_allocated()
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    if tables:
        train_tables(model, scales=True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    rows = []
    for batch, length in SHAPES:
        tokens = torch.randint(0, 32000, (batch, length), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(WARMUP + steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rows.append(
            {
                "base": name,
                "batch": batch,
                "length": length,
                "ms": round(1000 * statistics.median(seconds[WARMUP:]), 1),
                "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 3),
                "base_GiB": round(base_bytes / 2**30, 3),
            }
        )
        print(rows[-1], flush=True)
    del model, optimizer, trainable, loss
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=pathlib.Path, required=True)
    parser.add_argument("--packed", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--tables", action="store_true", help="the first packed base again, with its tables trained")
    parser.add_argument("--steps", type=int, default=7, help="timed ones, of which the median counts")
    args = parser.parse_args()
    bases = {_PEER: args.dense}
    for folder in args.packed:
        report = json.loads((folder / "lowra_report.json").read_text())
        bases[f"lowra {folder.name}, {report['true_bits']:.2f} true bits"] = folder
    rows = [row for name, folder in bases.items() for row in measure(name, folder, args.steps)]
    if args.tables:
        name = list(bases)[1]
        rows += measure(f"{name}, tables trained", args.packed[0], args.steps, tables=True)
    peers = {(row["batch"], row["length"]): row for row in rows if row["base"] == _PEER}
    print(f"| base | batch x length | ms a step | of QLoRA | peak GiB | of QLoRA |  on {torch.cuda.get_device_name()}")
    for row in rows:
        peer = peers[row["batch"], row["length"]]
        print(
            f"| {row['base']} | {row['batch']} x {row['length']} | {row['ms']} | {row['ms'] / peer['ms']:.3f} | "
            f"{row['peak_GiB']} | {row['peak_GiB'] / peer['peak_GiB']:.3f} |"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
