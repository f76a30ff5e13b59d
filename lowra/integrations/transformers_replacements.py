"""What the functions of Transformers in the table of patches are replaced by.

Each takes the original and hands dense models to it: arguments, results, exceptions and state are the original's own.
"""

import contextlib
import functools
import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..checkpoints.configs import packing_described
from ..config import LowRAConfig
from .adapter_places import reached
from .adapter_records import (
    UNKNOWN,
    Arriving,
    check_adapter,
    check_loaded_by_transformers,
    check_saved,
    is_packed_base,
    settle,
)
from .folders import build_config, describes_packing, load_folder, local_packed_folder
from .integrity import describe_again, fetched_with
from .loose_factors import read_from, refuse_unknown_origin, tell_unknown_origin
from .parameter_counts import uncounted
from .stored_start import filled_from_file
from .transformers import OPTIONS, asked_for, describe_saved, dtype_of_packed, refuse_layers_of_adapters


def load_in_lowra(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(
        cls: Any, *args: Any, load_in_lowra: bool = False, lowra_bits: float | None = None, **kwargs: Any
    ) -> Any:
        if load_in_lowra:
            if kwargs.get("quantization_config") is not None:
                raise ValueError("Give either load_in_lowra=True or quantization_config, not both.")
            kwargs["quantization_config"] = LowRAConfig() if lowra_bits is None else LowRAConfig(bits=lowra_bits)
        elif lowra_bits is not None:
            raise ValueError("lowra_bits has no effect without load_in_lowra=True.")
        asked = None if load_in_lowra and lowra_bits is None else kwargs.get("quantization_config")
        folder = local_packed_folder(args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        with asked_for(asked, ("bits",) if load_in_lowra else OPTIONS):
            if folder is None:
                # what is packed while it is loaded is loaded by this thread, not by others that know no inference mode
                packs = isinstance(kwargs.get("quantization_config"), LowRAConfig)
                with fetched_with(kwargs), torch.inference_mode(False) if packs else contextlib.nullcontext():
                    return original(cls, *args, **kwargs)
            return load_folder(functools.partial(original, cls, *args, **kwargs), folder, kwargs)

    return from_pretrained


def checked_config(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_config_dict(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        folder = local_packed_folder(pretrained_model_name_or_path, kwargs)
        if folder is not None:
            packing_described(folder)
        return original(cls, pretrained_model_name_or_path, **kwargs)

    return get_config_dict


def built_config(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_dict(cls: Any, config_dict: Any, **kwargs: Any) -> Any:
        if not describes_packing(config_dict):
            return original(cls, config_dict, **kwargs)
        return build_config(functools.partial(original, cls, config_dict, **kwargs))

    return from_dict


def described(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        config = getattr(getattr(self, "config", None), "quantization_config", None)
        save = functools.partial(original, self, save_directory, is_main_process, *args, **kwargs)
        if not is_main_process or not isinstance(config, LowRAConfig):
            return save()
        refuse_layers_of_adapters(self)
        describe_again(self)
        variant = signature.bind(self, save_directory, is_main_process, *args, **kwargs).arguments.get("variant")
        describe = functools.partial(describe_saved, self, pathlib.Path(save_directory), variant)
        with _described_before_upload(self, describe):
            result = save()
        describe()
        return result

    return save_pretrained


@contextlib.contextmanager
def _described_before_upload(model: Any, describe: Callable[[], None]) -> Iterator[None]:
    """With push_to_hub=True save_pretrained uploads what it has written before it returns."""
    upload = model._upload_modified_files

    def described_upload(*args: Any, **kwargs: Any) -> Any:
        describe()
        return upload(*args, **kwargs)

    model.__dict__["_upload_modified_files"] = described_upload
    try:
        yield
    finally:
        del model.__dict__["_upload_modified_files"]


def dtype(original: property) -> property:
    get: Any = original.fget

    def dtype(self: Any) -> Any:
        return dtype_of_packed(self) or get(self)

    return property(functools.wraps(get)(dtype), doc=original.__doc__)


def checked_adapter_of_transformers(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, any_base: bool = False, **kwargs: Any) -> Any:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            return original(self, *args, **kwargs)  # which says what is wrong with them
        path, name = given.get("peft_model_id"), given.get("adapter_name") or "default"
        arriving = Arriving(UNKNOWN)
        options = {**given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
        factors = given.get("adapter_state_dict")
        if factors is not None and is_packed_base(self):
            if (source := read_from(factors)) is None:
                refuse_unknown_origin(self, name)
                tell_unknown_origin(name)
            else:
                path, options = source
        needs_config = given.get("peft_config") is None
        found = None if path is None or not is_packed_base(self) else reached(path, options, needs_config)
        with found or contextlib.nullcontext():
            if path is not None:
                arriving = check_adapter(self, path, options, any_base)
            with filled_from_file():
                result = original(self, *args, **kwargs)
        if is_packed_base(self):
            check_loaded_by_transformers(self, name, result, str(path))
            if path is not None:
                check_saved(str(path), options, arriving.record)
            settle(self, name, arriving)
        return result

    return load_adapter


def counted(original: Callable) -> Callable:
    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> Any:
        count = original(self, only_trainable, exclude_embeddings)
        return count if only_trainable else count + uncounted(self, exclude_embeddings)

    return num_parameters


def all_of_generate(original: Callable) -> Callable:
    @functools.wraps(original)
    def _extract_generation_mode_kwargs(
        self: Any, custom_generate: Any, kwargs: Any, synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> Any:
        given, function = dict(kwargs), custom_generate
        found = original(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        while isinstance(function, functools.partial):  # fast_decoding with exact=True, say
            function = function.func
        if getattr(function, "__module__", "").startswith("lowra."):  # fast_decoding
            # later, a cache that `generate` has made looks like one that it was given
            found["wants_cache"] = any(given.get(name) is not None for name in ("cache", "past_key_values"))
            found |= original(self, None, given, synced_gpus, assistant_model, streamer)
        return found

    return _extract_generation_mode_kwargs
