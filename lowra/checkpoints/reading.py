"""Many tensors of safetensors files read at once, on to the CPU or a GPU.

On the CPU tensors are mapped from the file, as Transformers does it. For a GPU a few threads each fill page-locked
memory while that of the others is being copied, which is as fast as the page cache can be read.
"""

import concurrent.futures
import dataclasses
import pathlib
import queue

import torch
from safetensors import safe_open

from .guarded import open_tensors, parse_json

# As safetensors calls them; a file may hold others, of which nothing here makes use.
DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
STORED_AS = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK_BYTES = 8 << 20
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        path, key: the file, and the tensor's name in it.
        stored_as: its type, as safetensors calls it.
        shape: of the tensor.
        start, stop: its bytes in the file.
    """

    path: pathlib.Path
    key: str
    stored_as: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a type that neither packed nor dense weights have."""
        return DTYPES.get(self.stored_as)

    def placeholder(self) -> torch.Tensor:
        """A tensor of this type and shape on "meta"."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def stored_tensors(path: pathlib.Path) -> list[StoredTensor]:
    """Every tensor of a file, from its header.

    Raises:
        ValueError: the file is cut short or damaged.
    """
    with open_tensors(path, "tensors in safetensors"):  # checks that header and file fit one another
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length).decode(), f"The header of {path}", "that of a safetensors file")
    header.pop("__metadata__", None)
    first = 8 + length
    return [
        StoredTensor(path, key, entry["dtype"], tuple(entry["shape"]), *(first + at for at in entry["data_offsets"]))
        for key, entry in header.items()
    ]


def read(places: dict[str, StoredTensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of these places, on `device`; on the CPU mapped, so that they take no memory until they are used."""
    if device.type == "cuda":
        return _copied(places, device)
    # open as long as a tensor of theirs is alive; the headers were checked when the places were taken
    opened = {path: safe_open(path, framework="pt") for path in {place.path for place in places.values()}}
    return {name: opened[place.path].get_tensor(place.key).to(device) for name, place in places.items()}


def _copied(places: dict[str, StoredTensor], device: torch.device) -> dict[str, torch.Tensor]:
    torch.empty(sum(place.stop - place.start for place in places.values()), dtype=torch.uint8, device=device)
    # The block just freed is cut into the tensors: one allocation, where a thousand would cost as much as the copy.
    tensors = {name: torch.empty(place.shape, dtype=place.dtype, device=device) for name, place in places.items()}
    chunks: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
    pieces = _chunks([(place, tensors[name].view(-1).view(torch.uint8)) for name, place in places.items()])
    count = min(_THREADS, len(pieces))
    for piece in [*pieces, *(None for _ in range(count))]:  # None ends a thread
        chunks.put(piece)
    allocated = torch.cuda.current_stream(device).record_event()
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(_copy_chunks, chunks, device, allocated) for _ in range(count)]:
            done.result()
    return tensors


@dataclasses.dataclass
class _Chunk:
    """Adjoining bytes of a file, and the tensors they belong to: (bytes of a tensor, their place in the chunk)."""

    path: pathlib.Path
    start: int
    length: int = 0
    parts: list[tuple[torch.Tensor, int]] = dataclasses.field(default_factory=list)


def _chunks(wanted: list[tuple[StoredTensor, torch.Tensor]]) -> list[_Chunk]:
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
    with torch.cuda.device(device):  # or the page-locked memory would open a context on the first GPU
        buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        bytes_of_buffer = buffer.numpy().data
        stream = torch.cuda.Stream(device)
        stream.wait_event(allocated)
        with torch.cuda.stream(stream):
            for chunk in iter(chunks.get, None):
                with open(chunk.path, "rb", buffering=0) as file:
                    file.seek(chunk.start)
                    if file.readinto(bytes_of_buffer[: chunk.length]) != chunk.length:
                        raise ValueError(f"{chunk.path} was changed while it was read.")
                for content, at in chunk.parts:
                    content.copy_(buffer[at : at + content.numel()], non_blocking=True)
                stream.synchronize()  # before the buffer is filled again
