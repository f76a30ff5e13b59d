"""The packed tensors of a checkpoint: where they lie in its files, and reading all of them at once.

Transformers spends about a fifth of a millisecond on every tensor that it loads, and a packed layer has five, most of
them small. Where the whole model goes to one device they are read here instead: on the CPU mapped from the file, as
Transformers does it; for a GPU by a few threads, each filling page-locked memory while the others' is being copied.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import queue

import torch
from safetensors import SafetensorError, safe_open

from ..quantize import TENSOR_NAMES
from ..targets import Target

_DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
_REQUIRED = {"weight", "row_bits", "scales", "levels"}
_CHUNK_BYTES = 8 << 20
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor in a file.

    Attributes:
        path, key: the file, and the tensor's name in it.
        dtype, shape: of the tensor.
        start, stop: its bytes in the file.
    """

    path: pathlib.Path
    key: str
    dtype: torch.dtype
    shape: list[int]
    start: int
    stop: int


class PackedFiles:
    """The places of the packed tensors of all targets.

    Attributes:
        places: by the target's name and the tensor's.
    """

    def __init__(self, files: list[pathlib.Path], targets: dict[str, Target]):
        """Reads headers only.

        Raises:
            ValueError: a file is cut short, or a target's tensors are missing or of another type or size.
        """
        self.places: dict[str, dict[str, Place]] = {target.name: {} for target in targets.values()}
        # the model may be known by its base's names in the file, and the other way round
        names = {name.partition(".")[2]: name for name in self.places} | {name: name for name in self.places}
        for path in files:
            for key, *content in _header(path):
                module, _, leaf = key.rpartition(".")
                name = names.get(module) or names.get(module.partition(".")[2])
                if name is not None and leaf in TENSOR_NAMES:
                    self.places[name][leaf] = _place(path, key, *content)
        for target in targets.values():
            self._check(target)

    def _check(self, target: Target) -> None:
        places = self.places[target.name]
        needed = set(_REQUIRED)
        if "scales" in places and places["scales"].dtype == torch.uint8:
            needed.add("scale_steps")
        absent = needed - set(places)
        if absent:
            raise ValueError(f"The packed checkpoint lacks {', '.join(sorted(absent))} of {target.name}.")
        (rows,) = places["row_bits"].shape
        if rows != target.out_features:
            raise ValueError(
                f"{target.name}.row_bits has {rows} channels, but the layer of this config.json has "
                f"{target.out_features}."
            )

    def names(self) -> dict[str, str]:
        """The model's names of the packed tensors by their names in the files."""
        return {place.key: f"{name}.{leaf}" for name, places in self.places.items() for leaf, place in places.items()}

    def placeholders(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one target on "meta"."""
        places = self.places[name].items()
        return {leaf: torch.empty(place.shape, dtype=place.dtype, device="meta") for leaf, place in places}

    def mapped(self, leaves: tuple[str, ...] = TENSOR_NAMES) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors by the target's name and the tensor's, mapped from the files: they take no memory until used."""
        opened = {}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, places in self.places.items():
            found[name] = {}
            for leaf in leaves:
                place = places.get(leaf)
                if place is not None:
                    content = opened.get(place.path) or opened.setdefault(
                        place.path, safe_open(place.path, framework="pt")
                    )
                    found[name][leaf] = content.get_tensor(place.key)
        return found

    def load(self, device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
        """All tensors by the target's name and the tensor's, on `device`."""
        if device.type == "cuda":
            return self._copied(device)
        tensors = self.mapped()
        return {name: {leaf: tensor.to(device) for leaf, tensor in leaves.items()} for name, leaves in tensors.items()}

    def _copied(self, device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
        everything = [place for tensors in self.places.values() for place in tensors.values()]
        torch.empty(sum(place.stop - place.start for place in everything), dtype=torch.uint8, device=device)
        # The block just freed is cut into the tensors: one allocation, where a thousand would cost as much as the copy.
        loaded = {
            name: {leaf: torch.empty(place.shape, dtype=place.dtype, device=device) for leaf, place in places.items()}
            for name, places in self.places.items()
        }
        wanted = [
            (place, loaded[name][leaf].view(-1).view(torch.uint8))
            for name, places in self.places.items()
            for leaf, place in places.items()
        ]
        chunks: queue.SimpleQueue[_Chunk] = queue.SimpleQueue()
        for chunk in _chunks(wanted):
            chunks.put(chunk)
        allocated = torch.cuda.current_stream(device).record_event()
        count = min(_THREADS, chunks.qsize())
        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            for done in [threads.submit(_copy_chunks, chunks, device, allocated) for _ in range(count)]:
                done.result()
        return loaded


def _header(path: pathlib.Path) -> list[tuple[str, str, list[int], int, int]]:
    """Name, type, shape, first byte and end of every tensor of a safetensors file."""
    try:
        with safe_open(path, framework="pt"):  # checks that header and file fit one another
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is cut short or damaged.") from error
    header.pop("__metadata__", None)
    first = 8 + length
    return [
        (key, entry["dtype"], entry["shape"], *(first + offset for offset in entry["data_offsets"]))
        for key, entry in header.items()
    ]


def _place(path: pathlib.Path, key: str, dtype: str, shape: list[int], start: int, stop: int) -> Place:
    if dtype not in _DTYPES:
        raise ValueError(
            f"{key} has type {dtype}, which no packed tensor has: this is no checkpoint written by lowra, or it was "
            "converted by another program."
        )
    return Place(path, key, _DTYPES[dtype], shape, start, stop)


@dataclasses.dataclass
class _Chunk:
    """Adjoining bytes of a file, and the tensors they belong to: (bytes of a tensor, their place in the chunk)."""

    path: pathlib.Path
    start: int
    length: int = 0
    parts: list[tuple[torch.Tensor, int]] = dataclasses.field(default_factory=list)


def _chunks(wanted: list[tuple[Place, torch.Tensor]]) -> list[_Chunk]:
    """Cuts what is to be read into chunks of at most `_CHUNK_BYTES`, in the order of the files."""
    chunks: list[_Chunk] = []
    for place, content in sorted(wanted, key=lambda item: (str(item[0].path), item[0].start)):
        at = place.start
        while at < place.stop:
            last = chunks[-1] if chunks else None
            if last is None or (last.path, last.start + last.length) != (place.path, at) or last.length == _CHUNK_BYTES:
                chunks.append(_Chunk(place.path, at))
                last = chunks[-1]
            count = min(place.stop - at, _CHUNK_BYTES - last.length)
            last.parts.append((content[at - place.start : at - place.start + count], last.length))
            last.length += count
            at += count
    return chunks


def _copy_chunks(chunks: queue.SimpleQueue, device: torch.device, allocated: torch.cuda.Event) -> None:
    """Reads and copies chunks until none is left; one of several threads."""
    buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    bytes_of_buffer = memoryview(buffer.numpy())
    stream = torch.cuda.Stream(device)
    stream.wait_event(allocated)
    with torch.cuda.stream(stream):
        while True:
            try:
                chunk = chunks.get_nowait()
            except queue.Empty:
                return
            with open(chunk.path, "rb", buffering=0) as file:
                file.seek(chunk.start)
                if file.readinto(bytes_of_buffer[: chunk.length]) != chunk.length:
                    raise ValueError(f"{chunk.path} was changed while it was read.")
            for content, at in chunk.parts:
                content.copy_(buffer[at : at + content.numel()], non_blocking=True)
            stream.synchronize()  # before the buffer is filled again
