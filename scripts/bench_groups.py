"""Products of a decoding step in groups, bare and with LoRA adapters, without what lies between: microseconds a group.

    python scripts/bench_groups.py --tokens 1 8 --adapters 0 1 4

The four groups of each block of a 7B (q k v after a norm, o, gate up after a norm, down after a gate) run one after
the other as one CUDA graph, over 32 blocks of random weights, so that none lies in a cache. "4 adapters": each sequence
goes through one of four. Times are medians of replays in one process, and steadier than tokens a second by
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
HIDDEN, INTERMEDIATE, BLOCKS, *_ = SHAPES["7b"]
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
    """All groups of a step at so many tokens, with so many adapters."""

    def __init__(self, blocks: list[list[decoding.Group]], tokens: int, count: int, rank: int):
        self._blocks = blocks
        self._x = torch.randn(tokens, HIDDEN, device=GPU, dtype=TYPE)
        self._norm = decoding.Norm(torch.ones(HIDDEN, device=GPU, dtype=TYPE), 1e-5)
        self._launches = torch.zeros(1, dtype=torch.int32, device=GPU)
        self._adapters: list[list[decoding.Adapters | None]] = [[None] * len(GROUPS) for _ in blocks]
        if count:
            most = max(decoding.cells_of(shapes[0][1], len(shapes) * count * rank) for shapes in GROUPS)
            cells = torch.zeros(most, dtype=torch.int64, device=GPU)
            for i, block in enumerate(blocks):
                numbers = range(1 + i * len(GROUPS), 1 + (i + 1) * len(GROUPS))
                self._adapters[i] = [
                    adapters_of(group, count, rank, tokens, (cells, self._launches, number))
                    for group, number in zip(block, numbers, strict=True)
                ]

    def __call__(self) -> None:
        self._launches.add_(len(GROUPS) * len(self._blocks))
        x = self._x
        for (qkv, o, gate_up, down), own in zip(self._blocks, self._adapters, strict=True):
            (query, _, _), _ = decoding.normed_linear_group(x, None, self._norm, qkv, None, own[0])
            (y,) = decoding.linear_group(query, o, own[1])
            (opened, up), _ = decoding.normed_linear_group(x, y, self._norm, gate_up, None, own[2])
            x = decoding.gated_linear(opened, up, "silu", down, own[3])


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
    return 1e3 * statistics.median(milliseconds) / (len(GROUPS) * BLOCKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=1.5)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--adapters", type=int, nargs="*", default=[0, 1, 4])
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    blocks = [[group_of(shapes, args.bits) for shapes in GROUPS] for _ in range(BLOCKS)]
    for tokens in args.tokens:
        counts = [count for count in args.adapters if count <= tokens]
        times = {count: microseconds(Step(blocks, tokens, count, args.rank)) for count in counts}
        print(f"{tokens} tokens:", ", ".join(f"{count} adapters {time:.2f} us" for count, time in times.items()))


if __name__ == "__main__":
    main()
