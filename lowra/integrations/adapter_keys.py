"""Which tensors are an adapter's and which its base's, by exact names; whether a file had all of them and no others.

PEFT looks for an adapter's name and its method's prefix somewhere in a key, so that it counts the tensors of `law-v2`
as missing from `law`, and does not miss a module of modules_to_save at all.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.matching import count_and_names

# Parts of names: of what is below PEFT's wrappers, and of what an adapter has in the place of it.
_BELOW = {"base_layer", "original_module", "token_adapter"}
_IN_PLACE = {"modules_to_save", "trainable_tokens_delta", "trainable_tokens_original"}


def base_name(name: str) -> str | None:
    """Name of a parameter before PEFT wrapped the model; None where PEFT brought the parameter."""
    parts = name.removeprefix("base_model.model.").split(".")
    if stands_in(name) or any(part.startswith("lora_") for part in parts):
        return None
    return ".".join(part for part in parts if part not in _BELOW)


def stands_in(name: str) -> bool:
    """Whether a parameter stands in for one of the base: of a module that is trained whole, or of trained tokens."""
    return not _IN_PLACE.isdisjoint(name.split("."))


@contextlib.contextmanager
def watch_keys(model: nn.Module) -> Iterator[list[tuple[set[str], set[str]]]]:
    """Collects the missing and the unexpected keys of every `model.load_state_dict` in between."""
    seen: list[tuple[set[str], set[str]]] = []

    def watch(module: nn.Module, keys: Any) -> None:
        seen.append((set(keys.missing_keys), set(keys.unexpected_keys)))

    handle = model.register_load_state_dict_post_hook(watch)
    try:
        yield seen
    finally:
        handle.remove()


def own_keys(model: nn.Module, adapter: str) -> set[str]:
    """Names in the state dict of a model of the tensors that an adapter has there, and no other adapter.

    Args:
        model: with adapters, under PEFT's wrappers or not.
        adapter: its name.
    """
    keys: set[str] = set()
    inner: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            inner = (*inner, f"{name}.")  # what is in it, trained tokens for one, it answers for
            keys |= {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter).values()}
        elif isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module) and not name.startswith(inner):
            for part, child in module.named_children():
                if part != "base_layer":
                    own = (key for key in child.state_dict() if key.partition(".")[0] == adapter)
                    keys |= {f"{name}.{part}.{key}" for key in own}
    return keys


def adapters_in(state_dict: dict[str, Any], model: Any) -> list[str]:
    """The adapters of a model that a state dict has factors for."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        return []
    kinds = {kind for layer in layers for kind in layer.adapter_layer_names}
    parts = {part for key in state_dict for part in zip(key.split("."), key.split(".")[1:], strict=False)}
    return [name for name in model.peft_config if any((kind, name) in parts for kind in kinds)]


def is_saved_module(model: nn.Module, key: str) -> bool:
    """Whether a name in a file is that of a tensor of a module that adapters train as a whole."""
    wrappers = (name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    return any(str(key).startswith(f"{name}.") for name in wrappers)


def embedding_keys(model: PreTrainedModel | PeftModel, adapter: str) -> set[str]:
    """Names, without the adapter's, under which PEFT saves embeddings and head beside the adapter.

    It saves all that the two modules hold, so a module of modules_to_save is there twice.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = [table for table in tables if table is not None]
    keys = set()
    for name, module in model.named_modules():
        if any(table is module or table is getattr(module, "base_layer", None) for table in tables):
            keys |= {f"{name}.{key}" for key in module.state_dict()}
    return {key.replace(f".{adapter}.", ".").removesuffix(f".{adapter}") for key in keys}


def check_keys(
    model: PreTrainedModel | PeftModel,
    adapter: str,
    missing: set[str],
    unexpected: set[str],
    what: str,
    remedy: str = "",
) -> None:
    """
    Args:
        model: in whose state dict the names are.
        adapter: its name in the model.
        missing, unexpected: names that loading found in the model only, and in the file only.
        what: the file, for the message.
        remedy: what else to try, a sentence.

    Raises:
        ValueError: a tensor of the adapter was not in the file, or one of the file has no place.
    """
    lacking = own_keys(model, adapter) & missing
    left_over = unexpected - embedding_keys(model, adapter)
    for keys, fault in ((lacking, "lacks"), (left_over, "holds, without a place for them,")):
        if keys:
            found = f"The adapter {what} {fault} {count_and_names(keys)}."
            raise ValueError(f"{found} It is damaged, or its config was changed. {remedy}".rstrip())
