"""The packed format of `csrc/lowra.h`, as arithmetic: sizes, offsets and the order of rows.

Terms: a row is one output channel of a weight [N, K]; rows are kept in packed order, sorted by precision (4, 2, 1
bits), stable within a precision. `rows_4bit` and `rows_2bit` count the first two classes, the others have 1 bit.
"""

from typing import NamedTuple

import numpy as np
import torch

PRECISIONS = (4, 2, 1)
ROW_ALIGNMENT = 16
SCALE_BLOCK = 256
FORMAT_VERSION = 1


def row_bytes(in_features: int, bits: int) -> int:
    """Bytes of one row's codes, padding included."""
    unpadded = (in_features * bits + 7) // 8
    return (unpadded + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT


def group_count(in_features: int, group_size: int) -> int:
    """Groups of one row; the last may be shorter."""
    return (in_features + group_size - 1) // group_size


class Segment(NamedTuple):
    """The rows of one precision, and where what they have begins.

    Attributes:
        bits: 4, 2 or 1.
        first, end: packed rows [first, end); none where the two are equal.
        row_bytes: of one row's codes, padding included.
        first_byte, first_level, first_threshold: of row `first`.
    """

    bits: int
    first: int
    end: int
    row_bytes: int
    first_byte: int
    first_level: int
    first_threshold: int

    def codes_of(self, start: int, stop: int) -> slice:
        """Bytes of the packed rows [start, stop), which lie in this segment."""
        return slice(
            self.first_byte + (start - self.first) * self.row_bytes,
            self.first_byte + (stop - self.first) * self.row_bytes,
        )

    def levels_of(self, start: int, stop: int) -> slice:
        """Entries of `levels` of these rows, 2^bits for each."""
        return slice(
            self.first_level + (start - self.first) * 2**self.bits,
            self.first_level + (stop - self.first) * 2**self.bits,
        )

    def thresholds_of(self, start: int, stop: int) -> slice:
        """Entries of `thresholds` of these rows, one fewer for each than levels."""
        cuts = 2**self.bits - 1
        return slice(
            self.first_threshold + (start - self.first) * cuts, self.first_threshold + (stop - self.first) * cuts
        )


def segments(rows: int, rows_4bit: int, rows_2bit: int, in_features: int) -> list[Segment]:
    """The three classes of a weight [rows, in_features] in packed order, empty ones too."""
    found, byte, level, threshold = [], 0, 0, 0
    ends = (rows_4bit, rows_4bit + rows_2bit, rows)
    for bits, first, end in zip(PRECISIONS, (0, *ends[:2]), ends, strict=True):
        segment = Segment(bits, first, end, row_bytes(in_features, bits), byte, level, threshold)
        found.append(segment)
        byte = segment.codes_of(first, end).stop
        level, threshold = segment.levels_of(first, end).stop, segment.thresholds_of(first, end).stop
    return found


def codes_size(rows: int, rows_4bit: int, rows_2bit: int, in_features: int) -> int:
    """Bytes of all codes of a weight."""
    counts = (rows_4bit, rows_2bit, rows - rows_4bit - rows_2bit)
    return sum(count * row_bytes(in_features, bits) for bits, count in zip(PRECISIONS, counts, strict=True))


def levels_size(rows: int, rows_4bit: int, rows_2bit: int) -> int:
    """Levels of all rows: 16, 4 or 2 each."""
    return 16 * rows_4bit + 4 * rows_2bit + 2 * (rows - rows_4bit - rows_2bit)


def thresholds_size(rows: int, rows_4bit: int, rows_2bit: int) -> int:
    """Thresholds of all rows: 15, 3 or 1 each."""
    return levels_size(rows, rows_4bit, rows_2bit) - rows


def scale_step_count(rows: int, in_features: int, group_size: int) -> int:
    """float32 steps of double-quantised scales."""
    return (rows * group_count(in_features, group_size) + SCALE_BLOCK - 1) // SCALE_BLOCK


def row_order(row_bits: torch.Tensor) -> torch.Tensor:
    """int32 [N]: the row of W that stands at each packed place, from `row_bits` uint8 [N] in the order of W."""
    if row_bits.device.type == "cpu":  # a radix sort in numpy; torch's takes eight times as long
        return torch.from_numpy(np.argsort(255 - row_bits.numpy(), kind="stable").astype(np.int32))
    return torch.argsort(row_bits.to(torch.int16), descending=True, stable=True).to(torch.int32)


class PackedMatrix(NamedTuple):
    """A packed weight [N, K] as the ops take it: their schemas have these values in this order.

    Attributes:
        codes: uint8 [bytes], packed order.
        row_order: int32 [N], packed row -> row of W.
        scales: float32, float16 or uint8 [N, groups], packed order.
        scale_steps: float32 [blocks] for uint8 scales, else None.
        levels: float16, packed order, 16, 4 or 2 for each row of 4, 2 or 1 bits.
        rows_4bit, rows_2bit: rows of these precisions; the rest have 1 bit.
        in_features: K.
        group_size: weights that share a scale.
    """

    codes: torch.Tensor
    row_order: torch.Tensor
    scales: torch.Tensor
    scale_steps: torch.Tensor | None
    levels: torch.Tensor
    rows_4bit: int
    rows_2bit: int
    in_features: int
    group_size: int

    @property
    def rows(self) -> int:
        return self.row_order.numel()

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        return self[:5]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self[5:]

    def with_tables(self, levels: torch.Tensor, scales: torch.Tensor) -> "PackedMatrix":
        """The same codes with other levels, and with scales of float32."""
        return self._replace(levels=levels, scales=scales, scale_steps=None)

    def segments(self) -> list[Segment]:
        return segments(self.rows, self.rows_4bit, self.rows_2bit, self.in_features)
