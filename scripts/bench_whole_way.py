"""From a dense checkpoint to fine-tuning steps under the cap of a card: seconds of each stage, peaks of GPU and host.

    python scripts/bench_whole_way.py --shape 70b --card 24 --folder /tmp/way

`lowra quantize` at two true bits, embeddings and head too, data-free and without an initial adapter; then the packed
folder is loaded and takes steps of the recipe's Trainer. PyTorch may take what `lowra plan` counts as the card's: 97 %
of its GB, less the driver's context. A 70B in 16 bits would fill 141 GB, so its files hold headers and holes: when a
tensor is read, random values of its name's are put into its place, on the device and not on the host. That is all that
is not as in use; the time to read such a checkpoint from a disk comes on top. Of memory the host's is what is not a
page of a file. Prints one JSON object last.
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from bench_scale import PeakMemory
from gpu_clock import memory, reset_peak
from random_models import SHAPES, model_config
from trainer_steps import trained
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lowra
from lowra.checkpoints.dense import DenseCheckpoint
from lowra.commands.memory import named_card, run_of
from lowra.inspection.requirements import CONTEXT_BYTES, finetuning
from lowra.inspection.shapes import read_shape
from lowra.quantization import pipeline
from lowra.training.recipe import Recipe


def write_headers(folder: pathlib.Path, shape: str) -> int:
    """A bfloat16 checkpoint whose files are holes behind their headers; returns the bytes that it seems to have."""
    folder.mkdir(parents=True)
    config = model_config(shape)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).state_dict()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = tensor
    total = 0
    for file, content in files.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in content.items():
            header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [end, end + tensor.nbytes]}
            end += tensor.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
        total += end
    places = {name: file for file, content in files.items() for name in content}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_checkpoint(device: str) -> type[DenseCheckpoint]:
    """The checkpoint's reader with random values for those in the files, the same whenever a tensor is read."""

    class RandomCheckpoint(DenseCheckpoint):
        def load(self, name: str) -> dict[str, torch.Tensor]:
            shape = self._expected[name].shape
            if len(shape) == 1:
                return {name: torch.ones(shape, dtype=torch.bfloat16)}
            generator = torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()))
            kind: dict[str, Any] = {"generator": generator, "dtype": torch.bfloat16, "device": device}
            spread = torch.randn(shape[0], 1, **kind).mul_(0.3).exp_().mul_(0.02)
            return {name: torch.randn(shape, **kind).mul_(spread)}

    return RandomCheckpoint


class Stages:
    """What each stage took."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        reset_peak()
        started = time.perf_counter()
        with PeakMemory() as host:
            found = self.found[name] = {}
            yield found
        found |= {"seconds": time.perf_counter() - started, "host_gib": host.peak / 2**30} | memory()
        found |= {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
        print(name, json.dumps(found), flush=True)


def whole_way(args: argparse.Namespace) -> dict[str, Any]:
    """All stages."""
    dense, packed = args.folder / "dense", args.folder / "packed"
    card = named_card(f"{args.card:g}GB")
    if args.device == "cuda":
        torch.cuda.set_per_process_memory_fraction((card.size - CONTEXT_BYTES) / torch.cuda.mem_get_info()[1])
    size = write_headers(dense, args.shape)
    print(f"{args.shape}: {size / 1e9:.1f} GB dense, on a card of {args.card:g} GB", flush=True)
    stages = Stages()
    source = mock.patch.object(pipeline, "DenseCheckpoint", random_checkpoint(args.device))
    with stages.stage("quantise") as found, source:
        config = lowra.LowRAConfig(bits=args.bits, budget="true", quantize_embeddings=True, quantize_head=True)
        report = lowra.quantize_checkpoint(str(dense), packed, config, device=args.device, progress=False)
        found |= {"stages": report["seconds"], "true_bits": report["true_bits"], "bytes": report["checkpoint_bytes"]}
    torch.cuda.empty_cache()
    recipe = Recipe(
        model=str(packed), dataset="random tokens", rank=args.rank, block_size=args.tokens, batch_size=1,
        accumulation=1, optimizer=args.optimizer, liger=args.liger,
    )  # fmt: skip
    shape = read_shape(str(packed))
    planned = finetuning(shape, run_of(recipe, shape, card))
    with stages.stage("load"):
        model = AutoModelForCausalLM.from_pretrained(packed, device_map={"": args.device}, dtype=torch.bfloat16)
    with stages.stage("train") as found:
        found |= {"planned_gib": planned.allocated / 2**30, "planned_on_card_gib": planned.on_card / 2**30}
        found |= trained(model, recipe, args.steps)
    return {"shape": args.shape, "card": args.card, "rank": args.rank, "tokens": args.tokens} | stages.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--card", type=float, default=24, help="its GB")
    parser.add_argument("--bits", type=float, default=2.0, help="true ones")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed ones")
    parser.add_argument("--optimizer", default="adamw_torch")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a new one, with room twice the packed size")
    parser.add_argument("--device", default="cuda", help="cpu: nothing is measured but that it runs")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    try:
        result = whole_way(args)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
