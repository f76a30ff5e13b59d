"""Files and folders written beside their place and renamed into it: a killed run leaves nothing half-written behind."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file


def refuse_existing(output: pathlib.Path) -> None:
    """Raises ValueError where something other than an empty folder is in the output's place."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: give another --output, or remove it first.")


@contextlib.contextmanager
def written_beside(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder that takes the place `output` when the block ends well, and goes away when it does not."""
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        move_folder(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it until the block ends, or this process does.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is writing to {folder}: wait for it, or give another output.") from None
        except OSError:
            pass  # a file system that knows no locks
        yield
    finally:
        os.close(handle)


def move_folder(folder: pathlib.Path, output: pathlib.Path) -> None:
    """Renames a finished folder to `output`, which may be there as an empty folder."""
    if output.exists():
        output.rmdir()
    folder.rename(output)


def save_tensors(tensors: dict[str, torch.Tensor], path: pathlib.Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; without other metadata with Transformers'."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(content, temporary, metadata=metadata or {"format": "pt"})
    # safetensors makes files that only their owner can read; as any other file it should follow the umask
    temporary.chmod(0o666 & ~_umask())
    os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_text(text: str, path: pathlib.Path) -> None:
    """Writes a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_json(content: Any, path: pathlib.Path) -> None:
    """Writes a JSON file."""
    save_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)
