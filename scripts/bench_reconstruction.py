"""Seconds and memory that `--reconstruct` takes for a block of a large model, on random weights of its widths.

    python scripts/bench_reconstruction.py --shape 7b --blocks 2 --sequences 96 --passes 4 --profile

Everything but the training of the blocks is kept cheap (no statistics, LoftQ in one step). With --profile a second,
shorter run says which kernels take the time.
"""

import argparse
import json
import logging
import pathlib
import tempfile
import time

import torch
from random_models import SHAPES, model_config
from transformers import LlamaForCausalLM

from lowra import AdapterRecipe, LowRAConfig, quantize_checkpoint
from lowra.quantization.calibration import Calibration

VOCABULARY = 512


def make_checkpoint(shape: str, blocks: int, length: int, folder: pathlib.Path, device: str) -> None:
    config = model_config(shape, length)
    config.num_hidden_layers, config.vocab_size = blocks, VOCABULARY
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def quantise(folder: pathlib.Path, output: pathlib.Path, passes: int, sequences: int, length: int, device: str) -> dict:
    text = torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(0))
    config = LowRAConfig(bits=2.0, group_size=128, refine=2, reconstruct=passes)
    recipe = AdapterRecipe(16, method="loftq", steps=1)
    return quantize_checkpoint(str(folder), output, config, recipe, device, False, Calibration({}, {}, sequences=text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    logging.getLogger("lowra").setLevel(logging.ERROR)  # few sequences of nothing
    on_gpu = args.device != "cpu"
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "dense"
        make_checkpoint(args.shape, args.blocks, args.length, folder, args.device)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        report = quantise(folder, folder.with_name("a"), args.passes, args.sequences, args.length, args.device)
        layers = SHAPES[args.shape][2]
        each = report["seconds"]["reconstruct"] / args.blocks
        found = {
            "shape": args.shape,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "seconds": report["seconds"],
            "whole": round(time.perf_counter() - start, 1),
            "seconds_a_block": round(each, 2),
            "minutes_for_all": round(each * layers / 60, 2),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
            "block_errors": report["block_errors"],
        }
        print(json.dumps(found), flush=True)
        if args.profile:
            kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
            with torch.profiler.profile(activities=kinds) as profiler:
                quantise(folder, folder.with_name("b"), 1, 16, args.length, args.device)
            order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
            print(profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60))


if __name__ == "__main__":
    main()
