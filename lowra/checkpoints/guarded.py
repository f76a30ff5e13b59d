"""JSON and safetensors files read so that a bad one is named, with what was expected of it and what came."""

import json
import pathlib

import torch
from safetensors import SafetensorError, safe_open


def read_json(path: pathlib.Path, what: str) -> dict:
    """A JSON object.

    Args:
        path: of the file.
        what: what the message says was expected, such as "the configuration of a PEFT adapter".

    Raises:
        FileNotFoundError, ValueError: naming the file, what was expected and what came.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected {what}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read; expected {what}. Copy the file again.") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON ({error}); expected {what}. Copy the file again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected {what}, a JSON object.")
    return content


def read_tensors(path: pathlib.Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, copied into memory, and its metadata.

    Args:
        path: of the file.
        what: what the message says was expected.

    Raises:
        FileNotFoundError, ValueError: missing, cut short or not safetensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected {what}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # A copy, so that nothing keeps the file mapped: a file replaced in place would change under the reader.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); expected {what}. The file was cut short or is of another "
            f"kind ({path.stat().st_size} bytes): copy or download it again."
        ) from error
