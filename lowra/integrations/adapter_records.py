"""Whose base an adapter belongs to: the record beside it, and adapters that are refused when they are loaded.

The record is a file of its own, because adapter_config.json takes no new keys.
"""

import contextlib
import pathlib
from collections.abc import Callable

import torch
from peft import AdaptionPromptModel, PeftMixedModel, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..checkpoints.atomic import save_json
from ..checkpoints.guarded import read_json
from ..checkpoints.reading import stored_tensors
from ..quantization.initial_adapter import BASE_RECORD
from .adapter_keys import check_keys, is_saved_module, watch_keys

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
_KEPT = "_lowra_record"  # attribute of a PeftConfig, which writes only its fields


def packing(model: PreTrainedModel, name: str):
    """`fingerprint` or another attribute of a packed base's LowRAConfig; None where the base is not packed."""
    return getattr(getattr(getattr(model, "config", None), "quantization_config", None), name, None)


def record_of(model: PeftModel, name: str) -> dict:
    """What is known of the start of a loaded adapter: the content of its record; empty where it came with none."""
    return getattr(model.peft_config.get(name), _KEPT, {})


def keep_record(model: PeftModel, name: str, record: dict) -> None:
    """Keeps a record with the adapter's configuration, so that it goes where that goes; on a packed base only."""
    if is_packed_base(model):
        setattr(model.peft_config[name], _KEPT, record)


def check_fingerprint(found: str | None, base: PreTrainedModel, what: str, remedy: str) -> None:
    """Raises ValueError where a fingerprint is not that of the packed base."""
    expected = packing(base, "fingerprint")
    if found and expected and found != expected:
        raise ValueError(
            f"{what} belongs to another base: its fingerprint is {found[:16]}…, this model was packed from "
            f"{packing(base, 'base')} with fingerprint {expected[:16]}…. {remedy}"
        )


def _check_base(record: dict, base: PreTrainedModel, adapter: str) -> None:
    """
    Raises:
        ValueError: the adapter belongs to another base, to one of other bits, or to a packed one where this is dense.
    """
    remedy = "Load its own base, or pass any_base=True."
    check_fingerprint(record.get("fingerprint"), base, f"The adapter {adapter}", remedy)
    bits, here = record.get("nominal_bits"), packing(base, "nominal_bits")
    if here and record.get("converted_from", "lora") != "lora":
        raise ValueError(
            f"The adapter {adapter} was converted for the original of this base "
            f"(path_initial_model_for_weight_conversion): its start, {record['converted_from']}, which makes up for "
            "the quantisation, has been taken out. Load it on the original, save it without converting it, or pass "
            "any_base=True."
        )
    if bits and here and bits != here:
        raise ValueError(
            f"The adapter {adapter} was trained on the same base at {bits:.4f} nominal bits, this model has "
            f"{here:.4f}: an adapter also makes up for the errors of its own packing. {remedy}"
        )
    if bits and here is None and record.get("init") not in (None, "lora"):
        raise ValueError(
            f"The adapter {adapter} began as {record['init']} on {record.get('base')} at {bits:.4f} nominal bits: part "
            "of it makes up for the quantisation, and this model is dense. Load its packed base, or pass any_base=True "
            "for the same base dequantised."
        )


def _check_file(adapter: str | pathlib.Path, subfolder: str | None) -> None:
    """
    Raises:
        FileNotFoundError: a local folder with an adapter's configuration and no weights.
        ValueError: weights that are cut short.
    """
    folder = pathlib.Path(adapter) / (subfolder or "")
    if not (folder / "adapter_config.json").is_file():
        return  # on the hub, or PEFT says what is missing
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if weights.is_file():
        stored_tensors(weights)
    elif not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{folder} has an adapter_config.json and no {SAFETENSORS_WEIGHTS_NAME}.")


def _read_record(adapter: str | pathlib.Path, options: dict) -> dict:
    """The record of a local or hub adapter; empty where it has none. See `check_adapter` for the arguments.

    Raises:
        ValueError: a record that is not JSON.
    """
    folder = pathlib.Path(adapter) / (options.get("subfolder") or "")
    if folder.is_dir():
        path = folder / BASE_RECORD
        return read_json(path, "the record of an adapter's base") if path.exists() else {}
    path = None
    with contextlib.suppress(OSError):  # a hub that cannot be reached; PEFT says so better
        path = cached_file(
            str(adapter),
            BASE_RECORD,
            subfolder=options.get("subfolder") or "",
            **{name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None},
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return {} if path is None else read_json(pathlib.Path(path), "the record of an adapter's base")


def base_of(model: PeftModel | PreTrainedModel) -> torch.nn.Module:
    """The model below PEFT's wrappers, whatever adapters are loaded and active; a model without them is its own."""
    inner = getattr(model, "base_model", model) if isinstance(model, (PeftModel, PeftMixedModel)) else model
    return inner.model if isinstance(inner, (BaseTuner, AdaptionPromptModel)) else inner


def is_packed_base(model: PeftModel | PreTrainedModel) -> bool:
    return packing(base_of(model), "fingerprint") is not None


def check_adapter(model: PreTrainedModel, adapter: str | pathlib.Path, options: dict, any_base: bool) -> dict:
    """The record of an adapter that is about to be loaded.

    Args:
        model: with or without PEFT's wrappers.
        adapter: folder or name on the hub.
        options: as PEFT takes them, of which subfolder, revision, cache_dir, token and local_files_only count.
        any_base: do not ask whose base the adapter belongs to.

    Raises:
        ValueError: see `_check_base`; a record that is not JSON.
    """
    record = _read_record(adapter, options)
    if not any_base:
        _check_base(record, base_of(model), adapter)
    return record


def load_checked(
    model: PeftModel, adapter: str | pathlib.Path, name: str, load: Callable, options: dict, any_base: bool
):
    """What `PeftModel.load_adapter` does on a packed base; on a dense one `load`, unless the adapter belongs elsewhere.

    Raises:
        FileNotFoundError, ValueError: an adapter of another base, without weights or with damaged ones.
    """
    record = check_adapter(model, adapter, options, any_base)
    if not is_packed_base(model):
        return load()
    _check_file(adapter, options.get("subfolder"))
    with watch_keys(model) as seen:
        try:
            loaded = load()
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(f"The adapter {adapter} does not fit this model: {error}") from error
        except KeyError as error:  # PEFT looks the tensors of modules_to_save up
            if not is_saved_module(model, error.args[0]):
                raise
            raise ValueError(f"The adapter {adapter} lacks {error.args[0]}. It is damaged.") from error
    if model.peft_config[name].peft_type == PeftType.LORA:  # others share tensors, or keep them elsewhere
        for missing, unexpected in seen:
            check_keys(model, name, missing, unexpected, str(adapter))
    keep_record(model, name, record)
    return loaded


def check_loaded_by_transformers(model: PreTrainedModel, name: str, loading, what: str) -> None:
    """
    Args:
        model: a packed one, whose `load_adapter` has loaded an adapter.
        name: of the adapter.
        loading: what that returned; None before Transformers told.
        what: the adapter, for the message.

    Raises:
        ValueError: tensors of the adapter went past the model.
    """
    if loading is not None and model.peft_config[name].peft_type == PeftType.LORA:
        remedy = "Transformers does not read all that PEFT writes (DoRA): try PeftModel.from_pretrained."
        check_keys(model, name, set(loading.missing_keys), set(loading.unexpected_keys), what, remedy)


def write_records(model: PeftModel, folder: pathlib.Path, names: list[str], converted: bool = False) -> None:
    """Writes the record beside each of some adapters that were saved on a packed base.

    Args:
        model: with the adapters.
        folder: where they were saved.
        names: of the adapters.
        converted: PEFT took their start out (`path_initial_model_for_weight_conversion`). What is left belongs to the
            original, and to no packing of it: the start made up for the errors of that.
    """
    here = {name: packing(base_of(model), name) for name in ("base", "nominal_bits", "fingerprint")}
    for name in names:
        record = {**record_of(model, name), **here}
        if converted:
            start = record.get("init", "lora")
            record = {"base": here["base"], "fingerprint": here["fingerprint"], "converted_from": start}
        save_json(record, folder / ("" if name == "default" else name) / BASE_RECORD)
