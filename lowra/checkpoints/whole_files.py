"""Digests of whole weight files, by which a load sees that every tensor in them is what was written.

A load has little time: mapped tensors are not read by it at all, and whatever asks for Python's lock a thousand times,
as a digest of each tensor does, waits a thousand times for Transformers. A file is hashed by a few long calls without
the lock. Only files that differ are looked through tensor by tensor, for the name of what has changed.
"""

import concurrent.futures
import os
import pathlib
from collections.abc import Iterable

import numpy as np
import xxhash

from ..weights.digests import joined
from .reading import StoredTensor, stored_tensors

_PART_BYTES = 128 << 20  # one call of the hash
_THREADS = min(4, os.cpu_count() or 1)
# of a number that is no number or infinite all bits of the exponent are set
_EXPONENTS = {"F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}


class OpenFiles:
    """Weight files as they are now: whatever their names stand for later, these are the bytes that a load maps as well.

    Attributes:
        contents: uint8 [bytes] of each file by its path, read where it is looked at.
        places: of every tensor.
    """

    def __init__(self, files: Iterable[pathlib.Path]):
        """
        Raises:
            ValueError: a file is cut short or damaged.
        """
        files = list(files)
        self.places = [place for path in files for place in stored_tensors(path)]
        # not read into memory of our own, which takes twice as long as hashing; and as plain arrays, of which a slice
        # costs a tenth of that of a memmap
        self.contents = {path: np.asarray(np.memmap(path, np.uint8, mode="r")) for path in files}

    def bytes_of(self, place: StoredTensor) -> np.ndarray:
        """uint8 [bytes] of a tensor."""
        return self.contents[place.path][place.start : place.stop]

    def digests(self) -> dict[str, str]:
        """A digest of each file by its name: of the digests of its parts of 128 MiB, and its length."""
        whole = self.contents.values()
        parts = [content[start : start + _PART_BYTES] for content in whole for start in _starts(content)]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            found = threads.map(lambda part: xxhash.xxh3_128_hexdigest(part.data), parts)
            return {
                path.name: joined([str(len(content)), *(next(found) for _ in _starts(content))])
                for path, content in self.contents.items()
            }

    def not_finite_tables(self, leaves: tuple[str, ...]) -> list[str]:
        """The names of tables of packed weights that hold NaN or infinite values; 16-bit and 32-bit floats are read."""
        packed = {place.key.removesuffix("row_bits") for place in self.places if place.key.endswith(".row_bits")}
        found = []
        for place in self.places:
            module, _, leaf = place.key.rpartition(".")
            if leaf not in leaves or f"{module}." not in packed:
                continue
            if place.stored_as in _EXPONENTS and place.stop > place.start:
                kind, exponent = _EXPONENTS[place.stored_as]
                if ((self.bytes_of(place).view(kind) & exponent) == exponent).any():
                    found.append(place.key)
        return found


def _starts(content: np.ndarray) -> range:
    return range(0, len(content), _PART_BYTES)
