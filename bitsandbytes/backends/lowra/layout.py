"""The packed format of `csrc/lowra.h`, as arithmetic: sizes, offsets and the order of rows.

Terms: a row is one output channel of a weight [N, K]; rows are kept in packed order, sorted by precision (4, 2, 1
bits), stable within a precision. `rows_4bit` and `rows_2bit` count the first two classes, the others have 1 bit.
"""

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


def segments(rows: int, rows_4bit: int, rows_2bit: int) -> list[tuple[int, int, int]]:
    """The three classes as (bits, first row, row past the last), in packed order."""
    return [(4, 0, rows_4bit), (2, rows_4bit, rows_4bit + rows_2bit), (1, rows_4bit + rows_2bit, rows)]


def codes_size(rows: int, rows_4bit: int, rows_2bit: int, in_features: int) -> int:
    """Bytes of all codes of a weight."""
    classes = segments(rows, rows_4bit, rows_2bit)
    return sum((end - start) * row_bytes(in_features, bits) for bits, start, end in classes)


def levels_size(rows: int, rows_4bit: int, rows_2bit: int) -> int:
    """Levels of all rows: 16, 4 or 2 each."""
    return sum((end - start) * 2**bits for bits, start, end in segments(rows, rows_4bit, rows_2bit))


def thresholds_size(rows: int, rows_4bit: int, rows_2bit: int) -> int:
    """Thresholds of all rows: 15, 3 or 1 each."""
    return sum((end - start) * (2**bits - 1) for bits, start, end in segments(rows, rows_4bit, rows_2bit))


def scale_step_count(rows: int, in_features: int, group_size: int) -> int:
    """float32 steps of double-quantised scales."""
    return (rows * group_count(in_features, group_size) + SCALE_BLOCK - 1) // SCALE_BLOCK


def row_order(row_bits: torch.Tensor) -> torch.Tensor:
    """int32 [N]: the row of W that stands at each packed place, from `row_bits` uint8 [N] in the order of W."""
    if row_bits.device.type == "cpu":  # a radix sort in numpy; torch's takes eight times as long
        return torch.from_numpy(np.argsort(255 - row_bits.numpy(), kind="stable").astype(np.int32))
    return torch.argsort(row_bits.to(torch.int16), descending=True, stable=True).to(torch.int32)
