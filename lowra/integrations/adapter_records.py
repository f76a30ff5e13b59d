"""Whose base an adapter belongs to: the record beside it, and adapters that are refused when they are loaded.

The record is a file of its own, because adapter_config.json takes no new keys.
"""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft import AdaptionPromptModel, PeftMixedModel, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.guarded import read_json
from ..checkpoints.records import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    BASE_RECORD,
    CHANGES_FILE,
    TABLES_FILE,
    WITHOUT_TABLES,
    changed_settings,
    check_files,
    differences,
    read_record,
    record_in_weights,
    record_of_base,
    record_of_files,
    save_record,
)
from ..config import LowRAConfig
from ..nn.adapter_tables import adapter_tables, hold_adapter_tables
from ..nn.trained_tables import put_changes, read_changes, read_tables, save_tables_of
from .adapter_keys import check_keys, is_saved_module, watch_keys
from .adapter_places import check_settings, check_weights, file_of, reached
from .integrity import describe_again

logger = logging.getLogger(__name__)

_KEPT = "_lowra_record"  # attribute of a PeftConfig, which writes only its fields
UNKNOWN = {"init": "unknown"}  # all that is known of factors that came without a folder


@dataclasses.dataclass(frozen=True)
class Arriving:
    """What comes with an adapter beside its factors.

    Attributes:
        record: content of its record; empty where it has none.
        tables: levels and scales that were trained with it, as `AdapterTables.put` takes them, or None.
        changes: file of what its tables had learned, where the model is training tables of an adapter; None without.
    """

    record: dict
    tables: dict | None = None
    changes: pathlib.Path | None = None


def packing(model: nn.Module, name: str) -> Any:
    """`fingerprint` or another attribute of a packed base's LowRAConfig; None where the base is not packed."""
    return getattr(getattr(getattr(model, "config", None), "quantization_config", None), name, None)


def record_of(model: Any, name: str) -> dict:
    """What is known of the start of a loaded adapter: the content of its record; empty where it came with none."""
    return getattr(model.peft_config.get(name), _KEPT, {})


def has_arrived(model: nn.Module, name: str) -> bool:
    """Whether an adapter was loaded, with a record or without, and not made anew."""
    return hasattr(getattr(base_of(model), "peft_config", {}).get(name), _KEPT)


def settle(model: PeftModel, name: str, arriving: Arriving) -> None:
    """Keeps what came with an adapter that has been loaded; on a packed base only.

    The record goes with the adapter's configuration, so that it is where that is; the tables count while it is active.
    """
    if not is_packed_base(model):
        return
    keep_record(model.peft_config[name], arriving)
    held = adapter_tables(model) if arriving.tables is None else hold_adapter_tables(model)
    if held is None:
        return
    if held.in_training == name:  # a trainer that resumes, or takes the best of its checkpoints
        if arriving.changes is not None:
            put_changes(model, read_changes(model, arriving.changes))
        elif arriving.tables is not None:
            raise ValueError(
                f"Tables of adapter {name!r} are being trained, and what was loaded for it has {TABLES_FILE} without "
                f"{CHANGES_FILE}, with which training goes on: load it before train_tables, or after bake_tables."
            )
        return
    if arriving.tables is None:
        held.forget(name)
    else:
        held.put(name, arriving.tables)


def keep_record(config: Any, arriving: Arriving) -> None:
    """Keeps what is known of an adapter's start with its PeftConfig."""
    setattr(config, _KEPT, arriving.record)


def forget_tables(model: PeftModel, name: str) -> None:
    """Before an adapter is made: one of its name may have been deleted that had tables."""
    if (held := adapter_tables(model)) is not None:
        held.forget(name)


def refuse_inheriting(model: PeftModel, name: str) -> None:
    """Raises ValueError where an adapter is about to be made that would get the tables in training of one before it."""
    if (held := adapter_tables(model)) is not None and held.in_training == name:
        raise ValueError(
            f"Levels and scales are still being trained for an adapter {name!r} that was deleted, and would become the "
            "new one's: bake_tables(model) comes first, or give the new one another name."
        )


@contextlib.contextmanager
def tables_set_aside(model: PeftModel, name: str) -> Iterator[None]:
    """Takes the tables of an adapter away, and gives them back where the block fails."""
    held = adapter_tables(model)
    tables = {} if held is None else held.of_adapter(name)
    forget_tables(model, name)
    try:
        yield
    except BaseException:
        if tables and held is not None:
            held.put(name, tables)
        raise


def check_fingerprint(found: str | None, base: nn.Module, what: str, remedy: str) -> None:
    """Raises ValueError where a fingerprint is not that of the packed base."""
    expected = packing(base, "fingerprint")
    if found and expected and found != expected:
        raise ValueError(
            f"{what} belongs to another base: its fingerprint is {found[:16]}…, this model was packed from "
            f"{packing(base, 'base')} with fingerprint {expected[:16]}…. {remedy}"
        )


_ANY_BASE = "Load its own base; in Python any_base=True loads it on this one all the same."


def check_base(record: dict, base: Any, adapter: str | pathlib.Path, remedy: str = _ANY_BASE) -> None:
    """
    Args:
        record: of the adapter.
        base: a model, or what has a `config` like one.
        adapter: its folder or name, for messages.
        remedy: what to do, the end of a message.

    Raises:
        ValueError: the adapter belongs to another base, to one of other bits, or to a packed one where this is dense.
    """
    check_fingerprint(record.get("fingerprint"), base, f"The adapter {adapter}", remedy)
    bits, here, packed = record.get("nominal_bits"), packing(base, "nominal_bits"), is_packed_base(base)
    if packed and record.get("converted_from", "lora") != "lora":
        raise ValueError(
            f"The adapter {adapter} was converted for the original of this base "
            f"(path_initial_model_for_weight_conversion): its start, {record['converted_from']}, which makes up for "
            "the quantisation, has been taken out. Load it on the original, save it without converting it, or in "
            "Python pass any_base=True."
        )
    config: Any = base.config
    difference = differences(record, record_of_base(config.quantization_config)) if packed else None
    if bits and here and f"{bits:.4f}" != f"{here:.4f}":
        known = f" (another packing: {difference}, there vs here)" if difference else ""
        raise ValueError(
            f"The adapter {adapter} was trained on the same base at {bits:.4f} nominal bits, this model has "
            f"{here:.4f}{known}: an adapter also makes up for the errors of its own packing. {remedy}"
        )
    if difference:
        raise ValueError(
            f"The adapter {adapter} belongs to another packing of the same base ({difference}, there vs here): an "
            f"adapter also makes up for the errors of its own packing. {remedy}"
        )
    if bits and not packed and record.get("init") not in (None, "lora"):
        raise ValueError(
            f"The adapter {adapter} began as {record['init']} on {record.get('base')} at {bits:.4f} nominal bits: part "
            "of it makes up for the quantisation, and this model is dense. Load its packed base; in Python "
            "any_base=True is for the same base dequantised."
        )


def base_of(model: nn.Module) -> nn.Module:
    """The model below PEFT's wrappers, whatever adapters are loaded and active; a model without them is its own."""
    inner: Any = getattr(model, "base_model", model) if isinstance(model, (PeftModel, PeftMixedModel)) else model
    return inner.model if isinstance(inner, (BaseTuner, AdaptionPromptModel)) else inner


def is_packed_base(model: nn.Module) -> bool:
    return isinstance(getattr(getattr(base_of(model), "config", None), "quantization_config", None), LowRAConfig)


def check_adapter(model: nn.Module, adapter: str | pathlib.Path, options: dict, any_base: bool) -> Arriving:
    """What comes with an adapter that is about to be loaded.

    Args:
        model: with or without PEFT's wrappers.
        adapter: folder or name on the hub.
        options: as PEFT takes them, of which subfolder, revision, cache_dir, token and local_files_only count.
        any_base: do not ask whose base the adapter belongs to.

    Raises:
        ValueError: see `check_base`; a record that is not JSON, trained tables that do not fit the model.
    """
    if is_packed_base(model):
        check_settings(adapter, options)
        describe_again(base_of(model))
    path = file_of(adapter, BASE_RECORD, options)
    record = _record_that_was_lost(model, adapter, options, any_base) if path is None else read_record(path)
    if path is None and TABLES_FILE in (record.get("files") or {}) and file_of(adapter, TABLES_FILE, options) is None:
        raise ValueError(
            f"The adapter {adapter} was saved with {TABLES_FILE}, the levels and scales that were trained with it, and "
            f"with {BASE_RECORD}; both are missing, and without them its outputs are others. Copy the whole folder."
        )
    if not any_base:
        if path is not None:
            check_base(record, base_of(model), adapter)
        if not record and packing(base_of(model), "initial_adapter") is not None:
            warn_of_unknown_start(adapter)
    tables = file_of(adapter, TABLES_FILE, options)
    if tables is None or not (record or is_packed_base(model)):
        return Arriving(record)
    if not is_packed_base(model):
        raise ValueError(
            f"The adapter {adapter} was trained with levels and scales of its packed base ({TABLES_FILE}), and this "
            f"model is dense: load {record.get('base')} as it was packed, and lowra.merge_into_dense makes a dense "
            f"model of both; {WITHOUT_TABLES}."
        )
    held = adapter_tables(model)
    training = held is not None and held.in_training is not None
    changes = file_of(adapter, CHANGES_FILE, options) if training else None
    return Arriving(record, read_tables(model, tables), changes)


def warn_of_unknown_start(adapter: str | pathlib.Path) -> None:
    """Of an adapter without a record that is loaded on a base which was packed together with an initial adapter."""
    logger.warning(
        "lowra: the adapter %s has no %s, so nothing tells whether it was trained on this packing of its base, "
        "and from the start that holds a part of the weights. If it was not, the outputs are far off.",
        adapter,
        BASE_RECORD,
    )


def _record_that_was_lost(model: nn.Module, adapter: str | pathlib.Path, options: dict, any_base: bool) -> dict:
    """What an adapter's weights repeat of the record that is not beside them; that it was lost is told.

    It is no error: adapters are known to be passed on without it.
    """
    is_packed = is_packed_base(model)
    if not is_packed and not pathlib.Path(adapter).is_dir():
        return {}  # nothing is downloaded for dense models that PEFT would not
    record = record_in_weights(file_of(adapter, SAFETENSORS_WEIGHTS_NAME, options))
    if not record:
        return {}
    try:
        if not any_base:
            check_base(record, base_of(model), adapter)
    except ValueError as error:
        logger.warning("lowra: the adapter %s has no %s, and its weights tell: %s", adapter, BASE_RECORD, error)
    else:
        logger.warning("lowra: %s lacks its %s; what its weights repeat of it is used.", adapter, BASE_RECORD)
    return record


def check_saved(adapter: str | pathlib.Path, options: dict, record: dict) -> None:
    """Holds an adapter's files against its record; changed settings, which may be meant, are told.

    It comes after PEFT has found the tensors to fit, whose messages say more where they do not.

    Raises:
        ValueError: a tensor is another one than was saved, or a file is missing or of another adapter.
    """
    if record.get("files") is None:
        return
    check_files(record, {name: file_of(adapter, name, options) for name in ADAPTER_FILES}, str(adapter))
    config = file_of(adapter, ADAPTER_CONFIG, options)
    changes = [] if config is None else changed_settings(record, read_json(config, "an adapter's settings"))
    if changes:
        logger.warning(
            "lowra: %s of %s was changed after the adapter was saved: %s.", ADAPTER_CONFIG, adapter, "; ".join(changes)
        )


def load_checked(
    model: PeftModel, adapter: str | pathlib.Path, name: str, load: Callable, options: dict, any_base: bool
) -> Any:
    """What `PeftModel.load_adapter` does on a packed base; on a dense one `load`, unless the adapter belongs elsewhere.

    Raises:
        FileNotFoundError, ValueError: an adapter of another base, without weights or with damaged ones.
    """
    if not is_packed_base(model):
        check_adapter(model, adapter, options, any_base)
        return load()
    with reached(adapter, options, name not in model.peft_config):
        arriving = check_adapter(model, adapter, options, any_base)
        check_weights(adapter, options.get("subfolder"))
        with watch_keys(model) as seen:
            loaded = _load_fitting(model, adapter, load)
    if model.peft_config[name].peft_type == PeftType.LORA:  # others share tensors, or keep them elsewhere
        for missing, unexpected in seen:
            check_keys(model, name, missing, unexpected, str(adapter))
    check_saved(adapter, options, arriving.record)
    settle(model, name, arriving)
    return loaded


def _load_fitting(model: PeftModel, adapter: str | pathlib.Path, load: Callable) -> Any:
    """
    Raises:
        ValueError: tensors that do not fit the model, or are not there.
    """
    try:
        return load()
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        first = " ".join(line.strip() for line in str(error).splitlines()[:4])
        raise ValueError(f"The adapter {adapter} does not fit this model: {first}") from error
    except KeyError as error:  # PEFT looks the tensors of modules_to_save up
        if not is_saved_module(model, error.args[0]):
            raise
        raise ValueError(f"The adapter {adapter} lacks {error.args[0]}. It is damaged.") from error


def check_loaded_by_transformers(model: Any, name: str, loading: Any, what: str) -> None:
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
    for name in names:
        write_record(model, folder / ("" if name == "default" else name), name, converted)


def write_record(model: PeftModel | PreTrainedModel, folder: pathlib.Path, name: str, converted: bool = False) -> None:
    """Writes tables and record of one adapter into the folder that it was saved to."""
    base: Any = base_of(model)
    describe_again(base)
    here = record_of_base(base.config.quantization_config)
    _remove_outdated(folder)
    save_tables_of(base, name, folder)
    record = {**record_of(model, name), **here, **record_of_files(folder)}
    if converted:
        start = record.get("init", "lora")
        record = {"base": here["base"], "fingerprint": here["fingerprint"], "converted_from": start}
    save_record(record, folder)


def _remove_outdated(folder: pathlib.Path) -> None:
    """Removes the factors of an earlier save that PEFT would load instead of those just saved in the other format."""
    weights, pickled = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if weights.exists() and pickled.exists() and pickled.stat().st_mtime_ns > weights.stat().st_mtime_ns:
        logger.warning("lowra: %s of an earlier save gives way to %s, which was just saved.", weights, WEIGHTS_NAME)
        weights.unlink()


def refuse_losing_tables(model: PeftModel, names: Sequence[str], what: str, instead: str = "") -> None:
    """Raises ValueError where adapters have trained tables that `what` would leave behind; `instead` ends it."""
    held = adapter_tables(base_of(model))
    having = [] if held is None else [name for name in names if name in held.adapters]
    if having:
        raise ValueError(
            f"Adapter {having[0]!r} was trained with levels and scales of the packed base ({TABLES_FILE}), and {what} "
            f"would leave them behind{instead}; {WITHOUT_TABLES}."
        )
