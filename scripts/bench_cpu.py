"""Measures products on the processor: packed weights beside PyTorch's dense ones and llama.cpp's, in one run.

    python scripts/bench_cpu.py --ggml llama.cpp/build/bin --out docs/lab/kernels/cpu.json

Every number is a median of the process's CPU seconds; all kinds take turns, so that a core that is busy with something
else, or slower for a while, weighs on all alike; the wall's seconds are beside them. A turn is one call on each of so
many copies of the weight that together they take `--cold` MiB: a weight comes from further away than the second cache.
Weights are random; times do not depend on their values. "step" is a token's products of a LLaMA shape, without head,
attention and norms: the sum over its layers. The bound beside it is the packed bytes over the measured bandwidth of one
pass over memory by PyTorch's sum.
"""

import argparse
import itertools
import json
import statistics
import time

import torch
from kernels.ggml_products import Ggml, GgmlProduct

from bitsandbytes.backends.lowra import decoding, layout
from bitsandbytes.backends.lowra.layout import PackedMatrix

# [out_features, in_features] and how often a model has it.
SHAPES = {
    "1b": {(2048, 2048): 44, (256, 2048): 44, (5632, 2048): 44, (2048, 5632): 22},  # TinyLlama: 0.97 B
    "7b": {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32},
    "13b": {(5120, 5120): 160, (13824, 5120): 80, (5120, 13824): 40},
}
MIXES = {1.5: (0.0625, 0.3125), 2.0: (0.125, 0.625), 4.0: (1.0, 0.0)}  # shares of 4- and 2-bit rows
GROUP = 64
GGML = ("Q2_K", "Q4_0", "TQ2_0")


def packed(rows: int, in_features: int, bits: float) -> PackedMatrix:
    """A random packed weight with 8-bit scales, precisions at random rows."""
    share4, share2 = MIXES[bits]
    rows4, rows2 = int(rows * share4), int(rows * share2)
    of_rows = torch.tensor([4] * rows4 + [2] * rows2 + [1] * (rows - rows4 - rows2), dtype=torch.uint8)
    return PackedMatrix(
        torch.randint(0, 256, (layout.codes_size(rows, rows4, rows2, in_features),), dtype=torch.uint8),
        layout.row_order(of_rows[torch.randperm(rows)]),
        torch.randint(1, 256, (rows, in_features // GROUP), dtype=torch.uint8),
        torch.rand(layout.scale_step_count(rows, in_features, GROUP)) * 1e-6,
        torch.randn(layout.levels_size(rows, rows4, rows2)).half(),
        rows4,
        rows2,
        in_features,
        GROUP,
    )


class Products:
    """Calls of one kind on a shape, over enough copies of the weight to be cold."""

    def __init__(self, kind: str, shape: tuple[int, int], x: torch.Tensor, cold: int, ggml: Ggml | None):
        (rows, in_features), tokens = shape, len(x)
        if kind.startswith("lowra"):
            self.bytes = sum(t.nbytes for t in packed(rows, in_features, float(kind[6:])).tensors)
        elif ggml is not None and kind in GGML:
            self.bytes = GgmlProduct(ggml, kind, torch.randn(32, in_features), rows, tokens).bytes
        else:
            self.bytes = rows * in_features * (4 if kind == "float32" else 2)
        self._calls = [self._call(kind, shape, x, ggml) for _ in range(max(1, -(-cold // self.bytes)))]
        self.cpu: list[float] = []
        self.wall: list[float] = []

    @staticmethod
    def _call(kind, shape, x, ggml):
        rows, in_features = shape
        if kind.startswith("lowra"):
            weight = packed(rows, in_features, float(kind[6:]))
            group = decoding.Group([(weight, None)])
            return lambda: decoding.linear_group(x, group)
        if kind in GGML:
            call = GgmlProduct(ggml, kind, torch.randn(32, in_features), rows, len(x))
            call.set_x(x)
            return call
        dtype = getattr(torch, kind)
        dense, own = torch.randn(rows, in_features).to(dtype), x.to(dtype)
        return lambda: torch.nn.functional.linear(own, dense)

    def run(self) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        for call in self._calls:
            call()
        self.cpu.append((time.process_time() - cpu) / len(self._calls))
        self.wall.append((time.perf_counter() - wall) / len(self._calls))


def bandwidth() -> float:
    """Bytes a CPU second that one pass over 256 MiB reads, the best of seven."""
    memory, best = torch.zeros(64 << 20), 0.0
    for _ in range(7):
        started = time.process_time()
        memory.sum()
        best = max(best, memory.nbytes / (time.process_time() - started))
    return best


@torch.inference_mode()
def measure(args: argparse.Namespace, threads: int) -> list[dict]:
    torch.set_num_threads(threads)
    ggml = None if args.ggml is None else Ggml(args.ggml, threads)
    kinds = [*(f"lowra {bits}" for bits in MIXES), *args.dense, *(GGML if ggml else ())]
    found = []
    for model, tokens in itertools.product(args.shapes, args.tokens):
        steps = {kind: [0.0, 0.0, 0] for kind in kinds}
        for shape, count in SHAPES[model].items():
            x = torch.randn(tokens, shape[1]).to(getattr(torch, args.type))
            products = {kind: Products(kind, shape, x, args.cold << 20, ggml) for kind in kinds}
            for _, product in itertools.product(range(args.repeats + 1), products.values()):
                product.run()
            for kind, product in products.items():
                own = statistics.median(product.cpu[1:]), statistics.median(product.wall[1:]), product.bytes
                steps[kind] = [total + count * value for total, value in zip(steps[kind], own, strict=True)]
        speed = bandwidth()
        for kind, (cpu, wall, size) in steps.items():
            row = {"model": model, "tokens": tokens, "threads": threads, "kind": kind, "cpu_seconds": round(cpu, 5)}
            row |= {"wall_seconds": round(wall, 5), "bytes": size, "bandwidth_gb_s": round(speed / 1e9, 1)}
            row["share_of_bandwidth"] = round(size / speed / cpu, 3)
            bound = f"{row['share_of_bandwidth']:.0%} of {speed / 1e9:.1f} GB/s"
            seconds = f"{cpu * 1e3:9.1f} ms CPU {wall * 1e3:9.1f} ms wall"
            print(f"{model} {tokens:4} tokens {threads} threads {kind:9} {seconds}  {bound}", flush=True)
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--dense", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--type", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of lowra's x")
    parser.add_argument("--ggml", help="folder of llama.cpp's shared libraries; without it they are left out")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cold", type=int, default=64, help="MiB of copies that calls walk over")
    parser.add_argument("--out", help="file for the numbers as JSON")
    args = parser.parse_args()
    rows = [row for threads in sorted(set(args.threads)) for row in measure(args, threads)]
    if args.out is not None:
        with open(args.out, "w") as file:
            json.dump({"cpu": torch.backends.cpu.get_cpu_capability(), "rows": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
