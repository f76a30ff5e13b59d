"""Pictures of a packed checkpoint, among them the paper's figures 2, 7 to 10 for the given model."""

import pathlib
from typing import Any

import matplotlib
import numpy as np
import torch

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.reference import decode_scales

from ..weights.packed import PackedWeight
from .errors import ChannelErrors, Original
from .memory import TOKENS, footprints
from .packed import LayerContent, PackedFolder, block_of, kind_of

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 - the backend is chosen first
from matplotlib.figure import Figure  # noqa: E402

_COLOURS = {4: "#1b4965", 2: "#2a9d8f", 1: "#e9a23b"}
_PARTS = {
    "16-bit weights": "#7d8597",
    "4-bit codes": _COLOURS[4],
    "2-bit codes": _COLOURS[2],
    "1-bit codes": _COLOURS[1],
    "scales": "#9b5de5",
    "level tables": "#f15bb5",
    "not packed": "#c9cdd4",
    "activations (estimated)": "#d9ed92",
    "gradients (estimated)": "#f4a3a0",
    "AdamW state (estimated)": "#d1495b",
}
_ADAPTERS = "#6d597a"
_BLOCK = 200
_CHANNELS = 8


def draw_all(
    packed: PackedFolder,
    layers: list[LayerContent],
    rank: int,
    original: Original | None,
    errors: list[ChannelErrors] | None,
) -> dict[str, Figure]:
    """Every picture by its name; `errors` only with the original weights."""
    pictures = {
        "bits": draw_bits(layers),
        "channels": draw_channels(packed, original),
        "memory": draw_memory(layers, packed, rank),
        "blocks": draw_blocks(packed, original),
    }
    if errors is not None:
        pictures["errors"] = draw_errors(errors)
    return pictures


def write_pictures(pictures: dict[str, Figure], place: pathlib.Path) -> list[pathlib.Path]:
    """Into a folder as NAME.png; into a PDF as its pages; beside an image file's name as STEM-NAME.png."""
    if place.suffix == ".pdf" and not place.is_dir():
        from matplotlib.backends.backend_pdf import PdfPages

        place.parent.mkdir(parents=True, exist_ok=True)
        with PdfPages(place) as pages:
            for figure in pictures.values():
                pages.savefig(figure)
        return [place]
    if place.suffix and not place.is_dir():
        paths = {name: place.with_name(f"{place.stem}-{name}{place.suffix}") for name in pictures}
    else:
        paths = {name: place / f"{name}.png" for name in pictures}
    for name, figure in pictures.items():
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(paths[name], dpi=130)
        plt.close(figure)
    return list(paths.values())


def draw_bits(layers: list[LayerContent]) -> Figure:
    """Mean bits of every layer, kinds against blocks, and the share of channels of each kind at each precision."""
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    blocks = sorted({layer.block for layer in layers})
    means = np.full((len(kinds), len(blocks)), np.nan)
    counts = {bits: np.zeros(len(kinds)) for bits in layout.PRECISIONS}
    for layer in layers:
        row = kinds.index(layer.kind)
        means[row, blocks.index(layer.block)] = layer.nominal_bits
        for bits, count in layer.channels.items():
            counts[bits][row] += count
    height = 1.6 + 0.42 * len(kinds)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, height), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    image = left.imshow(means, aspect="auto", cmap="viridis", vmin=1, vmax=4)
    if means.size <= 150:
        for (row, column), value in np.ndenumerate(means):
            if not np.isnan(value):
                left.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=_ink(value))
    left.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(blocks) // 16)
    left.set_xticks(range(0, len(blocks), step), ["–" if block < 0 else block for block in blocks[::step]])
    left.set_xlabel("transformer block")
    left.set_title("Mean bits per weight")
    figure.colorbar(image, ax=left, label="bits")
    total = sum(counts.values())
    start = np.zeros(len(kinds))
    for bits, of_kinds in counts.items():
        right.barh(range(len(kinds)), of_kinds / total, left=start, color=_COLOURS[bits], label=_words(bits))
        start += of_kinds / total
    right.set_xlim(0, 1)
    right.xaxis.set_major_formatter("{x:.0%}")
    right.set_xlabel("share of output channels")
    right.set_title("Channels at each precision")
    figure.legend(*right.get_legend_handles_labels(), ncols=3, loc="outside lower right", frameon=False)
    return figure


def _ink(bits: float) -> str:
    return "black" if bits > 2.6 else "white"


def draw_channels(packed: PackedFolder, original: Original | None) -> Figure:
    """Figure 2: normalised weights of channels sampled from the first block, with the levels each of them has.

    Without the original weights the share of each level stands in the place of the distribution.
    """
    first = _first_block(packed)
    generator = np.random.default_rng(0)
    figure, axes = plt.subplots(2, _CHANNELS // 2, figsize=(13, 6), layout="constrained", sharex=True)
    for place, axis in enumerate(axes.flat):
        name, target = first[place % len(first)]
        content = packed.weight(target)
        channel = int(generator.integers(target.out_features))
        bits = int(content.row_bits[channel])
        row = content.dequantize()[channel]
        levels, shares = _level_shares(row, content, channel)
        if original is not None:
            normal = _normalised(original.weight(name, target)[channel].float(), packed.config.group_size)
            axis.hist(normal.numpy(), bins=60, range=(-1, 1), density=True, color="#b8c4d6")
            axis.vlines(levels, 0, axis.get_ylim()[1], color=_COLOURS[bits], linewidth=1.2)
        else:
            axis.vlines(levels, 0, shares, color=_COLOURS[bits], linewidth=3)
            axis.set_ylim(bottom=0)
        axis.set_title(f"{kind_of(target.name)}\nchannel {channel}, {_words(bits)}", fontsize=9)
        axis.set_xlim(-1.05, 1.05)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("weight / absmax of its group")
    for axis in axes[:, 0]:
        axis.set_ylabel("density" if original is not None else "share of the weights")
    what = "Normalised weights of sampled channels" if original is not None else "Use of the levels by sampled channels"
    figure.suptitle(f"{what}, first block (lines: the channel's levels, relative to the stored scale)")
    return figure


def draw_memory(layers: list[LayerContent], packed: PackedFolder, rank: int) -> Figure:
    """Figures 7 to 9: memory by what it is spent on, for inference and for fine-tuning."""
    dense_bytes = packed.total_bytes - sum(layer.stored_bytes for layer in layers)
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout="constrained", sharey=True)
    seen: dict[str, Any] = {}
    for axis, training in zip(axes, (False, True), strict=True):
        bars = footprints(layers, dense_bytes, rank, training)
        unit, divisor = _unit(max(bar.total for bar in bars))
        for place, bar in enumerate(bars):
            start = 0.0
            for part, size in bar.parts.items():
                drawn = axis.bar(
                    place, size / divisor, bottom=start / divisor, color=_PARTS.get(part, _ADAPTERS), width=0.7
                )
                if size:
                    seen.setdefault(part, drawn)
                start += size
            axis.text(place, start / divisor, f"{start / divisor:,.1f}", ha="center", va="bottom", fontsize=9)
        axis.set_xticks(range(len(bars)), [bar.label for bar in bars])
        axis.set_title("Fine-tuning" if training else "Inference")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.tick_params(labelleft=True)
        axis.set_ylabel(f"memory [{unit}]")
    figure.suptitle(f"Memory by use (batch 1 x {TOKENS} tokens, linear layers only, no gradient checkpointing)")
    figure.legend(list(seen.values()), list(seen), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_blocks(packed: PackedFolder, original: Original | None) -> Figure:
    """Figure 10: a random 200 x 200 block of one weight of each kind, from the middle of the model."""
    chosen = _middle_layers(packed)
    rows = 2 if original is not None else 1
    figure, axes = plt.subplots(
        rows, len(chosen), figsize=(2.3 * len(chosen) + 1, 2.4 * rows + 1), layout="constrained", squeeze=False
    )
    generator = np.random.default_rng(0)
    for column, (name, target) in enumerate(chosen):
        top = int(generator.integers(max(1, target.out_features - _BLOCK + 1)))
        left = int(generator.integers(max(1, target.in_features - _BLOCK + 1)))
        versions = [("packed", packed.weight(target).dequantize())]
        if original is not None:
            versions.insert(0, ("original", original.weight(name, target).float()))
        blocks = [(title, weight[top : top + _BLOCK, left : left + _BLOCK].numpy()) for title, weight in versions]
        limit = float(np.quantile(np.abs(blocks[0][1]), 0.99)) or 1.0
        for axis, (title, block) in zip(axes[:, column], blocks, strict=True):
            extent = (left, left + block.shape[1], top + block.shape[0], top)
            image = axis.imshow(block, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent, interpolation="nearest")
            axis.tick_params(labelsize=7)
            axis.locator_params(nbins=4)
            if column == 0:
                axis.set_ylabel(f"{title}\noutput channel", fontsize=9)
        axes[0, column].set_title(_title(target.name), fontsize=8)
        axes[-1, column].set_xlabel("input channel", fontsize=8)
        bar = figure.colorbar(image, ax=list(axes[:, column]), location="bottom", shrink=0.9, pad=0.02)
        bar.ax.tick_params(labelsize=7)
        bar.ax.locator_params(nbins=4)
    figure.suptitle(f"Weights: random blocks of {_BLOCK} x {_BLOCK}, cut off at the 99 % quantile of |w|")
    return figure


def draw_errors(errors: list[ChannelErrors]) -> Figure:
    """Distribution of the channels' relative errors by precision, of the base and with the initial adapter."""
    versions = ["base"] + (["adapted"] if any(e.adapted is not None for e in errors) else [])
    figure, axes = plt.subplots(
        1,
        len(versions),
        figsize=(6 * len(versions), 4.2),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    largest = max(float(e.base.max()) for e in errors)
    for axis, which in zip(axes[0], versions, strict=True):
        for bits in layout.PRECISIONS:
            shown = [e for e in errors if getattr(e, which) is not None]
            values = torch.cat([getattr(e, which)[e.row_bits == bits] for e in shown]).numpy()
            if values.size:
                label = f"{_words(bits)}: {values.size:,} channels, median {np.median(values):.4f}"
                axis.hist(values, bins=80, range=(0, largest), color=_COLOURS[bits], alpha=0.75, label=label)
        axis.set_title("Packed base alone" if which == "base" else "With the initial adapter")
        axis.set_xlabel("squared error / energy of the channel")
        axis.legend(frameon=False, fontsize=9)
    axes[0, 0].set_ylabel("channels")
    return figure


def _first_block(packed: PackedFolder) -> list[tuple]:
    pairs = list(packed.targets.items())
    prefix = pairs[0][1].name.split(".0.")[0] + ".0."
    return [(name, target) for name, target in pairs if target.name.startswith(prefix)] or pairs[:1]


def _middle_layers(packed: PackedFolder) -> list[tuple]:
    """One layer of each kind (at most seven, as in the paper), from the middle of the model."""
    by_kind: dict[str, list] = {}
    for name, target in packed.targets.items():
        by_kind.setdefault(kind_of(target.name), []).append((name, target))
    return [members[len(members) // 2] for members in by_kind.values()][:7]


def _normalised(row: torch.Tensor, group_size: int) -> torch.Tensor:
    """Weights [K] over the absmax of their group."""
    padded = torch.nn.functional.pad(row, (0, -row.numel() % group_size)).view(-1, group_size)
    absmax = padded.abs().amax(dim=1, keepdim=True)
    return (padded / absmax.clamp(min=torch.finfo(torch.float32).tiny)).reshape(-1)[: row.numel()]


def _level_shares(row: torch.Tensor, content: PackedWeight, channel: int) -> tuple[np.ndarray, np.ndarray]:
    """The levels of one channel, and the share of its weights at each, from its dequantised weights [K]."""
    place = (layout.row_order(content.row_bits) == channel).nonzero()[0]
    (segment,) = (s for s in content.segments() if s.first <= int(place) < s.end)
    levels = content.levels[segment.levels_of(int(place), int(place) + 1)].float()
    scales = decode_scales(content.scales, content.scale_steps, place)[0].repeat_interleave(content.group_size)
    normal = row / scales[: row.numel()].clamp(min=torch.finfo(torch.float32).tiny)
    nearest = (normal[:, None] - levels[None]).abs().argmin(dim=1)
    shares = torch.bincount(nearest, minlength=levels.numel()).float() / row.numel()
    return levels.numpy(), shares.numpy()


def _words(bits: int) -> str:
    return f"{bits} bit" + ("s" if bits > 1 else "")


def _title(name: str) -> str:
    """A module in two lines: "self_attn.q_proj" above "block 3"."""
    block = block_of(name)
    return kind_of(name) + ("" if block < 0 else f"\nblock {block}")


def _unit(size: float) -> tuple[str, float]:
    return ("GiB", 2.0**30) if size > 4 * 2**30 else ("MiB", 2.0**20)
