"""Fine-tuning steps of a LLaMA-shaped model: time, how long the GPU works of it, and memory, lowra beside QLoRA.

    python scripts/bench_training.py --shape 7b --bits 2 --peers NF4 --out docs/lab/training.json

Weights are random, packed ones of a fixed mix of precisions; times do not depend on their values. All bases get the
same adapters (float32, on all linear layers of the blocks), gradient checkpointing, AdamW and bfloat16 autocast, in one
process, one after the other. Ways: "eager" is what Transformers and PEFT do as they come, "compiled" compiles every
decoder layer (torch.compile), "graphs" is `lowra.capture_layers`; "+liger" adds Liger's kernels for norms, rotary
embedding and SwiGLU. Milliseconds are medians of steps between two synchronisations; the GPU's are the union of its
kernels' times in one step.
"""

import argparse
import gc
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from random_models import SHAPES, make_model
from torch.profiler import ProfilerActivity, profile

import lowra
from lowra.nn.trained_tables import train_tables

_PREPARING = 3  # steps: the first of a shape makes what lasts, the second captures


def adapted(args: argparse.Namespace, base: str | float, way: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with its adapters and its optimizer, ready for steps."""
    kernels = way.split("+")
    model = make_model(args.shape, base)
    if "liger" in kernels:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False)
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    if args.tables and isinstance(base, float):
        train_tables(model, scales=True)
    model.train()
    if kernels[0] == "graphs":
        lowra.capture_layers(model)
    elif kernels[0] == "compiled":
        for layer in model.get_base_model().model.layers:
            layer.compile()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return model, torch.optim.AdamW(trainable, lr=1e-5, fused=True)


def timed(call: Callable[[], None]) -> float:
    """Milliseconds between two synchronisations."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def busy(call: Callable[[], None]) -> tuple[float, int]:
    """Milliseconds in which the GPU works, and its kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = last = 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total / 1e3, len(spans)


def measure(args: argparse.Namespace, base: str | float, way: str) -> list[dict]:
    """The rows of one base in one way."""
    model, optimizer = adapted(args, base, way)
    rows = []
    for batch, length in args.shapes:
        tokens = torch.randint(0, 32000, (batch, length), device="cuda")

        def step(tokens: torch.Tensor = tokens) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        preparing = sum(timed(step) for _ in range(_PREPARING)) / 1e3
        torch.cuda.reset_peak_memory_stats()
        milliseconds = statistics.median(timed(step) for _ in range(args.steps))
        gpu, kernels = busy(step)
        row = {"shape": args.shape, "base": base, "way": way, "rank": args.rank, "batch": batch, "length": length}
        row |= {"ms": milliseconds, "gpu_ms": gpu, "kernels": kernels, "preparing_s": preparing}
        row |= {
            "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "device_gib": (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 2**30,
        }
        rows.append({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--bits", type=float, nargs="*", default=[2.0])
    parser.add_argument("--peers", nargs="*", default=["NF4"], help="NF4, bf16")
    parser.add_argument("--ways", nargs="*", default=["eager", "graphs", "graphs+liger"], help="of packed bases")
    parser.add_argument("--peer-ways", nargs="*", default=["eager", "compiled"], help="of the peers")
    parser.add_argument("--shapes", nargs="*", default=["1x512", "2x1024"], help="batch x length")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tables", action="store_true", help="packed bases train their levels and scales too")
    parser.add_argument("--steps", type=int, default=7, help="timed ones")
    parser.add_argument("--cap", type=float, help="GiB that PyTorch may take of the GPU, as on a smaller card")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.cap:
        torch.cuda.set_per_process_memory_fraction(args.cap * 2**30 / torch.cuda.mem_get_info()[1])
    args.shapes = [tuple(int(number) for number in shape.split("x")) for shape in args.shapes]
    print(torch.cuda.get_device_name(), torch.__version__, f"at most {args.cap} GiB" if args.cap else "")
    rows = []
    pairs = [*itertools.product(args.bits, args.ways), *itertools.product(args.peers, args.peer_ways)]
    # Liger replaces classes of Transformers for the rest of the process
    for base, way in sorted(pairs, key=lambda pair: "liger" in pair[1]):
        rows += measure(args, base, way)
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
    if args.out:
        args.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
