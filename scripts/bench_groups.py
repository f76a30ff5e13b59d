"""Products of a decoding step in groups, bare and with LoRA adapters, without what lies between: microseconds a group.

    python scripts/bench_groups.py --tokens 1 8 --adapters 0 1 4
    python scripts/bench_groups.py --tokens 1 --adapters 0 1 --parts all attention qkv o gate_up down

The four groups of each block of a 7B (q k v after a norm, o, gate up after a norm, down after a gate) run one after
the other as one CUDA graph, over 32 blocks of random weights, so that none lies in a cache. "4 adapters": each sequence
goes through one of four. "attention": the same with an attention to 100 tokens between q k v and o, as in a step; a
group's name: those groups alone. Times are medians of replays in one process, and steadier than tokens a second by
bench_generation.py, whose model has to be made anew for each row.
"""

import argparse
import statistics

import torch
from random_models import GPU, SHAPES, random_packed

from bitsandbytes.backends.lowra import decoding
from lowra.nn.linear import LowRALinear
from lowra.nn.recording import record

TYPE, REPLAYS = torch.bfloat16, 12
HIDDEN, INTERMEDIATE, BLOCKS, HEADS, *_ = SHAPES["7b"]
SEEN, SLOTS = 100, 256  # tokens of the attention, and of its cache
NAMES = ["qkv", "o", "gate_up", "down"]
GROUPS = [[(HIDDEN, HIDDEN)] * 3, [(HIDDEN, HIDDEN)], [(INTERMEDIATE, HIDDEN)] * 2, [(HIDDEN, INTERMEDIATE)]]


def group_of(shapes: list[tuple[int, int]], bits: float) -> decoding.Group:
    layers = [LowRALinear.from_packed(random_packed(*shape, bits)) for shape in shapes]
    return decoding.Group([(layer.matrix(), None) for layer in layers])


def adapters_of(group: decoding.Group, count: int, rank: int, tokens: int, shared: tuple) -> decoding.Adapters:
    """shared: cells, launches, and the number of this group."""
    ranks = count * rank
    terms = [
        decoding.LowRank(
            torch.randn(ranks, matrix.in_features, device=GPU, dtype=TYPE) / 64,
            torch.randn(matrix.rows, ranks, device=GPU, dtype=TYPE) / 64,
            1.0,
        )
        for matrix, _ in group
    ]
    gains = None
    if count > 1:
        own = torch.arange(ranks)[:, None] // rank == torch.arange(tokens) % count
        gains = decoding.Gains.of(own.float().repeat(len(group), 1).to(GPU), [ranks] * len(group))
    return decoding.Adapters(terms, *shared, gains)


class Step:
    """All groups of a step at so many tokens, with so many adapters; or some of them (`part`)."""

    def __init__(self, blocks: list[list[decoding.Group]], tokens: int, count: int, rank: int, part: str = "all"):
        self._blocks, self._part = blocks, part
        self._x = torch.randn(tokens, HIDDEN, device=GPU, dtype=TYPE)
        self._wide = torch.randn(tokens, INTERMEDIATE, device=GPU, dtype=TYPE)
        self._norm = decoding.Norm(torch.ones(HIDDEN, device=GPU, dtype=TYPE), 1e-5)
        self._launches = torch.zeros(1, dtype=torch.int32, device=GPU)
        self._adapters: list[list[decoding.Adapters | None]] = [[None] * len(GROUPS) for _ in blocks]
        self._attention, self._caches = attention_of(len(blocks), tokens)
        if count:
            most = max(decoding.cells_of(shapes[0][1], len(shapes) * count * rank) for shapes in GROUPS)
            cells = torch.zeros(most, dtype=torch.int64, device=GPU)
            for i, block in enumerate(blocks):
                numbers = range(1 + i * len(GROUPS), 1 + (i + 1) * len(GROUPS))
                self._adapters[i] = [
                    adapters_of(group, count, rank, tokens, (cells, self._launches, number))
                    for group, number in zip(block, numbers, strict=True)
                ]

    @property
    def groups(self) -> int:
        """That a call goes through."""
        return len(self._blocks) * (1 if self._part in NAMES else len(GROUPS))

    def __call__(self) -> None:
        self._launches.add_(len(GROUPS) * len(self._blocks))
        x, part = self._x, self._part
        query, y, opened, up = x, x, self._wide, self._wide
        for block, own, cache in zip(self._blocks, self._adapters, self._caches, strict=True):
            if part not in NAMES or part == "qkv":
                (query, key, value), _ = decoding.normed_linear_group(x, None, self._norm, block[0], None, own[0])
            if part == "attention":
                query = decoding.attend(query, key, value, cache, self._attention)
            if part not in NAMES or part == "o":
                (y,) = decoding.linear_group(query, block[1], own[1])
            if part not in NAMES or part == "gate_up":
                (opened, up), _ = decoding.normed_linear_group(x, y, self._norm, block[2], None, own[2])
            if part not in NAMES or part == "down":
                x = decoding.gated_linear(opened, up, "silu", block[3], own[3])


def attention_of(blocks: int, batch: int) -> tuple[decoding.Attention, list[decoding.Cache]]:
    """With a cache for each block."""
    dim = HIDDEN // HEADS
    table = torch.ones(SLOTS, dim, device=GPU, dtype=TYPE)
    attention = decoding.Attention(HEADS, HEADS, dim, dim**-0.5, table, table)
    memory = torch.randn(blocks, 2, batch, HEADS, SLOTS, dim, device=GPU, dtype=TYPE)
    slot = torch.full((1,), SEEN, dtype=torch.int32, device=GPU)
    first = torch.zeros(batch, dtype=torch.int32, device=GPU)
    shared = slot, first, *decoding.workspace_of(attention, batch, SLOTS, torch.device(GPU))
    return attention, [decoding.Cache(keys, values, *shared) for keys, values in memory]


@torch.inference_mode()
def microseconds(step: Step) -> float:
    """Of a group."""
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
        torch.cuda.synchronize()
        graph = record(step)
        for _ in range(3):
            graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        milliseconds = [before.elapsed_time(after) for before, after in zip(events, events[1:], strict=False)]
    return 1e3 * statistics.median(milliseconds) / step.groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=1.5)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--adapters", type=int, nargs="*", default=[0, 1, 4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--parts", nargs="*", choices=["all", "attention", *NAMES], default=["all"])
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    blocks = [[group_of(shapes, args.bits) for shapes in GROUPS] for _ in range(BLOCKS)]
    for tokens in args.tokens:
        counts = [count for count in args.adapters if count <= tokens]
        for part in args.parts:
            times = {count: microseconds(Step(blocks, tokens, count, args.rank, part)) for count in counts}
            found = ", ".join(f"{count} adapters {time:.2f} us" for count, time in times.items())
            print(f"{tokens} tokens, {part}: {found}", flush=True)


if __name__ == "__main__":
    main()
