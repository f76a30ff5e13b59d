"""The ways in which `fuzz_checkpoints.py` changes one thing in a folder: bytes, lengths, tensors, JSON, whole files.

Each takes a file and a source of chance, and says what it changed.
"""

import contextlib
import json
import os
import pathlib
import random
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file


def mutate(folder: pathlib.Path, rng: random.Random) -> tuple[str, str]:
    """Changes one thing in a folder.

    Returns:
        the kind of change, and what was changed.
    """
    while True:
        kind = rng.choice(sorted(MUTATIONS))
        suffixes, how = MUTATIONS[kind]
        files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        if files:
            path = rng.choice(files)
            with contextlib.suppress(_NotPossible):
                return kind, f"{path.name}: {how(path, rng)}"


class _NotPossible(Exception):
    """This file has nothing of the kind that was to be changed."""


def _flip_in_header(path: pathlib.Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place = rng.randrange(8 + int.from_bytes(content[:8], "little"))
    return _flip(path, content, place, rng)


def _flip_in_body(path: pathlib.Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    if start >= len(content):
        raise _NotPossible
    place = rng.randrange(start, len(content))
    return _flip(path, content, place, rng)


def _flip_anywhere(path: pathlib.Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    return _flip(path, content, rng.randrange(len(content)), rng)


def _flip(path: pathlib.Path, content: bytearray, place: int, rng: random.Random) -> str:
    bit = rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place}"


def _set_length(path: pathlib.Path, rng: random.Random) -> str:
    content = path.read_bytes()
    length = rng.choice([0, 1, 7, 8, 9, len(content) // 2, len(content) - 1, rng.randrange(len(content))])
    path.write_bytes(content[:length])
    return f"cut from {len(content)} to {length} bytes"


def _extend(path: pathlib.Path, rng: random.Random) -> str:
    more = rng.choice([b"\0", b"}", b" ", rng.randbytes(64)])
    path.write_bytes(path.read_bytes() + more)
    return f"{len(more)} bytes appended"


def _replace_file(path: pathlib.Path, rng: random.Random) -> str:
    what = rng.choice(["nothing", "a folder", "a named pipe", "a link to nothing", "zeros", "noise"])
    length = path.stat().st_size
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a named pipe":
        os.mkfifo(path)
    elif what == "a link to nothing":
        path.symlink_to("gone")
    elif what in ("zeros", "noise"):
        path.write_bytes(bytes(length) if what == "zeros" else rng.randbytes(length))
    return f"replaced by {what}"


def _change_tensors(path: pathlib.Path, rng: random.Random) -> str:
    tensors = load_file(path)
    name = rng.choice(sorted(name for name, tensor in tensors.items() if tensor.numel()))
    how = rng.choice([_swap, _drop, _add, _retype, _reshape, _not_a_number, _blank, _reverse, _nudge])
    what = how(tensors, name, rng)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, _metadata(path))
    return what


def _metadata(path: pathlib.Path) -> dict[str, str]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})


def _swap(tensors: dict, name: str, rng: random.Random) -> str:
    alike = [
        other
        for other, tensor in sorted(tensors.items())
        if other != name and (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)
    ]
    if not alike:
        raise _NotPossible
    other = rng.choice(alike)
    tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    return f"{name} and {other} swapped"


def _drop(tensors: dict, name: str, rng: random.Random) -> str:
    del tensors[name]
    if not tensors:
        raise _NotPossible
    return f"{name} left out"


def _add(tensors: dict, name: str, rng: random.Random) -> str:
    extra = rng.choice([f"{name}.extra", name.replace(".0.", ".7."), name.replace("q_proj", "x_proj"), "inv_freq"])
    if extra in tensors:
        raise _NotPossible
    tensors[extra] = tensors[name].clone()
    return f"{extra} added"


def _retype(tensors: dict, name: str, rng: random.Random) -> str:
    dtype = rng.choice([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool])
    if dtype == tensors[name].dtype:
        raise _NotPossible
    tensors[name] = tensors[name].to(dtype)
    return f"{name} as {dtype}"


def _reshape(tensors: dict, name: str, rng: random.Random) -> str:
    tensor = tensors[name]
    shapes = [tensor.reshape(-1), tensor[None], tensor.T if tensor.ndim == 2 else tensor[:-1], tensor[:0]]
    tensors[name] = rng.choice(shapes).clone()
    if tensors[name].shape == tensor.shape:
        raise _NotPossible
    return f"{name} {list(tensor.shape)} as {list(tensors[name].shape)}"


def _not_a_number(tensors: dict, name: str, rng: random.Random) -> str:
    if not tensors[name].is_floating_point():
        raise _NotPossible
    value = rng.choice([float("nan"), float("inf"), -float("inf")])
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value
    return f"{value} in {name}"


def _blank(tensors: dict, name: str, rng: random.Random) -> str:
    tensors[name] = torch.zeros_like(tensors[name])
    return f"{name} set to zero"


def _reverse(tensors: dict, name: str, rng: random.Random) -> str:
    tensors[name] = tensors[name].flip(0)
    return f"{name} reversed"


def _nudge(tensors: dict, name: str, rng: random.Random) -> str:
    place = rng.randrange(tensors[name].numel())
    flat = tensors[name].view(-1)
    flat[place] = flat[place] * 2 + 1
    return f"{name}[{place}] changed"


def _change_json(path: pathlib.Path, rng: random.Random) -> str:
    content = json.loads(path.read_text())
    holder, key = _place(content, rng)
    before = holder[key]
    value = rng.choice(_VALUES)(before, rng)
    holder[key] = value
    path.write_text(json.dumps(content))
    return f"{key!r} is {_short(value)} and was {_short(before)}"


_VALUES = (
    lambda before, rng: None,
    lambda before, rng: [],
    lambda before, rng: {},
    lambda before, rng: [before],
    lambda before, rng: {"a": before},
    lambda before, rng: str(before),
    lambda before, rng: "",
    lambda before, rng: rng.choice([0, 1, -1, 2, 3, 0.5, 1e300, 2**63, float("nan"), float("inf")]),
    lambda before, rng: rng.choice([True, False]),
    lambda before, rng: before * 2 if isinstance(before, (int, float)) else before,
    lambda before, rng: before + 1 if isinstance(before, (int, float)) else "x",
    lambda before, rng: "\ud800",
    lambda before, rng: "../" * 8 + "etc/passwd",
)


def _drop_key(path: pathlib.Path, rng: random.Random) -> str:
    content = json.loads(path.read_text())
    holder, key = _place(content, rng)
    del holder[key]
    path.write_text(json.dumps(content))
    return f"{key!r} left out"


def _rename_key(path: pathlib.Path, rng: random.Random) -> str:
    content = json.loads(path.read_text())
    holder, key = _place(content, rng)
    if not isinstance(holder, dict):
        raise _NotPossible
    holder[f"{key}x"] = holder.pop(key)
    path.write_text(json.dumps(content))
    return f"{key!r} renamed"


def _whole_json(path: pathlib.Path, rng: random.Random) -> str:
    text = rng.choice(["null", "[]", "{}", '"x"', "1", "[" * 100_000, '{"a":' * 100_000, "", "{" + path.read_text()])
    path.write_text(text)
    return f"replaced by {_short(text)}"


def _place(content, rng: random.Random) -> tuple[dict | list, str | int]:
    """A key at any depth of a JSON document, and what holds it."""
    places = []

    def collect(holder):
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            places.append((holder, key))
            if isinstance(value, (dict, list)):
                collect(value)

    collect(content)
    if not places:
        raise _NotPossible
    return rng.choice(places)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}…"


_TENSORS, _JSON = (".safetensors",), (".json",)
MUTATIONS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "flip in a header": (_TENSORS, _flip_in_header),
    "flip in a body": (_TENSORS, _flip_in_body),
    "flip in JSON": (_JSON, _flip_anywhere),
    "cut": (_TENSORS + _JSON, _set_length),
    "extended": (_TENSORS + _JSON, _extend),
    "another kind of file": (_TENSORS + _JSON, _replace_file),
    "tensors": (_TENSORS, _change_tensors),
    "value in JSON": (_JSON, _change_json),
    "key left out": (_JSON, _drop_key),
    "key renamed": (_JSON, _rename_key),
    "whole JSON": (_JSON, _whole_json),
}
