"""The record beside an adapter: which packing of which base it belongs to, how it began, and what was written.

A file of its own, because adapter_config.json takes no new keys. It grew: records of earlier versions lack what stands
below `fingerprint`, and what they lack is not checked.

    base, nominal_bits, init, fingerprint
    packing     digests of the codes and of the tables of the packed base (lowra.weights.digests)
    recipe      what that packing was made with, so that a message can say how two of them differ
    start       digest of the adapter that training began with; for `merge_into_dense(initial=)`
    files       digests of the tensors in each file beside it
    settings    what adapter_config.json says of the numbers, where it is not PEFT's default

The header of the adapter's weights repeats it, where programs that know nothing of it leave it alone: an adapter of
which only PEFT's own two files were copied says what it lacks.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open

from ..config import FILLED_IN, LowRAConfig
from ..weights.digests import digest_of, joined
from .atomic import save_json, set_metadata
from .guarded import read_json
from .matching import count_and_names
from .reading import stored_tensors

BASE_RECORD = "lowra_base.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TABLES_FILE = "tables.safetensors"
CHANGES_FILE = "table_changes.safetensors"  # of tables that were being trained, to go on from
WITHOUT_TABLES = "an adapter that is trained with tables=frozen has none"  # the end of refusals on account of them
ADAPTER_FILES = (ADAPTER_WEIGHTS, TABLES_FILE)

# Numbers in adapter_config.json that do not change what a trained adapter computes.
_OF_TRAINING = ("inference_mode", "lora_dropout", "init_lora_weights", "total_step")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_REMEDY = ": it is damaged, or files of two adapters are mixed. Copy it again, or save it again where it is whole."
_IN_HEADER = "lowra_base"
_KINDS: dict[str, type | tuple[type, ...]] = {
    "base": str,
    "nominal_bits": (int, float),
    "init": str,
    "converted_from": str,
    "fingerprint": str,
    "packing": dict,
    "recipe": dict,
    "start": str,
    "files": dict,
    "settings": dict,
}


def check_trained(tensors: Iterable[tuple[str, torch.Tensor]], adapter: str | pathlib.Path) -> None:
    """
    Args:
        tensors: of an adapter, by name.
        adapter: their file or folder, for the message.

    Raises:
        ValueError: one holds NaN or infinite values.
    """
    for name, tensor in tensors:
        broken = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if broken:
            raise ValueError(
                f"Tensor {name} of {adapter} has {broken} NaN or infinite values of {tensor.numel()}: the training "
                "diverged. Take an earlier checkpoint, or train with a lower learning rate."
            )


def read_record(path: pathlib.Path) -> dict:
    """A record.

    Raises:
        OSError, ValueError: a file that cannot be read, or no record.
    """
    what = "the record of an adapter's base"
    record = read_json(path, what)
    for name in _KINDS:
        if not _is_of_its_kind(record, name):
            raise ValueError(f"{path} is damaged ({name} is {record[name]!r}); expected {what}. Copy it again.")
    return record


def _is_of_its_kind(record: dict, name: str) -> bool:
    value = record.get(name)
    return value is None or (isinstance(value, _KINDS[name]) and not isinstance(value, bool))


def record_of_base(config: LowRAConfig) -> dict:
    """What a record says of the packed base that has this config."""
    asked = {name: value for name, value in config.to_dict().items() if name not in (*FILLED_IN, "quant_method")}
    recipe = {**asked, "initial_adapter": config.initial_adapter, "calibration": config.calibration}
    return {
        "base": config.base,
        "nominal_bits": config.nominal_bits,
        "fingerprint": config.fingerprint,
        "packing": config.packing,
        "recipe": recipe,
    }


def record_of_files(folder: pathlib.Path) -> dict:
    """What a record says of what was written beside it."""
    files = {name: digests_of_file(folder / name) for name in ADAPTER_FILES if (folder / name).is_file()}
    return {"files": files, "settings": settings_of(read_json(folder / ADAPTER_CONFIG, "the config of an adapter"))}


def renew_record(folder: pathlib.Path) -> None:
    """Brings the record of a folder, if it has one, up to date with what has been written beside it since."""
    path = folder / BASE_RECORD
    if path.is_file():
        save_record({**read_record(path), **record_of_files(folder)}, folder)


def save_record(record: dict, folder: pathlib.Path) -> None:
    """Writes a record beside an adapter, and into the header of its weights.

    Raises:
        OSError: it cannot be written.
    """
    save_json(record, folder / BASE_RECORD)
    if (folder / ADAPTER_WEIGHTS).is_file():
        set_metadata(folder / ADAPTER_WEIGHTS, _IN_HEADER, json.dumps(record))


def record_in_weights(path: pathlib.Path | None) -> dict:
    """What the weights of an adapter repeat of its record; empty where they say nothing that can be read."""
    if path is None or not path.is_file():
        return {}
    with contextlib.suppress(ValueError, OSError, SafetensorError):
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(_IN_HEADER, "{}"))
        if isinstance(record, dict) and all(_is_of_its_kind(record, name) for name in _KINDS):
            return record
    return {}


def record_of_folder(folder: pathlib.Path) -> dict:
    """The record of a local adapter, from its file or, where that was lost, its weights; empty where it has none.

    Raises:
        OSError, ValueError: a file that cannot be read, or no record.
    """
    path = folder / BASE_RECORD
    return read_record(path) if path.exists() else record_in_weights(folder / ADAPTER_WEIGHTS)


def digests_of_file(path: pathlib.Path) -> dict[str, str]:
    """Digests by name of the tensors in a file of an adapter."""
    content = path.read_bytes()
    return {
        place.key: digest_of(place.stored_as, place.shape, content[place.start : place.stop])
        for place in stored_tensors(path)
    }


def digest_of_adapter(path: pathlib.Path) -> str:
    """One digest of all tensors in a file of an adapter, whatever they are called."""
    return joined(sorted(digests_of_file(path).values()))


def settings_of(config: dict) -> dict:
    """Numbers of an adapter_config.json that are not PEFT's defaults."""
    kinds: dict[Any, type] = dict(PEFT_TYPE_TO_CONFIG_MAPPING)  # by names as well as by their enumeration
    kind = kinds.get(config.get("peft_type"))
    defaults = {} if kind is None else {field.name: field.default for field in dataclasses.fields(kind)}
    return {
        name: value
        for name, value in config.items()
        if (isinstance(value, (bool, int, float)) and value != defaults.get(name) or name in _PATTERNS and value)
        and name not in _OF_TRAINING
    }


def check_files(record: dict, paths: dict[str, pathlib.Path | None], adapter: str) -> None:
    """Holds the files of an adapter against its record.

    Args:
        record: of the adapter.
        paths: where each file is; None for one that is not there.
        adapter: what the message calls it.

    Raises:
        ValueError: a file is missing or was not written with it, or a tensor is another one than was written.
    """
    written = record.get("files")
    if written is None:
        return
    for name, path in paths.items():
        expected = written.get(name)
        if path is None or expected is None:
            if path is not None or expected is not None:
                state = "has lost its" if path is None else "was saved without the"
                raise ValueError(f"The adapter {adapter} {state} {name}{_REMEDY}")
            continue
        if not isinstance(expected, dict):
            raise ValueError(f"The record of {adapter} is damaged: `files` of {name} is no list of digests{_REMEDY}")
        found = digests_of_file(path)
        for names, what in (
            (expected.keys() - found.keys(), "lacks"),
            (found.keys() - expected.keys(), "holds, though they were not saved with it,"),
            ({key for key in found if found[key] != expected.get(key)}, "has other bytes than were saved in"),
        ):
            if names:
                raise ValueError(f"The adapter {adapter} {what} {count_and_names(names)} of {name}{_REMEDY}")


def check_adapter_folder(folder: pathlib.Path) -> tuple[bool, list[str]]:
    """Holds an adapter's folder against its record.

    Returns:
        whether there is a record that tells what was saved, and see `changed_settings`.

    Raises:
        OSError, ValueError: see `check_files`; a record that is none.
    """
    record = record_of_folder(folder)
    paths = {name: folder / name if (folder / name).exists() else None for name in ADAPTER_FILES}
    check_files(record, paths, str(folder))
    changes = changed_settings(record, read_json(folder / ADAPTER_CONFIG, "an adapter's settings"))
    return record.get("files") is not None, changes


def changed_settings(record: dict, config: dict) -> list[str]:
    """How adapter_config.json differs from when the adapter was saved, such as "lora_alpha is 9 and was 8"."""
    then, now = record.get("settings"), settings_of(config)
    if then is None:
        return []
    names = sorted(name for name in {*then, *now} if then.get(name, "as by default") != now.get(name, "as by default"))
    words = {name: [side.get(name, "PEFT's default") for side in (now, then)] for name in names}
    return [f"{name} is {is_} and was {was}" for name, (is_, was) in words.items()]


def differences(there: dict, here: dict) -> str | None:
    """How the packings of two records differ, in words; None where they do not, or where one of them does not tell.

    Such as "rank 8 vs 16, refine=0 vs 2".
    """
    one, other = there.get("packing"), here.get("packing")
    if not isinstance(one, dict) or not isinstance(other, dict) or one == other:
        return None
    recipes = [side.get("recipe") for side in (there, here)]
    then, now = (recipe if isinstance(recipe, dict) else {} for recipe in recipes)
    found = _of_adapters(then.get("initial_adapter"), now.get("initial_adapter"))
    shared = [name for name in then if name in now and name not in ("initial_adapter", "calibration")]
    found += [f"{name}={then[name]} vs {now[name]}" for name in shared if then[name] != now[name]]
    texts = then.get("calibration"), now.get("calibration")
    if texts[0] != texts[1]:
        found.append("calibrated with other text" if all(texts) else "calibrated vs not calibrated")
    if found:
        return ", ".join(found)
    if one.get("codes") == other.get("codes"):
        return "the same codes with other levels and scales: tables were trained into one of the two"
    return "other codes by the same recipe: packed on another device, or by another version of lowra or PyTorch"


def _of_adapters(there: dict | None, here: dict | None) -> list[str]:
    """How the initial adapters of two packings differ, which the packed weights are fitted to."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        names = ["no initial adapter" if not side else f"rank {side.get('rank')}" for side in (there, here)]
        return [] if there == here else [" vs ".join(names)]
    return [
        f"{name} {there.get(name)} vs {here.get(name)}"
        for name in ("rank", "method", "alpha", "steps")
        if there.get(name) != here.get(name)
    ]
