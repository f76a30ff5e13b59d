"""Quantising a checkpoint of LLaMA-2-7B's shape from end to end: seconds of each stage, memory, loading.

    python scripts/bench_scale.py --folder /path/with/40GB --layers 32 --rank 64 --bits 1.5

The weights are random (every channel with a standard deviation of its own), so that nothing needs to be downloaded; the
times do not depend on their values, the bits of the channels do. Prints one JSON object last.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import threading
import time

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import lowra

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
_LAYERS_PER_SHARD = 4


def write_checkpoint(folder: pathlib.Path, layers: int, device: str) -> int:
    """A bfloat16 checkpoint with LLaMA-2-7B's tensors in shards; returns its bytes."""
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    generator = torch.Generator(device=device).manual_seed(0)

    def matrix(rows, columns):
        spread = torch.exp(0.3 * torch.randn(rows, 1, generator=generator, device=device)) * 0.02
        return (torch.randn(rows, columns, generator=generator, device=device) * spread).bfloat16().cpu()

    shards, weight_map, total = [], {}, 0
    shards.append({"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)})
    shards[0]["lm_head.weight"] = matrix(VOCABULARY, HIDDEN)
    names = [f"model-{i:05d}.safetensors" for i in range(1 + (layers + _LAYERS_PER_SHARD - 1) // _LAYERS_PER_SHARD)]
    for number, name in enumerate(names):
        tensors = shards[0] if number == 0 else {}
        first = (number - 1) * _LAYERS_PER_SHARD
        for layer in range(first, min(first + _LAYERS_PER_SHARD, layers)) if number else ():
            prefix = f"model.layers.{layer}"
            for projection in "qkvo":
                tensors[f"{prefix}.self_attn.{projection}_proj.weight"] = matrix(HIDDEN, HIDDEN)
            for projection, (rows, columns) in {
                "gate": (INTERMEDIATE, HIDDEN),
                "up": (INTERMEDIATE, HIDDEN),
                "down": (HIDDEN, INTERMEDIATE),
            }.items():
                tensors[f"{prefix}.mlp.{projection}_proj.weight"] = matrix(rows, columns)
            for norm in ("input", "post_attention"):
                tensors[f"{prefix}.{norm}_layernorm.weight"] = torch.ones(HIDDEN)
        tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += (folder / name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class PeakMemory:
    """Largest resident memory of this process while the block runs, without pages of files."""

    def __enter__(self):
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.05):
            status = pathlib.Path("/proc/self/status").read_text()
            anonymous = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, anonymous * 1024)


def timed_loads(folders: dict[str, pathlib.Path], device: str, loads: int) -> dict:
    """Seconds and GPU memory of `from_pretrained`: the first, and the median of the later ones (files in the cache)."""
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    held = {}
    for _ in range(1 + loads):
        for name, folder in folders.items():  # in turns, so that a disturbance meets all
            if device == "cuda":
                torch.cuda.empty_cache()
            start = time.perf_counter()
            model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
            if device == "cuda":
                torch.cuda.synchronize()
                held[name] = torch.cuda.memory_allocated()
            else:  # mapped so far
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone()
            seconds[name].append(time.perf_counter() - start)
            del model
    results = {}
    for name, folder in folders.items():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        median = statistics.median(seconds[name][1:])
        results[name] = {
            "first": round(seconds[name][0], 3),
            "seconds": round(median, 3),
            "bytes": size,
            "GB/s": round(size / median / 1e9, 2),
            "gpu_bytes": held.get(name, 0),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64, help="of the adapter; 0 for none")
    parser.add_argument("--bits", type=float, default=1.5)
    parser.add_argument("--budget", choices=("nominal", "true"), default="nominal", help="what the bits count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--loads", type=int, default=5, help="timed loads of each checkpoint after a first; 0 for none")
    parser.add_argument("--keep", action="store_true", help="leave both checkpoints for other benchmarks")
    args = parser.parse_args()
    dense, packed = args.folder / "dense", args.folder / "packed"
    start = time.perf_counter()
    size = write_checkpoint(dense, args.layers, args.device)
    print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True)

    start = time.perf_counter()
    with PeakMemory() as memory:
        adapter = lowra.AdapterRecipe(args.rank) if args.rank else None
        config = lowra.LowRAConfig(bits=args.bits, budget=args.budget)
        report = lowra.quantize_checkpoint(str(dense), packed, config, adapter, args.device)
    result = {
        "layers": args.layers,
        "rank": args.rank,
        "seconds": round(time.perf_counter() - start, 1),
        "host_peak_anonymous_bytes": memory.peak,
        "host_max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else 0,
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores",
        "largest_shard": max(path.stat().st_size for path in dense.glob("*.safetensors")),
        "report": report,
    }
    if args.loads:
        result["load"] = timed_loads({"packed": packed, "dense": dense}, args.device, args.loads)
    if not args.keep:
        shutil.rmtree(args.folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
