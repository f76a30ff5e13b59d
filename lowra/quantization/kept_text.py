"""Text that a model has written, kept as long as the run that needs it has not ended: a killed one goes on from it."""

import hashlib
import json
import pathlib
from typing import Any

import torch
import transformers
from torch import nn

from ..checkpoints.atomic import save_tensors
from ..checkpoints.guarded import read_tensors
from ..version import __version__
from .work import identities


class KeptText:
    """Sequences in the order in which they were written, a file for those that were written side by side."""

    def __init__(self, folder: pathlib.Path, writer: list[Any]):
        """
        Args:
            folder: of the files; made with the first of them.
            writer: see `writer_of`.
        """
        self._folder, self._writer = folder, writer

    def load(self, number: int, count: int, length: int, seed: int) -> torch.Tensor | None:
        """Token ids [count, length], int64, of a file of this writer and size; None where there is none."""
        try:
            tensors, metadata = read_tensors(self._path(number), "text of an earlier run")
        except (OSError, ValueError):  # not there, or damaged: it is written again
            return None
        tokens = tensors.get("tokens")
        if metadata.get("writer") != self._digest(seed) or tokens is None or tokens.shape != (count, length):
            return None
        return tokens.long()

    def save(self, number: int, tokens: torch.Tensor, seed: int) -> None:
        """tokens: [count, length] on the CPU."""
        self._folder.mkdir(parents=True, exist_ok=True)
        save_tensors({"tokens": tokens.int()}, self._path(number), {"writer": self._digest(seed)})

    def _path(self, number: int) -> pathlib.Path:
        return self._folder / f"{number:05d}.safetensors"

    def _digest(self, seed: int) -> str:
        return hashlib.sha256(json.dumps([*self._writer, seed]).encode()).hexdigest()


def writer_of(folder: pathlib.Path, model: nn.Module, device: torch.device) -> list[Any]:
    """All that the text of a model depends on beside its seed, as JSON takes it: files, arithmetic, versions."""
    files = identities(sorted(path for path in folder.iterdir() if path.is_file()))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [files, str(next(model.parameters()).dtype), name, torch.__version__, transformers.__version__, __version__]
