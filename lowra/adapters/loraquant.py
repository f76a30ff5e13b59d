"""LoraQuant, and the two baselines that are its parts: BIN and RTN (LoraQuant, Sections 3.1 to 3.3 and Table 1)."""

import dataclasses
from collections import defaultdict

import torch
from tqdm import tqdm

from .codes import RoundToNearest, Sign
from .decompose import explained_count, importance_order, svd_components
from .formats import LayerLayout, SplitCodes
from .source import LoraAdapter, LoraFactors
from .storage import PackedAdapter, pack
from .straight_through import Quantizer, refine

SPLITS = ("svd", "norm", "random")


@dataclasses.dataclass(frozen=True)
class LoraQuantSettings:
    """Settings of LoraQuant; the defaults are the paper's 2@0.9.

    Raises ValueError for a setting out of range.
    """

    bits: int = 2  # k, of the important part
    ratio: float = 0.9  # rho, share of the squared singular values that the important part holds
    split: str = "svd"  # how components are made and ranked
    refine: bool = True  # straight-through refinement of both parts
    binary: bool = True  # keep the other part, at one bit
    static_h: int | None = None  # this many important components in every layer, in place of the ratio

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; expected above 0 and at most 1, such as 0.9.")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; expected one of {', '.join(SPLITS)}.")
        if self.static_h is not None and self.static_h < 0:
            raise ValueError(f"static h is {self.static_h}; expected a number of components, 0 or more.")
        if self.split != "svd" and self.static_h is None:
            raise ValueError(
                f"split {self.split!r} needs a static h: the ratio is defined on singular values, which only the svd "
                "split has. Give --static-h, such as 4."
            )
        if not self.binary and self.static_h == 0:
            raise ValueError("static h 0 without the 1-bit part leaves nothing to store; give another h.")

    @property
    def description(self) -> str:
        chosen = f"h={self.static_h}" if self.static_h is not None else f"{self.ratio:g}"
        words = [f"loraquant {self.bits}@{chosen}"]
        words += [f"{self.split} split"] if self.split != "svd" else []
        words += ["not refined"] if not self.refine else []
        words += ["without 1-bit part"] if not self.binary else []
        return ", ".join(words)


def check_bits(bits: int) -> None:
    """Raises ValueError unless round-to-nearest codes of this width can be packed."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 1 to 8 (the papers use 2 and 3).")


@dataclasses.dataclass
class _Components:
    """One layer on its way: rows of b [c, m] and a [c, n], of which the first h are important."""

    factors: LoraFactors
    b: torch.Tensor
    a: torch.Tensor
    important: int


def _decompose(layers: list[LoraFactors], settings: LoraQuantSettings, device: str) -> list[_Components]:
    """Components of every layer, most important first; layers of one shape share the SVD calls."""
    if settings.split != "svd":
        generator = torch.Generator().manual_seed(0)
        most = settings.static_h or 0  # the settings demand one where the split is not by singular values
        result = []
        for layer in layers:
            order = importance_order(layer.b.mT, layer.a, settings.split, generator)
            important = min(most, len(order))
            b, a = layer.b.mT[order].to(device), layer.a[order].to(device)
            result.append(_Components(layer, b, a, important))
        return result
    by_shape = defaultdict(list)
    for layer in layers:
        by_shape[(layer.b.shape, layer.a.shape)].append(layer)
    found = {}
    for group in by_shape.values():
        b, a = torch.stack([x.b for x in group]).to(device), torch.stack([x.a for x in group]).to(device)
        b, a, singular = svd_components(b, a)
        for index, layer in enumerate(group):
            if settings.static_h is None:
                important = explained_count(singular[index], settings.ratio)
            else:
                important = min(settings.static_h, singular.shape[1])
            found[layer.name] = _Components(layer, b[index], a[index], important)
    return [found[layer.name] for layer in layers]


def _refine_all(components: list[_Components], bits: int, progress: bool) -> None:
    """Refines in place, all components of one shape and one quantiser in one batch."""
    batches: dict[tuple[Quantizer, int, int], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for layer in components:
        h, m, n = layer.important, layer.b.shape[1], layer.a.shape[1]
        batches[RoundToNearest(bits), m, n].append((layer.b[:h], layer.a[:h]))
        batches[Sign(), m, n].append((layer.b[h:], layer.a[h:]))
    total = sum(len(layer.b) for layer in components)
    with tqdm(total=total, desc="refine", unit="component", disable=not progress) as bar:
        for (quantizer, _, _), views in batches.items():
            b, a = (torch.cat(side) for side in zip(*views, strict=True))
            counts = [len(view) for view, _ in views]
            refined_b, refined_a = refine(b, a, quantizer, bar.update)
            sides = zip(views, refined_b.split(counts), refined_a.split(counts), strict=True)
            for (view_b, view_a), new_b, new_a in sides:
                view_b.copy_(new_b)
                view_a.copy_(new_a)


def encode(
    factors: LoraFactors, b: torch.Tensor, a: torch.Tensor, important: int, bits: int
) -> tuple[LayerLayout, SplitCodes]:
    """Split codes of component rows b [c, m] and a [c, n], the first `important` of them at `bits` bits."""
    near, sign = RoundToNearest(bits), Sign()
    codes = SplitCodes(
        near.quantize(b[:important]),
        near.quantize(a[:important]),
        sign.quantize(b[important:]),
        sign.quantize(a[important:]),
    )
    return layout(factors, len(b), important), codes


def layout(factors: LoraFactors, stored: int, important: int) -> LayerLayout:
    """Layout of a layer that keeps `stored` components."""
    (m, rank), n = factors.b.shape, factors.a.shape[1]
    return LayerLayout(factors.name, "embedding" in factors.suffixes[0], m, n, rank, stored, important)


def simulate_loraquant(
    adapter: LoraAdapter, settings: LoraQuantSettings, progress: bool = False, device: str = "cpu"
) -> list[tuple[LayerLayout, SplitCodes]]:
    """Quantises all layers without packing: codes whose `rows()` are the simulated factors.

    Args:
        progress: show a progress bar over the components being refined.
        device: "cpu" or "cuda", where components are made and refined; codes are made on the processor.
    """
    components = _decompose(adapter.layers, settings, device)
    if not settings.binary:
        for layer in components:
            layer.b, layer.a = layer.b[: layer.important], layer.a[: layer.important]
    if settings.refine:
        _refine_all(components, settings.bits, progress)
    return [encode(layer.factors, layer.b.cpu(), layer.a.cpu(), layer.important, settings.bits) for layer in components]


def quantize_loraquant(
    adapter: LoraAdapter, settings: LoraQuantSettings, progress: bool = False, device: str = "cpu"
) -> PackedAdapter:
    """Quantises and packs an adapter by LoraQuant; arguments as in `simulate_loraquant`."""
    coded = simulate_loraquant(adapter, settings, progress, device)
    return pack(adapter, settings.description, "split", settings.bits, coded)


def quantize_bin(adapter: LoraAdapter) -> PackedAdapter:
    """BIN: sign codes for every number of the factors as trained, in groups along columns of B and rows of A."""
    coded = [encode(layer, layer.b.mT, layer.a, 0, 1) for layer in adapter.layers]
    return pack(adapter, "bin", "split", 1, coded)


def quantize_rtn(adapter: LoraAdapter, bits: int) -> PackedAdapter:
    """RTN: round-to-nearest codes for every number of the factors as trained."""
    check_bits(bits)
    coded = [encode(layer, layer.b.mT, layer.a, len(layer.a), bits) for layer in adapter.layers]
    return pack(adapter, f"rtn {bits}", "split", bits, coded)
