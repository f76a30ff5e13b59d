"""Files and folders written beside their place and renamed into it: a killed run leaves nothing half-written behind."""

import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from .places import new_folder

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextlib.contextmanager
def written_beside(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder that takes the place `output` when the block ends well, and goes away when it does not.

    Raises:
        OSError, ValueError: see `new_folder`.
    """
    place = new_folder(output)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.parent / f".{place.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        move_folder(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it until the block ends, or this process does.

    Where nothing was put into it, the folder goes away again, with those above it that were made for it.

    Raises:
        ValueError: another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"Another process is writing to {folder}: wait for it, or give another output.") from None
    except OSError as error:
        logger.warning("lowra: %s cannot be locked (%s); let no other process write there.", folder, error)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # gone with its folder, or a system that removes no open files
            (folder / LOCK_FILE).unlink()
        lock.release()
        for path in (folder, *made):
            with contextlib.suppress(OSError):  # gone, or not empty, which is what it was made for
                path.rmdir()


def move_folder(folder: pathlib.Path, place: pathlib.Path) -> None:
    """Renames a finished folder to `place`, which may be there as an empty folder.

    Raises:
        OSError: something came to be there since `new_folder` looked; the finished folder stays where it is.
    """
    if place.exists():
        shutil.copymode(place, folder)
    try:
        os.rename(folder, place)
    except OSError as error:
        raise OSError(
            f"{place} cannot be taken ({error.strerror}); what was to be put there is finished and lies in {folder}."
        ) from error


def save_tensors(tensors: dict[str, torch.Tensor], path: pathlib.Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; without other metadata with Transformers'.

    Raises:
        OSError: it cannot be written.
    """
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _replaced(path) as temporary:
        save_file(content, temporary, metadata=metadata or {"format": "pt"})
        # safetensors makes files that only their owner can read; as any other file it should follow the umask
        temporary.chmod(0o666 & ~_umask())


def set_metadata(path: pathlib.Path, name: str, value: str) -> None:
    """Writes an entry of a safetensors file's metadata, and leaves its tensors as they are, byte for byte.

    Raises:
        OSError: it cannot be written.
    """
    with open(path, "rb") as file, _replaced(path) as temporary:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header["__metadata__"] = {**(header.get("__metadata__") or {}), name: value}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin aligned
        with open(temporary, "wb") as written:
            written.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, written, 1 << 20)
        shutil.copymode(path, temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_text(text: str, path: pathlib.Path) -> None:
    """Writes a text file.

    Raises:
        OSError: it cannot be written.
    """
    with _replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(content: Any, path: pathlib.Path) -> None:
    """Writes a JSON file, with null for what is not `finite`.

    Raises:
        OSError: it cannot be written.
    """
    save_text(json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n", path)


def finite(content: Any) -> Any:
    """The same structure with NaN and infinities as None: JSON has no words for them, and Python writes some."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextlib.contextmanager
def _replaced(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name beside `path`; what is written under it takes the place of `path`, or goes away where that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error  # safetensors says it in words of its own
        raise OSError(f"{path} cannot be written: {reason}.") from error
