"""Files of others, read so that a bad one is named: JSON, safetensors and text, for whoever reads one.

Each function takes the path and what was expected there, for the message. What comes may be cut short, of another kind
or made by an enemy: whatever it is ends in an OSError (the file cannot be had) or a ValueError (it cannot be used), and
nothing but a file is opened, because a named pipe would never end.
"""

import contextlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


def check_file(path: pathlib.Path, what: str) -> None:
    """
    Raises:
        FileNotFoundError, PermissionError, OSError: nothing, no file, or one that may not be read.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        link = " (it is a link to nothing)" if os.path.islink(path) else ""
        raise FileNotFoundError(f"{path} does not exist{link}; expected {what}.") from None
    except OSError as error:
        raise OSError(f"{path} cannot be had ({error.strerror}); expected {what}.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise OSError(f"{path} is {kind}; expected {what}, a file.")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} may not be read by this user; expected {what}.")


def read_text(path: pathlib.Path, what: str) -> str:
    """A UTF-8 text.

    Raises:
        OSError, ValueError: no file that can be read, or not UTF-8.
    """
    check_file(path, what)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); expected {what}.") from error


def read_json(path: pathlib.Path, what: str) -> dict:
    """A JSON object.

    Raises:
        OSError, ValueError: no file that can be read, or no JSON object in it.
    """
    check_file(path, what)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged (not valid JSON, {error}); expected {what}. Copy it again.") from error
    return parse_json(text, str(path), what)


def parse_json(text: str, place: str, what: str) -> dict:
    """A JSON object from text that was read at `place`.

    Raises:
        ValueError: no JSON, nested too deeply, another thing than an object, or a key given twice with two values, of
            which some readers would take the one and some the other.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unambiguous)
    except RecursionError:
        raise ValueError(f"{place} is damaged (JSON nested too deeply); expected {what}.") from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise ValueError(f"{place} is damaged (not valid JSON, {error!r}); expected {what}. Copy it again.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{place} is damaged (TypeError: it holds a JSON {kind}); expected {what}, a JSON object.")
    return content


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content and content[key] != value:
            raise ValueError(f"the key {key!r} twice with different values")
        content[key] = value
    return content


@contextlib.contextmanager
def open_tensors(path: pathlib.Path, what: str) -> Iterator[safe_open]:
    """A safetensors file, of which tensors are read in the block; header and length have been checked.

    Raises:
        OSError, ValueError: no file that can be read, cut short, or not safetensors.
    """
    check_file(path, what)
    try:
        with safe_open(path, framework="pt") as content:
            yield content
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); expected {what}. It is cut short or damaged: copy or "
            "download it again."
        ) from error


def read_tensors(path: pathlib.Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, copied into memory, and its metadata.

    Raises:
        OSError, ValueError: no file that can be read, cut short, or not safetensors.
    """
    with open_tensors(path, what) as content:
        # A copy, so that nothing keeps the file mapped: a file replaced in place would change under the reader.
        return {name: content.get_tensor(name).clone() for name in content.keys()}, dict(content.metadata() or {})


def one_line(error: Exception) -> str:
    """A message of many lines in one, with the kind of error where it says little by itself."""
    text, _, _ = f"{type(error).__name__}: {error}".partition("Exception raised from")  # PyTorch's C++ stack follows
    return " ".join(text.split()).rstrip(".")
