"""Files written beside their place and renamed into it, so that a killed run leaves no half-written file behind."""

import json
import os
import pathlib

import torch
from safetensors.torch import save_file


def save_tensors(tensors: dict[str, torch.Tensor], path: pathlib.Path) -> None:
    """Writes a safetensors file with Transformers' metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def save_text(text: str, path: pathlib.Path) -> None:
    """Writes a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_json(content, path: pathlib.Path) -> None:
    """Writes a JSON file."""
    save_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)
