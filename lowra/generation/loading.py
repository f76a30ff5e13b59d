"""Loading a packed or dense model with its adapter."""

import logging
import pathlib
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from ..adapters import load_packed
from ..adapters.storage import PACKED_FILE
from ..checkpoints.companions import with_tokenizer
from ..checkpoints.dense import read_config
from ..checkpoints.guarded import read_json
from ..checkpoints.hub import resolve_folder
from ..checkpoints.places import expanded
from ..checkpoints.records import check_trained
from ..corpus import load_tokenizer
from ..device import choose_device, has_bfloat16
from ..integrations.adapter_keys import base_name

logger = logging.getLogger(__name__)

_ADAPTER_FILES = ("adapter_config.json", PACKED_FILE)


def load_model(
    folder: str,
    adapter: str | None = None,
    device: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model, with an adapter on it if one is given, in evaluation mode.

    Args:
        folder: packed or dense checkpoint, local or on the hub.
        adapter: folder of a PEFT adapter, or of a packed one that `lowra adapter quantize` wrote.
        device: a GPU if there is one.
        force: load a packed adapter in spite of its label.
        trust_remote_code: run the Python code that the checkpoint brings, where its architecture is its own.

    Raises:
        FileNotFoundError: a folder is not there or has no model in it.
        ValueError: an adapter of another base, one whose label forbids it, or one that diverged in training; code that
            may not be run; `force` without a packed adapter.
    """
    check_adapter_folder(adapter)
    adapter = None if adapter is None else str(expanded(adapter))
    if adapter is not None and (path := pathlib.Path(adapter) / _ADAPTER_FILES[0]).exists():
        read_json(path, "the configuration of an adapter")
    if force and (adapter is None or not (pathlib.Path(adapter) / PACKED_FILE).exists()):
        raise ValueError("force has no effect without a packed adapter, whose label it overrides: leave it out.")
    source = resolve_folder(folder)
    config = read_config(source, trust_remote_code)  # Transformers would ask on the terminal
    place = choose_device(device)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=_dtype(config, place), device_map={"": place}, trust_remote_code=trust_remote_code
    )
    if adapter is not None and (pathlib.Path(adapter) / PACKED_FILE).exists():
        model = load_packed(model, adapter, force=force)
    elif adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
        check_trained(((name, part) for name, part in model.named_parameters() if base_name(name) is None), adapter)
    return model.eval()


def load_tokenizer_for(
    folder: pathlib.Path | str, adapter: str | pathlib.Path | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that an adapter was trained with, where it brings one, or else the model's.

    Raises:
        ValueError: it cannot be read.
    """
    own = with_tokenizer(None if adapter is None else expanded(adapter))
    return load_tokenizer(own or folder, trust_remote_code)


def check_adapter_folder(adapter: str | pathlib.Path | None) -> None:
    """Raises FileNotFoundError where an adapter is given and is no folder of one."""
    if adapter is None:
        return
    folder = expanded(adapter)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no adapter: there is no such folder.")
    if not any((folder / file).is_file() for file in _ADAPTER_FILES):
        raise FileNotFoundError(f"{folder} is no adapter: it has neither {' nor '.join(_ADAPTER_FILES)}.")


def _dtype(config: PreTrainedConfig, device: torch.device) -> torch.dtype | str:
    """The checkpoint's own, but float16 for bfloat16 on a GPU that only emulates that."""
    if config.dtype != torch.bfloat16 or has_bfloat16(device):
        return "auto"
    logger.warning("%s has no bfloat16: the model is loaded in float16.", torch.cuda.get_device_name(device))
    return torch.float16
