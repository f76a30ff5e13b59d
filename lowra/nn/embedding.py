"""Packed token embeddings: the rows that are looked up are decoded, the others stay packed."""

import torch
from torch import nn

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.reference import decode_scales

from ..weights.groups import widen
from .linear import PackedModule

_SLICE_WEIGHTS = 1 << 22


class LowRAEmbedding(PackedModule, nn.Embedding):
    """The table [V, K] of an `nn.Embedding`, packed; its rows are the output channels.

    An output head that is tied to it is a `LowRALinear` that holds the same parameters.

    Attributes:
        scale, round_scale: see below.
        dense_form: the module that this one took the place of, on "meta", to go back to; in a list, so that it is no
            submodule.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        packed: dict[str, torch.Tensor],
        compute_dtype: torch.dtype,
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
        self._row_places: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def count_rows(self, row_bits: torch.Tensor) -> None:
        super().count_rows(row_bits)
        (order,) = self._row_order.values()  # on the CPU
        place = torch.empty(self.out_features, dtype=torch.int64)
        place[order.long()] = torch.arange(self.out_features)
        codes, levels = torch.empty_like(place), torch.empty_like(place)
        for segment in layout.segments(self.out_features, *self._rows, self.in_features):
            rows, within = order[segment.first : segment.end].long(), torch.arange(segment.end - segment.first)
            codes[rows] = segment.first_byte + within * segment.row_bytes
            levels[rows] = segment.first_level + within * 2**segment.bits
        self._row_places = {place.device: (place, codes, levels)}

    def row_order(self) -> torch.Tensor:
        order = super().row_order()
        device = self.weight.device
        if device not in self._row_places:
            kept = next(iter(self._row_places.values()))
            self._row_places[device] = tuple(tensor.to(device) for tensor in kept)
        return order

    def _apply(self, fn, recurse=True):
        self._row_places = {device: kept for device, kept in self._row_places.items() if device.type == "cpu"}
        return super()._apply(fn, recurse)

    def rows(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense rows [T, K] of a flat list of indices [T]; equal to `dequantize(dtype)[indices]`."""
        count = max(1, _SLICE_WEIGHTS // self.in_features)
        return torch.cat([self._decode(part, dtype) for part in indices.split(count)])

    def _decode(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        packed = self.matrix()
        place, code_start, level_start = (kept[indices, None] for kept in self._row_places[self.weight.device])
        bits = self.row_bits[indices, None].int()
        first_bit = torch.arange(self.in_features, dtype=torch.int32, device=indices.device) * bits
        codes = packed.codes[code_start + (first_bit >> 3)].int() >> (first_bit & 7) & ((1 << bits) - 1)
        scale = decode_scales(packed.scales, packed.scale_steps, place[:, 0])
        wide = widen(scale, self.group_size, self.in_features)
        return (packed.levels[level_start + codes].float() * wide).to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype
        rows = self.rows(input.reshape(-1).long(), dtype).view(*input.shape, self.in_features)
        if self.scale == 1.0:
            return rows
        return rows * (torch.tensor(self.scale, dtype=dtype).item() if self.round_scale else self.scale)

    def extra_repr(self) -> str:
        rows = "" if self._rows is None else f", rows of 4/2/1 bits={self._row_counts()}"
        return f"{self.num_embeddings}, {self.embedding_dim}, packed{rows}"
