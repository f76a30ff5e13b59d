"""The linear layers of a block as decoding calls them: those of one x together, with the LoRA adapters on them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from bitsandbytes.backends.lowra import decoding
from bitsandbytes.backends.lowra.decoding import Norm

from ..nn.linear import LowRALinear
from ..nn.tabled_linear import TabledLinear


class Unsupported(Exception):
    """A model that Transformers has to run by itself; the message says why."""


@dataclasses.dataclass
class Adapter:
    """One LoRA on one weight: y += scaling * B A x.

    Attributes:
        source: the parameters A [r, K] and B [N, r].
        scaling: alpha / r, or what the adapter has in its place.
        rows: bool [batch], the sequences of a mixed batch that it is for; None for all.
        name: by which sequences of a mixed batch go through it; None for all.
        factors: A and B in the type of x once `Projections.make_room` was called, unless they lie side by side with
            others; until then the parameters.
    """

    source: tuple[torch.Tensor, torch.Tensor]
    scaling: float
    rows: torch.Tensor | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        self.factors = self.source


class Projections:
    """Linear layers that see the same x, with the adapters on them; packed ones are multiplied in one launch."""

    def __init__(
        self,
        parent: Any,
        names: tuple[str, ...],
        dtype: torch.dtype,
        rows: Mapping[str, torch.Tensor] | None,
        exact: bool = False,
    ):
        """
        Args:
            parent, names: the module that has the layers, and their names in it.
            dtype: of x.
            rows: of a mixed batch, which sequences (bool [batch]) go through which adapter; None where the active
                ones are for all.
            exact: see `decoding.Group`.

        Raises:
            Unsupported: an adapter method or a layer that this path does not know.
        """
        self._dtype = dtype
        modules: list[nn.Module] = [module for name in names if (module := getattr(parent, name, None)) is not None]
        if len(modules) < len(names):
            raise Unsupported(f"{type(parent).__name__} has no layers {', '.join(names)}")
        self._bases: list[Any] = [_base_of(module) for module in modules]
        self._adapters = [list(_adapters_of(module, rows)) for module in modules]
        packed = [(base.matrix(), base.bias_as(dtype)) for base in self._bases if type(base) is LowRALinear]
        self._packed = decoding.Group(packed if len(packed) == len(self._bases) else [], exact)
        # Where adapters go into the products: how. None where there is none, or another way has to be taken.
        self._in_product: decoding.Adapters | None = None
        self._side_by_side: _SideBySide | None = None

    def widths(self) -> list[int]:
        """Outputs of each layer."""
        return [int(base.out_features) for base in self._bases]

    def after_norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, norm: Norm, delta_norm: Norm | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Outputs for the normalised sum of both, and the sum: see `decoding.normed_linear_group`."""
        if self._in_one(len(residual)):
            return decoding.normed_linear_group(residual, delta, norm, self._packed, delta_norm, self._in_product)
        return self(decoding.add_norm(residual, delta, norm, delta_norm)), residual

    def after_gate(self, opened: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        """Output of the one layer for activation(opened) * up."""
        if self._in_one(len(opened)):
            return decoding.gated_linear(opened, up, activation, self._packed, self._in_product)
        return self(decoding.gate(opened, up, activation))[0]

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [tokens, K] to an output [tokens, N] of each layer."""
        if self._in_one(len(x)):
            return decoding.linear_group(x, self._packed, self._in_product)
        outs = decoding.linear_group(x, self._packed) if self._packed else [base(x) for base in self._bases]
        if self._side_by_side is not None:
            self._side_by_side.add_to(outs, x)
            return outs
        for out, adapters in zip(outs, self._adapters, strict=True):
            for adapter in adapters:
                a, b = adapter.factors
                out.addmm_(x @ a.T, b.T, alpha=adapter.scaling)
        return outs

    def _in_one(self, tokens: int) -> bool:
        if not self._packed or self._in_product is None:
            return bool(self._packed) and not any(self._adapters)
        gains = self._in_product.gains
        return gains is None or gains.factors.shape[1] == tokens  # a step; a prompt has more tokens than sequences

    def _has_several(self) -> bool:
        """Whether sequences or weights go through more than one adapter."""
        return any(len(own) > 1 for own in self._adapters) or any(own.rows is not None for own in self.adapters())

    def cells(self) -> int:
        """Cells that the adapters need to go into the products; 0 where they do not."""
        if not self._packed or not any(self._adapters):
            return 0
        matrix, _ = self._packed[0]
        return decoding.cells_of(matrix.in_features, sum(len(adapter.source[0]) for adapter in self.adapters()))

    def make_room(self, known: "KnownShares", for_others: bool) -> None:
        """Factors get memory of their own where they have another type than x or are several; it holds nothing yet.

        Args:
            known: of the decoder.
            for_others: they get it in any case, so that other adapters may take their place.
        """
        if self._has_several():
            if self._side_by_side is None:
                self._side_by_side = _SideBySide(self._adapters, self._dtype, known)
            return
        for adapter in self.adapters():
            other_type = any(part.dtype != self._dtype for part in adapter.source)
            if adapter.factors is adapter.source and (for_others or other_type):
                a, b = (torch.empty_like(part, dtype=self._dtype) for part in adapter.source)
                adapter.factors = a, b

    def has_room(self) -> bool:
        """Whether adapters like these can take their place, where captured calls look."""
        return self._side_by_side is not None or all(own.factors is not own.source for own in self.adapters())

    def take(self, others: "Projections") -> None:
        """Goes through adapters of the same `state`, from the next `refresh` on."""
        for own, other in zip(self.adapters(), others.adapters(), strict=True):
            own.source = other.source

    def refresh(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Copies factors that lie side by side, and says what else is to be copied where."""
        if self._side_by_side is not None:
            yield from self._side_by_side.refresh()
            return
        for adapter in self.adapters():
            if adapter.factors is not adapter.source:
                yield from zip(adapter.factors, adapter.source, strict=True)

    def into_products(self, cells: torch.Tensor, launches: torch.Tensor, launch: int) -> None:
        """Adapters go into the products from now on, by their present factors; see `decoding.Adapters`."""
        if self._side_by_side is not None:
            terms, gains = self._side_by_side.terms, self._side_by_side.gains
        else:
            terms = [decoding.LowRank(*own[0].factors, own[0].scaling) if own else None for own in self._adapters]
            gains = None
        self._in_product = decoding.Adapters(terms, cells, launches, launch, gains)

    def adapters(self) -> Iterator[Adapter]:
        for adapters in self._adapters:
            yield from adapters

    def state(self) -> Iterator[int | float | str | None]:
        """Addresses and numbers that a captured call has fixed, but for those of `sources`."""
        for matrix, bias in self._packed:
            yield from (part.data_ptr() if isinstance(part, torch.Tensor) else part for part in (*matrix, bias))
        if not self._packed:
            yield from (parameter.data_ptr() for base in self._bases for parameter in base.parameters())
            tables = (base.current_tables() for base in self._bases if type(base) is LowRALinear)
            yield from (table.data_ptr() for own in tables for table in own.values())
        for number, own in enumerate(self._adapters):
            for adapter in own:
                yield from (number, len(adapter.source[0]), adapter.scaling, adapter.name)

    def sources(self) -> Iterator[int]:
        """Where the factors of adapters are taken from."""
        for adapter in self.adapters():
            yield from (factor.data_ptr() for factor in adapter.source)


class _Shares:
    """Which of the ranks of adapters that lie side by side are a sequence's own.

    Attributes:
        of_steps: see there. There is room for any of the adapters at any sequence.
        of_prompts: [batch or 1, 1, ranks], of the type of x; None where all are 0 or 1.
        others: bool, likewise: what is another sequence's, and so may be anything.
    """

    def __init__(self, adapters: list[list[Adapter]], alike: bool, dtype: torch.dtype):
        """alike: scalings of all adapters are the same, and left out."""
        self._ranks = [sum(len(adapter.source[0]) for adapter in own) for own in adapters]
        self._adapters = [adapter for own in adapters for adapter in own]
        self._alike, self._dtype = alike, dtype
        self.of_steps, self.of_prompts, self.others = self._made()

    def _made(self) -> tuple[decoding.Gains, torch.Tensor | None, torch.Tensor]:
        """Waits for the device."""
        device = self._adapters[0].source[0].device
        all_sequences = torch.ones(1, dtype=torch.bool, device=device)
        rows = [all_sequences if adapter.rows is None else adapter.rows for adapter in self._adapters]
        everyone = torch.eye(len(rows), dtype=torch.bool, device=device)  # as many sequences, each with its own
        if all(adapter.rows is None for adapter in self._adapters):
            everyone = everyone[:, :0]
        scalings = [1.0 if self._alike else adapter.scaling for adapter in self._adapters]
        gains = torch.tensor(scalings, dtype=torch.float32, device=device)  # whatever type is PyTorch's default
        each = torch.cat([torch.stack(rows), everyone], dim=1) * gains[:, None]
        ranks = torch.tensor([len(adapter.source[0]) for adapter in self._adapters], device=device)
        by_rank = each.repeat_interleave(ranks, dim=0)
        batch = len(rows[0])
        of_prompts = by_rank[:, :batch].T[:, None].to(self._dtype)
        of_steps = decoding.Gains.of(by_rank, self._ranks).of_first(batch)
        return of_steps, None if self._alike else of_prompts, of_prompts == 0

    def renew(self) -> None:
        """After the sequences of adapters have changed: in place, where captured steps look."""
        of_steps, of_prompts, others = self._made()
        self.of_steps.factors.copy_(of_steps.factors)
        self.of_steps.fours.copy_(of_steps.fours)
        self.others.copy_(others)
        if self.of_prompts is not None and of_prompts is not None:
            self.of_prompts.copy_(of_prompts)


# By the ranks, scalings and sequences of adapters: those of all layers of a decoder are a few.
KnownShares = dict[tuple, _Shares]


class _SideBySide:
    """All adapters of the layers: one product with all A, and one with the B of each layer.

    A mixed batch computes A x of every sequence with every adapter, which costs little beside the launches of a product
    for each adapter, and what is not a sequence's own counts 0.

    Attributes:
        terms: of each layer, all its adapters as one; None for none.
        gains: of steps, where some ranks are not for all sequences or scalings differ; else None.
    """

    def __init__(self, adapters: list[list[Adapter]], dtype: torch.dtype, known: KnownShares):
        """
        Args:
            adapters: of each layer.
            dtype: of x.
            known: what was made for other layers, to which what is made here is added.
        """
        everyone = [adapter for own in adapters for adapter in own]
        (first, _), ranks = everyone[0].source, [len(adapter.source[0]) for adapter in everyone]
        alike = len({adapter.scaling for adapter in everyone}) == 1
        self._adapters = adapters
        self._a = first.new_empty(sum(ranks), first.shape[1], dtype=dtype)
        self._columns: list[slice] = []
        self.terms: list[decoding.LowRank | None] = []
        begin = 0
        for own in adapters:
            end = begin + sum(len(adapter.source[0]) for adapter in own)
            term = None
            if own:
                b = own[0].source[1].new_empty(len(own[0].source[1]), end - begin, dtype=dtype)
                term = decoding.LowRank(self._a[begin:end], b, everyone[0].scaling if alike else 1.0)
            self.terms.append(term)
            self._columns.append(slice(begin, end))
            begin = end
        self._parts_of_a = self._a.split(ranks)
        self._shares: _Shares | None = None
        if not alike or any(adapter.rows is not None for adapter in everyone):
            key = tuple(tuple((len(one.source[0]), one.scaling, id(one.rows)) for one in own) for own in adapters)
            if key not in known:
                known[key] = _Shares(adapters, alike, dtype)
            self._shares = known[key]
        self.gains = None if self._shares is None else self._shares.of_steps

    def refresh(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Copies B, row by row beside those of others, at once for a layer; yields what of A is to be copied where."""
        for own, term in zip(self._adapters, self.terms, strict=True):
            if term is not None:
                torch.cat([adapter.source[1] for adapter in own], dim=1, out=term.b)
        everyone = (adapter for own in self._adapters for adapter in own)
        yield from zip(self._parts_of_a, (adapter.source[0] for adapter in everyone), strict=True)

    def add_to(self, outs: list[torch.Tensor], x: torch.Tensor) -> None:
        """Adds the adapters' terms for x [batch * tokens, K] to outputs [batch * tokens, N] of the layers."""
        inner = x @ self._a.T
        if self._shares is not None:
            by_sequence = inner.view(len(self._shares.others), -1, len(self._a))
            if self._shares.of_prompts is not None:
                by_sequence.mul_(self._shares.of_prompts)
            by_sequence.masked_fill_(self._shares.others, 0)
        for out, columns, term in zip(outs, self._columns, self.terms, strict=True):
            if term is not None:
                out.addmm_(inner[:, columns], term.b.T, alpha=term.scaling)


def is_packed(layer: nn.Module) -> TypeGuard[LowRALinear]:
    """Whether the kernels take a layer's weight as it is; PEFT's k-bit preparation widens the levels."""
    return type(layer) is LowRALinear and layer.levels.dtype == torch.float16


def _base_of(module: nn.Module) -> nn.Module:
    base: Any = module.base_layer if isinstance(module, BaseTunerLayer) else module
    if is_packed(base) or type(base) is nn.Linear:
        return base
    if isinstance(base, TabledLinear):
        raise Unsupported("its levels and scales are being trained: bake_tables(model) ends that")
    if type(base) is LowRALinear:
        raise Unsupported("prepare_model_for_kbit_training has widened its levels: take lowra.prepare_for_training")
    raise Unsupported(f"it has layers of the kind {type(base).__name__}")


def _adapters_of(module: nn.Module, rows: Mapping[str, torch.Tensor] | None) -> Iterator[Adapter]:
    if not isinstance(module, BaseTunerLayer):
        return
    if not isinstance(module, LoraLayer):
        raise Unsupported(f"{type(module).__name__} is no LoRA")
    if rows is not None and (module.merged or getattr(module.base_layer, "adapter_tables", None) is not None):
        raise Unsupported("adapters of a mixed batch are merged, or have levels and scales of their own")
    if module.disable_adapters or module.merged:
        return
    for name in module.active_adapters if rows is None else rows:
        if name not in module.lora_A:
            continue
        a, b = module.lora_A[name], module.lora_B[name]
        dropout, scaling = module.lora_dropout[name], module.scaling[name]
        plain = all(type(part) is nn.Linear and part.bias is None for part in (a, b))
        known = type(dropout) in (nn.Identity, nn.Dropout) and isinstance(scaling, int | float)
        if name in module.lora_variant or not plain or not known:
            raise Unsupported(f"adapter {name!r} is more than a plain LoRA")
        own = (None, None) if rows is None else (rows[name], name)
        yield Adapter((a.weight.detach(), b.weight.detach()), scaling, *own)
