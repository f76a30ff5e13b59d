"""Generation of a LLaMA-shaped model: tokens a second and time to the first, lowra beside bf16 and NF4, in one run.

    python scripts/bench_generation.py --shape 7b --bits 1.5 2 4 --out docs/lab/generation.json
    python scripts/bench_generation.py --bits 1.5 --peers --batch 1 --prompt 100 --ways fast --ranks 0 16 \
        --kinds lora packed tables

Weights are random, packed ones of a fixed mix of precisions; times do not depend on their values. Every base generates
by Transformers' loop as it comes ("eager"), by one decoding step of Transformers captured as a CUDA graph over its
static cache ("graph"), and packed ones by `custom_generate=lowra.fast_decoding` ("fast"), through `model.generate`.
Seconds of a call are medians of the repeats after one that prepares. A step: by "eager", the difference between calls
for all new tokens and for a quarter of them; by "fast", the time from the first token to the last as a streamer gets
them (the difference of two prompts, of which each takes the host 10 ms more or less, would be as large as a tenth of
it). The floor is what a step has to read: packed or dense weights, adapters, the head, and the keys and values.
"""

import argparse
import gc
import itertools
import json
import pathlib
import statistics
import tempfile
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_models import GPU, SHAPES, make_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

import lowra
from lowra.adapters import LoraQuantSettings, quantize_loraquant, read_adapter
from lowra.adapters.library import attach
from lowra.generation.fast import release
from lowra.nn.trained_tables import bake_tables, train_tables

KINDS = ("lora", "packed", "tables")


def step_bytes(model: nn.Module, batch: int, context: float) -> float:
    """What one step has to read: all weights but the embeddings, and the keys and values of a mean context."""
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_tokens" not in n)
    config = model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return weights + batch * context * 4 * width * config.num_hidden_layers


def timed(call, repeats: int) -> float:
    """Median seconds of a call; the first, which prepares, is left out."""
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


class Arrivals(BaseStreamer):
    """When the tokens of a call come."""

    def __init__(self):
        self._seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self._seconds.append(time.perf_counter())

    def end(self) -> None:
        pass

    def step(self) -> float:
        """Seconds of a step, over those between the first token and the last."""
        tokens = self._seconds[1:]  # the first that comes is the prompt
        return (tokens[-1] - tokens[0]) / (len(tokens) - 1)


def generate(model: nn.Module, ids: torch.Tensor, new: int, fast: bool, turn: int = 0, **options) -> torch.Tensor:
    """Through the adapters of the model, one for each sequence, from another one on at each turn."""
    if fast:
        options["custom_generate"] = lowra.fast_decoding
    if isinstance(model, PeftModel) and len(names := list(model.peft_config)) > 1:
        options["adapter_names"] = [names[(row + turn) % len(names)] for row in range(len(ids))]
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


@torch.inference_mode()
def bare_graph(model: nn.Module, batch: int, slots: int) -> float:
    """Seconds of one step of Transformers' own forward, captured over its static cache and replayed."""
    cache = StaticCache(config=model.config, max_cache_len=slots)
    ids = torch.ones(batch, 1, dtype=torch.long, device=GPU)
    place = torch.full((1,), slots - 2, dtype=torch.long, device=GPU)

    def step():
        return model(ids, past_key_values=cache, cache_position=place, position_ids=place[None].expand(batch, 1)).logits

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return timed(lambda: [graph.replay() for _ in range(10)], 5) / 10


def busy(call) -> tuple[float, int]:
    """Seconds that the GPU works during a call, and its kernels."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.device_time_total for e in events) / 1e6, len(events)


def streamed_step(model: nn.Module, ids: torch.Tensor, args) -> float:
    """Seconds of a step of fast decoding; see above."""
    steps = []
    for _ in range(args.repeats + 1):
        arrivals = Arrivals()
        generate(model, ids, args.new, True, streamer=arrivals)
        steps.append(arrivals.step())
    return statistics.median(steps[1:])


def step_of_two_calls(call, args) -> float:
    """Seconds of a step of Transformers' loop; see above."""
    few = max(1, args.new // 4)
    seconds = [timed(call(args.new), 1) - timed(call(few), 1) for _ in range(min(args.repeats, 2))]
    return statistics.median(seconds) / (args.new - few)


def through_generate(model: nn.Module, ids: torch.Tensor, fast: bool, args) -> dict:
    """What a user of `model.generate` sees: time to the first token, of a step, and what the GPU does meanwhile."""

    def call(new):
        return lambda: generate(model, ids, new, fast)

    started = time.perf_counter()
    call(2)()
    torch.cuda.synchronize()
    row = {"ready_s": time.perf_counter() - started}
    row["first_ms"] = 1e3 * timed(call(1), args.repeats)
    row["step_ms"] = 1e3 * (streamed_step(model, ids, args) if fast else step_of_two_calls(call, args))
    if args.profile:
        seconds, kernels = busy(call(17))
        first_seconds, first_kernels = busy(call(1))
        row["busy_share"] = (seconds - first_seconds) / 16 / (row["step_ms"] / 1e3)
        row["launches_a_step"] = (kernels - first_kernels) / 16
        row["first_busy_ms"] = 1e3 * first_seconds
    return row


def with_adapters(model: nn.Module, rank: int, count: int = 1, kind: str = "lora") -> nn.Module:
    """A model with unmerged adapters on all linear layers of its blocks, of the size that trained ones have.

    Args:
        kind: "lora"; "packed", each by LoraQuant and as a library holds it; "tables", one with levels and scales of
            its own, as they are once they were trained.
    """
    model = without_adapters(model)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    model = get_peft_model(model, config)
    for number in range(1, count):
        model.add_adapter(f"another-{number}", config)
    for name, parameter in model.eval().named_parameters():
        if "lora_" in name:
            parameter.data = torch.nn.init.normal_(parameter.data, std=0.01).to(model.dtype)
    if kind == "packed":
        return packed_by_loraquant(model)
    if kind == "tables":
        for change in train_tables(model, scales=True).values():
            torch.nn.init.normal_(change.data, std=0.01)
        bake_tables(model)
    return model


def without_adapters(model: nn.Module) -> nn.Module:
    return model.unload() if isinstance(model, PeftModel) else model


def packed_by_loraquant(model: PeftModel) -> nn.Module:
    """The same model with its adapters as they are once they were packed, not refined, and loaded."""
    names = list(model.peft_config)
    settings, device = LoraQuantSettings(refine=False), model.device.type
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # "default" into the folder itself, others into folders in it
        folders = [pathlib.Path(folder) / ("" if name == "default" else name) for name in names]
        packed = [quantize_loraquant(read_adapter(own), settings, device=device) for own in folders]
    model = without_adapters(model)
    for name, adapter in zip(names, packed, strict=True):
        model = attach(model, adapter, name)
    model.set_adapter(names[0])
    return model.eval()


def measure(base: str | float, args, bandwidth: float) -> list[dict]:
    """All rows of one base."""
    model = make_model(args.shape, base)
    rows = []
    adapters = [(rank, kind) for rank in args.ranks for kind in (args.kinds if rank else [""])]
    for rank, kind in adapters:
        if kind in ("packed", "tables") and not isinstance(base, float):
            continue  # tables are those of packed layers, and a packed adapter is a LoRA to any other base
        model = with_adapters(model, rank, args.adapters, kind) if rank else without_adapters(model)
        for batch, prompt, way in itertools.product(args.batch, args.prompt, args.ways):
            if way == "fast" and not isinstance(base, float):
                continue
            ids = torch.randint(5, model.config.vocab_size, (batch, prompt), device=GPU)
            torch.cuda.reset_peak_memory_stats()
            row = {"shape": args.shape, "base": base, "rank": rank, "batch": batch, "prompt": prompt, "way": way}
            if rank:
                row |= {"kind": kind, "adapters": args.adapters}
            if way == "graph":
                row["step_ms"] = 1e3 * bare_graph(model, batch, prompt + args.new)
            else:
                row |= through_generate(model, ids, way == "fast", args)
            floor = step_bytes(model, batch, prompt + args.new / 2) / bandwidth
            row |= {"tokens_s": 1e3 * batch / row["step_ms"], "floor_share": 1e3 * floor / row["step_ms"]}
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            rows.append(row)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            release(model)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def read_bandwidth() -> float:
    """Bytes a second of reading 4 GiB."""
    data = torch.empty(1 << 30, device=GPU)
    return data.numel() * 4 / timed(data.sum, 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--bits", type=float, nargs="*", default=[1.5, 2.0, 4.0])
    parser.add_argument("--peers", nargs="*", default=["bf16", "NF4"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="*", default=[100, 512, 2048])
    parser.add_argument("--ranks", type=int, nargs="*", default=[0], help="of unmerged adapters, 0 for none")
    parser.add_argument("--adapters", type=int, default=1, help="from two on each sequence goes through one of them")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=["lora"], help="of adapters")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--ways", nargs="*", default=["eager", "graph", "fast"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="GPU-busy share and launches of a step")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.adapters > 1 and "tables" in args.kinds:
        parser.error("a batch goes through one set of tables: --adapters 1")
    bandwidth = read_bandwidth()
    print(torch.cuda.get_device_name(), f"reads {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for base in [*args.bits, *args.peers]:
        rows += measure(base, args, bandwidth)
    if args.out:
        args.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
