"""Measures the CUDA kernels beside bitsandbytes NF4 and bf16 in one run, and draws docs/lab/kernels/measured.png.

    python scripts/bench_kernels.py --out docs/lab/kernels/h200.json --picture docs/lab/kernels/measured.png

Every number is the time of one call with a cold L2 cache: a CUDA graph holds calls on several copies of the weight
(together several times the L2 cache, outputs included), is replayed, and the median replay is divided by the calls, 40
or more, since starting a graph takes 5 us. So launch overhead on the host is left out, as it is in a captured or
compiled model. Quantising is timed by events around single eager calls, since bitsandbytes quantises on the default
stream, which no graph captures; the cache is flushed beforehand, and for so long that the host has enqueued the call
meanwhile. `--events` times everything so. The weights are random; a mix of precisions stands at random rows. GB/s
counts each packed input and each output once.

    python scripts/bench_kernels.py --against docs/lab/kernels/h200.json --threshold 5

prints what takes more than 5 % longer than in an earlier run's file, and exits with 1 if anything does.
"""

import argparse
import json
import statistics

import torch
from kernels.slower import report

import bitsandbytes
from bitsandbytes.backends.lowra import layout

OPS = torch.ops.bitsandbytes
# Linear layers of LLaMA-2 7B and 13B, [out_features, in_features].
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (5120, 5120), (13824, 5120), (5120, 13824)]
# Shares of 4-, 2- and 1-bit rows that give the nominal bits per weight.
MIXES = {1.5: (0.0625, 0.3125), 2.0: (0.125, 0.625), 2.5: (0.3125, 0.5625), 4.0: (1.0, 0.0)}
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
GROUP = 64
COLD_BYTES = 400_000_000
FLUSHES = 10  # of COLD_BYTES each: together a millisecond on an H200, more than a slow host needs for a call
GRAPH_CALLS = 40


class Packed:
    """A packed random weight of one nominal precision with 8-bit scales."""

    def __init__(self, rows: int, in_features: int, bits: float, seed: int):
        torch.manual_seed(seed)
        share4, share2 = MIXES[bits]
        self.rows_4bit, self.rows_2bit = int(rows * share4), int(rows * share2)
        counts = [self.rows_4bit, self.rows_2bit, rows - self.rows_4bit - self.rows_2bit]
        row_bits = torch.tensor([4, 2, 1], dtype=torch.uint8).repeat_interleave(torch.tensor(counts))
        self.row_order = layout.row_order(row_bits[torch.randperm(rows)]).cuda()
        self.in_features = in_features
        self.weight = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16) * 0.02
        self.thresholds = self._tables(counts, lambda b: 2**b - 1)
        self.levels = self._tables(counts, lambda b: 2**b).half()
        self.codes, absmax = self.quantize()
        self.scales, self.scale_steps = OPS.lowra_encode_scales(absmax)

    @staticmethod
    def _tables(counts, entries):
        parts = [torch.rand(n, entries(b), device="cuda") * 2 - 1 for b, n in zip((4, 2, 1), counts, strict=True)]
        return torch.cat([part.sort(dim=1).values.reshape(-1) for part in parts])

    @property
    def tensors(self):
        return self.codes, self.row_order, self.scales, self.scale_steps, self.levels

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.scale_steps, self.levels))

    def quantize(self):
        return OPS.lowra_quantize(self.weight, self.row_order, self.thresholds, self.rows_4bit, self.rows_2bit, GROUP)

    def quantize_with_scales(self):
        codes, absmax = self.quantize()
        return codes, *OPS.lowra_encode_scales(absmax)

    def dequantize(self):
        return OPS.lowra_dequantize(
            *self.tensors, self.rows_4bit, self.rows_2bit, self.in_features, GROUP, torch.bfloat16
        )

    def table_gradients(self, gradient):
        return OPS.lowra_table_gradients(gradient, *self.tensors, self.rows_4bit, self.rows_2bit, GROUP, True)

    def linear(self, x):
        return OPS.lowra_linear(x, *self.tensors, None, self.rows_4bit, self.rows_2bit, GROUP)


def time_graph(calls) -> float:
    """Microseconds of one of `calls` (the same work on different memory), replayed from a CUDA graph."""
    calls = calls * -(-GRAPH_CALLS // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # kept: each call gets an output of its own
    times = []
    for _ in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    del kept
    return statistics.median(times[3:])


def time_events(calls) -> float:
    """Microseconds on the GPU of one eager call after the L2 cache was overwritten, launches on the host left out."""
    flush = torch.empty(COLD_BYTES // 4, dtype=torch.int32, device="cuda")
    times = []
    for i in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(FLUSHES):
            flush.zero_()
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[5:])


def copies(bytes_of_one: float) -> int:
    """How many different calls one measurement rotates over."""
    return int(min(40, max(4, COLD_BYTES // bytes_of_one + 1)))


def copy_ceiling(timer, count: int) -> float:
    """GB/s, read plus written, of a pass over `count` bf16 values (copy_ itself leaves the SMs idle inside a graph)."""
    n = copies(4 * count)
    pairs = [
        (
            torch.randn(count, device="cuda", dtype=torch.bfloat16),
            torch.empty(count, device="cuda", dtype=torch.bfloat16),
        )
        for _ in range(n)
    ]
    return 4 * count / timer([lambda p=p: torch.neg(p[0], out=p[1]) for p in pairs]) / 1e3


def bench_codec(timer, shape, bits, results):
    rows, in_features = shape
    dense = 2 * rows * in_features
    packs = [Packed(rows, in_features, bits, i) for i in range(copies(dense))]
    key = {"rows": rows, "in_features": in_features, "bits": bits}
    us = timer([p.dequantize for p in packs])
    results.append({**key, "what": "dequantise", "us": us, "gbs": (dense + packs[0].bytes) / us / 1e3})
    us = time_events([p.quantize_with_scales for p in packs])
    results.append({**key, "what": "quantise", "us": us, "gbs": (dense + packs[0].bytes) / us / 1e3})


def bench_codec_peer(timer, shape, results):
    functional = bitsandbytes.functional
    rows, in_features = shape
    dense = 2 * rows * in_features
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies(dense))]
    for double in (False, True):
        packed = [
            functional.quantize_4bit(w, blocksize=GROUP, compress_statistics=double, quant_type="nf4") for w in weights
        ]
        name = "NF4 double-quantised" if double else "NF4"
        key = {"rows": rows, "in_features": in_features, "bits": name}
        us = timer([lambda p=p: functional.dequantize_4bit(*p) for p in packed])
        results.append({**key, "what": "dequantise", "us": us})
        if not double:  # the op alone: functional.quantize_4bit copies a table from the host besides
            us = time_events([lambda w=w: OPS.quantize_4bit(w, GROUP, "nf4", torch.uint8) for w in weights])
            results.append({**key, "what": "quantise", "us": us})


def bench_product(timer, shape, all_bits, tokens, results, peers=True):
    rows, in_features = shape
    xs = {m: torch.randn(m, in_features, device="cuda", dtype=torch.bfloat16) for m in tokens}
    key = {"rows": rows, "in_features": in_features, "what": "product"}
    dense = 2 * rows * in_features

    def measure(name, functions):
        for m in tokens:
            calls = [lambda f=f, m=m: f(xs[m]) for f in functions]
            results.append({**key, "bits": name, "tokens": m, "us": timer(calls)})

    for bits in all_bits:
        packs = [Packed(rows, in_features, bits, i) for i in range(copies(dense * bits / 16))]
        for p in packs:
            p.weight = p.thresholds = None
        measure(bits, [p.linear for p in packs])
    if not peers:
        return
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies(dense))]
    measure("bf16", [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights])
    quantized = []
    for i in range(copies(dense / 4)):
        w = weights[i % len(weights)]
        quantized.append(
            bitsandbytes.functional.quantize_4bit(w, blocksize=GROUP, compress_statistics=False, quant_type="nf4")
        )
    measure("NF4", [lambda x, q=q: bitsandbytes.matmul_4bit(x, q[0].t(), q[1]) for q in quantized])


def bench_learner(results):
    """GPU seconds for codebooks and errors of all precisions of all linear weights of LLaMA-2-7B, 20 iterations."""
    levels = torch.cat([torch.linspace(-1, 1, n) for n in (16, 4, 2)]).cuda()
    cuts = torch.cat([(t[1:] + t[:-1]) / 2 for t in (torch.linspace(-1, 1, n) for n in (16, 4, 2))]).cuda()
    total = 0.0
    for shape, count in (((4096, 4096), 4), ((11008, 4096), 2), ((4096, 11008), 1)):
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
        OPS.lowra_lloyd_max(weight, levels, cuts, None, GROUP, 20, True)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        OPS.lowra_lloyd_max(weight, levels, cuts, None, GROUP, 20, True)
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        total += 32 * count * seconds
        results.append(
            {"what": "learner", "rows": shape[0], "in_features": shape[1], "bits": "all", "us": seconds * 1e6}
        )
    results.append({"what": "learner of LLaMA-2-7B", "rows": 0, "in_features": 0, "bits": "all", "us": total * 1e6})


def picture(results, ceiling, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    shape = (11008, 4096)
    for name in [1.5, 2.0, 4.0, "NF4", "bf16"]:
        line = [
            r
            for r in results
            if r["what"] == "product" and (r["rows"], r["in_features"]) == shape and r["bits"] == name
        ]
        if line:
            label = name if isinstance(name, str) else f"lowra {name} bits"
            left.plot([r["tokens"] for r in line], [r["us"] for r in line], marker="o", label=label)
    left.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", title=f"product, {shape[0]} x {shape[1]}"
    )
    left.set_xticks(TOKENS, TOKENS)
    left.xaxis.minorticks_off()
    left.legend()
    bars = [r for r in results if r["what"] == "dequantise" and r["bits"] in (1.5, "NF4", "NF4 double-quantised")]
    names = sorted({(r["rows"], r["in_features"]) for r in bars})
    for i, bits in enumerate([1.5, "NF4", "NF4 double-quantised"]):
        heights = [
            2e-3 * n * k / r["us"]
            for n, k in names
            for r in bars
            if (r["rows"], r["in_features"], r["bits"]) == (n, k, bits)
        ]
        right.bar([x + 0.27 * i for x in range(len(heights))], heights, 0.27, label=bits if i else "lowra 1.5 bits")
    right.axhline(ceiling, color="black", linestyle=":", label="copy, read + write")
    right.set_xticks([x + 0.27 for x in range(len(names))], [f"{n} x {k}" for n, k in names], fontsize=7)
    right.set(ylabel="GB/s of bf16 written", ylim=(0, 1.3 * ceiling), title="dequantise to bf16")
    right.legend(loc="upper center", ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes, from the first")
    parser.add_argument("--bits", type=float, nargs="*", default=list(MIXES))
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument(
        "--events", action="store_true", help="single eager calls after a flush in place of graph replays"
    )
    parser.add_argument("--parts", nargs="*", default=["codec", "product", "learner"])
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", help="all numbers as JSON")
    parser.add_argument("--picture", help="PNG file")
    parser.add_argument(
        "--against", help="JSON of an earlier run: prints what got slower, exit status 1 if anything did"
    )
    parser.add_argument("--threshold", type=float, default=5.0, help="per cent that a number may be slower")
    parser.add_argument("--draw", help="only draw --picture from this JSON of an earlier run")
    options = parser.parse_args()
    if options.draw:
        with open(options.draw) as file:
            earlier = json.load(file)
        picture(earlier["results"], earlier["copy_gbs"], options.picture)
        print_tables(earlier["results"], earlier["copy_gbs"])
        return
    timer = time_events if options.events else time_graph
    ceiling = copy_ceiling(timer, 1 << 28)
    results = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}")
    print(f"copy ceiling {ceiling:.0f} GB/s; timer: {'events' if options.events else 'graph'}")
    for shape in SHAPES[: options.shapes]:
        if "codec" in options.parts:
            print(f"copy of {shape}: {copy_ceiling(timer, shape[0] * shape[1]):.0f} GB/s")
            for bits in options.bits:
                bench_codec(timer, shape, bits, results)
            if not options.no_peers:
                bench_codec_peer(timer, shape, results)
        if "product" in options.parts:
            bench_product(timer, shape, options.bits, options.tokens, results, not options.no_peers)
        torch.cuda.empty_cache()
        save(options.out, ceiling, results)
    if "learner" in options.parts:
        bench_learner(results)
    print_tables(results, ceiling)
    save(options.out, ceiling, results)
    if options.picture:
        picture(results, ceiling, options.picture)
    if options.against and report(results, torch.cuda.get_device_name(), options.against, options.threshold):
        raise SystemExit(1)


def save(path, ceiling, results):
    """What has been measured so far; after every shape, so that a run that is cut keeps its numbers."""
    if path:
        with open(path, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "copy_gbs": ceiling, "results": results}, file, indent=1)


def print_tables(results, ceiling):
    print("| what | N x K | bits | us | GB/s | of the copy ceiling |\n|---|---|---|---|---|---|")
    for r in results:
        if r["what"] != "product":
            speed = f"{r['gbs']:.0f} | {r['gbs'] / ceiling:.0%}" if "gbs" in r else "– | –"
            print(f"| {r['what']} | {r['rows']} x {r['in_features']} | {r['bits']} | {r['us']:.1f} | {speed} |")
    products = [r for r in results if r["what"] == "product"]
    tokens = sorted({r["tokens"] for r in products})
    print("| product, us | bits | " + " | ".join(f"M = {m}" for m in tokens) + " |\n|---|---|" + "---|" * len(tokens))
    lines = dict.fromkeys((r["rows"], r["in_features"], r["bits"]) for r in products)
    for line in lines:
        cells = [f"{r['us']:.1f}" for r in products if (r["rows"], r["in_features"], r["bits"]) == line]
        print(f"| {line[0]} x {line[1]} | {line[2]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
