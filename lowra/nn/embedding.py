"""Packed token embeddings: the rows that are looked up are decoded, the others stay packed."""

import contextlib
from typing import Any

import torch
from torch import nn

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.reference import decode_scales

from ..weights.groups import widen
from .packed_module import PackedModule
from .row_layout import RowLayout

_SLICE_WEIGHTS = 1 << 22


class LowRAEmbedding(PackedModule, nn.Embedding):
    """The table [V, K] of an `nn.Embedding`, packed; its rows are the output channels.

    An output head that is tied to it is a `LowRALinear` that holds the same parameters.

    Attributes:
        scale, round_scale: see below.
        dense_form: the module that this one took the place of, on "meta", to go back to; in a list, so that it is no
            submodule.
    """

    _layout: Any  # a TableLayout, once it is made

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        packed: dict[str, torch.Tensor],
        compute_dtype: torch.dtype,
        *,
        padding_idx: int | None = None,
        scale: float = 1.0,
        round_scale: bool = False,
    ):
        """
        Args:
            in_features, out_features: K and V.
            group_size, packed: see `PackedModule`.
            compute_dtype: of what comes out; follows `model.to(dtype)`.
            padding_idx: kept for whoever asks.
            scale: the model multiplies all embeddings with it (BART, Gemma 3).
            round_scale: round `scale` to the dtype first, as Gemma 3 does.
        """
        super().__init__(in_features, out_features, group_size, packed, None, compute_dtype)
        self.num_embeddings, self.embedding_dim = out_features, in_features
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.scale = scale
        self.round_scale = round_scale
        self.dense_form: list[nn.Embedding] = []

    def layout_of(self, row_bits: torch.Tensor) -> "TableLayout":
        return TableLayout(row_bits, self.in_features)

    def rows(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense rows [T, K] of a flat list of indices [T]; equal to `dequantize(dtype)[indices]`.

        Raises:
            IndexError, RuntimeError: as `nn.Embedding`, for indices outside the table (on a GPU its assertion) and for
                others than int64 and int32.
        """
        packed = self.matrix()
        _, places = self._layout.on(self.weight.device)
        kind = indices.device.type
        # Autocast of CPUs refuses to join float16, and "meta" has none.
        with contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            return rows_of_table(packed, places, indices, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(input, torch.Tensor):
            raise TypeError(f"embedding(): argument 'indices' must be Tensor, not {type(input).__name__}")
        dtype = self.compute_dtype
        rows = self.rows(input.reshape(-1), dtype).view(*input.shape, self.in_features)
        if self.scale == 1.0:
            return rows
        return rows * (torch.tensor(self.scale, dtype=dtype).item() if self.round_scale else self.scale)

    def extra_repr(self) -> str:
        rows = "" if self._layout is None else f", rows of 4/2/1 bits={self._row_counts(self._layout)}"
        return f"{self.num_embeddings}, {self.embedding_dim}, packed{rows}"


def rows_of_table(
    packed: PackedMatrix, places: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Dense rows [T, K] of a packed table, for indices [T] and the places of a `TableLayout`."""
    count = max(1, _SLICE_WEIGHTS // packed.in_features)
    return torch.cat([_decode(packed, places, part, dtype) for part in indices.split(count)])


def _decode(packed: PackedMatrix, places: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # the lookup of nn.Embedding, which checks the indices; all others begin at what comes out
    place, code_start, level_start, bits = torch.embedding(places, indices).split(1, dim=1)
    bits = bits.int()
    first_bit = torch.arange(packed.in_features, dtype=torch.int32, device=indices.device) * bits
    codes = packed.codes[code_start + (first_bit >> 3)].int() >> (first_bit & 7) & ((1 << bits) - 1)
    scale = decode_scales(packed.scales, packed.scale_steps, place[:, 0])
    wide = widen(scale, packed.group_size, packed.in_features)
    return (packed.levels[level_start + codes].float() * wide).to(dtype)


class TableLayout(RowLayout):
    """Beside the row order int64 [V, 4]: place among the packed rows, first byte, first level and bits of each row."""

    def __init__(self, bits: torch.Tensor, in_features: int):
        self._in_features = in_features
        super().__init__(bits)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        (order,) = super()._tensors()
        places = torch.empty(len(order), 4, dtype=torch.int64)
        for segment in layout.segments(len(order), *self.counts, self._in_features):
            place = torch.arange(segment.first, segment.end)
            within = place - segment.first
            first_byte = segment.first_byte + within * segment.row_bytes
            first_level = segment.first_level + within * 2**segment.bits
            bits = torch.full_like(place, segment.bits)
            places[order[segment.first : segment.end].long()] = torch.stack([place, first_byte, first_level, bits], 1)
        return order, places
