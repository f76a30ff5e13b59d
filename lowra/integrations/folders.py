"""Local folders on their way into Transformers and PEFT: what is wrong with one of ours is said in a sentence."""

import os
import pathlib
from collections.abc import Callable

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoints.configs import GENERATION_FILE, check_packed_folder, is_of_lowra
from ..checkpoints.dense import empty_model
from ..checkpoints.guarded import one_line
from ..checkpoints.records import ADAPTER_CONFIG


def local_packed_folder(path: object, options: dict) -> pathlib.Path | None:
    """The folder that is loaded from, where it is a local one that holds, or held, a packed checkpoint.

    Args:
        path: as it was given to Transformers: a folder, a name on the hub, a file or None.
        options: the other arguments, of which `subfolder` and `gguf_file` count.
    """
    if not isinstance(path, (str, os.PathLike)) or options.get("gguf_file") is not None:
        return None
    folder = pathlib.Path(path) / (options.get("subfolder") or "")
    return folder if is_of_lowra(folder) else None


def describes_packing(config: dict) -> bool:
    described = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(described, dict) and described.get("quant_method") == "lowra"


def build_config(build: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    """
    Raises:
        ValueError: config.json holds what the config's class cannot use.
    """
    try:
        return build()
    except (ValueError, OSError):
        raise
    except Exception as error:  # of whatever line meets the value
        raise ValueError(f"The config.json of this packed checkpoint is damaged: {one_line(error)}.") from error


def load_folder(load: Callable[[], PreTrainedModel], folder: pathlib.Path, options: dict) -> PreTrainedModel:
    """
    Args:
        load: what Transformers does.
        folder: of a packed checkpoint.
        options: as for `from_pretrained`.

    Raises:
        OSError, ValueError: the folder's files are damaged, or no model can be built by them.
    """
    if options.get("state_dict") is None:
        check_packed_folder(folder, options.get("variant"))
    try:
        return load()
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Was it the folder? Only now, because building the model a second time takes as long as the first.
        empty_model(folder, bool(options.get("trust_remote_code")))
        _check_generation(folder)
        if "mismatched_sizes" in str(error):  # Transformers has printed which
            raise ValueError(f"{folder} holds tensors of other shapes than its config.json asks for.") from error
        raise


def load_adapter_folder(load: Callable[[], PeftModel], adapter: object) -> PeftModel:
    """What PEFT does to load an adapter on a packed model.

    Args:
        load: what PEFT does.
        adapter: as it was given: a folder, or a name on the hub; its configuration has been checked.

    Raises:
        ValueError: the adapter's configuration holds what PEFT cannot use.
    """
    try:
        return load()
    except (TypeError, AttributeError, KeyError) as error:  # of whatever line meets a value that it cannot use
        if "module name can" in str(error):  # the name that was given to the adapter
            raise
        raise ValueError(
            f"PEFT cannot load the adapter {adapter} ({one_line(error)}): {ADAPTER_CONFIG} is damaged, or "
            "an argument is none of PEFT's."
        ) from error


def _check_generation(folder: pathlib.Path) -> None:
    if not (folder / GENERATION_FILE).exists():
        return
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{folder / GENERATION_FILE} is damaged: {one_line(error)}.") from error
