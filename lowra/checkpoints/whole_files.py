"""Digests of whole weight files, by which a load sees that every tensor in them is what was written.

A load has little time: mapped tensors are not read by it at all, and whatever asks for Python's lock a thousand times,
as a digest of each tensor does, waits a thousand times for Transformers. A file is hashed by a few long calls without
the lock. Only files that differ are looked through tensor by tensor, for the name of what has changed.
"""

import concurrent.futures
import os
import pathlib

import numpy as np
import xxhash

from ..weights.digests import joined
from .reading import StoredTensor

_PART_BYTES = 128 << 20  # one call of the hash
_THREADS = min(4, os.cpu_count() or 1)
# of a number that is no number or infinite all bits of the exponent are set
_EXPONENTS = {"F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}


def mapped(path: pathlib.Path) -> np.ndarray:
    """uint8 [bytes] of a file, which is read where it is looked at.

    As a plain array: a slice of a memmap costs ten times as much.
    """
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


def digests_of_files(files: list[pathlib.Path]) -> dict[str, str]:
    """A digest of each file by its name: of the digests of its parts of 128 MiB, and its length."""
    contents = [mapped(path) for path in files]
    parts = [content[start : start + _PART_BYTES] for content in contents for start in _starts(content)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda part: xxhash.xxh3_128_hexdigest(part.data), parts)
        return {
            path.name: joined([str(len(content)), *(next(found) for _ in _starts(content))])
            for path, content in zip(files, contents, strict=True)
        }


def not_finite(places: list[StoredTensor]) -> list[str]:
    """The names of tensors among these that hold NaN or infinite values; those of 16-bit and 32-bit floats are read."""
    contents = {path: mapped(path) for path in {place.path for place in places}}
    found = []
    for place in places:
        if place.stored_as in _EXPONENTS and place.stop > place.start:
            kind, exponent = _EXPONENTS[place.stored_as]
            numbers = contents[place.path][place.start : place.stop].view(kind)
            if ((numbers & exponent) == exponent).any():
                found.append(place.key)
    return found


def tables_among(places: list[StoredTensor], leaves: tuple[str, ...]) -> list[StoredTensor]:
    """The tables of packed weights among the tensors of a checkpoint."""
    packed = {place.key.removesuffix("row_bits") for place in places if place.key.endswith(".row_bits")}
    return [p for p in places if p.key.rpartition(".")[2] in leaves and f"{p.key.rpartition('.')[0]}." in packed]


def _starts(content: np.ndarray) -> range:
    return range(0, len(content), _PART_BYTES)
