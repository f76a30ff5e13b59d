"""Whether a packed checkpoint is what was written: a digest of every tensor, kept in `lowra_digests.json`.

    {"algorithm": "xxh3_128", "tensors": {name: digest}, "config": the content of config.json,
     "files": {name: digest of the whole}, "packing": what the tensors are together}

Where the files are the same, so is every tensor, and a load looks no further. It stands beside the weights and not in
their headers, where a program that writes the weights anew would lose it. Weights of
`save_pretrained(variant="fp16")` have one of their own, `lowra_digests.fp16.json`. A checkpoint of an earlier version,
without it or without `files`, loads as it always did; its tables are checked all the same.
"""

import concurrent.futures
import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from bitsandbytes.backends.lowra import layout

from ..config import LowRAConfig
from ..weights.digests import ALGORITHM, canonical_digest, digest_of, packing_of_digests
from ..weights.packed import TABLES, TENSOR_NAMES, row_counts
from .atomic import save_json
from .configs import of_variant
from .guarded import read_json
from .matching import count_and_names
from .reading import StoredTensor
from .whole_files import OpenFiles

logger = logging.getLogger(__name__)

DIGESTS_FILE = "lowra_digests.json"

_THREADS = min(4, os.cpu_count() or 1)
_REMEDY = "Copy or download the checkpoint again, or write it again with `lowra quantize`."
_LONG = 80  # characters of a value in a message
_OF_PROGRAMS = ("transformers_version",)  # in config.json


@dataclasses.dataclass(frozen=True)
class FoundTensors:
    """What the files of a packed checkpoint hold.

    Attributes:
        digests: of every tensor by name.
        packing: see `lowra.weights.digests.packing_of_digests`.
        not_ascending: names of levels that do not ascend, as all do until they are trained.
    """

    digests: dict[str, str]
    packing: dict[str, str]
    not_ascending: list[str]


def known_tensors(files: OpenFiles, recorded: dict | None) -> FoundTensors:
    """What files hold: as it was recorded where they are, byte for byte, those that were written; else `find_tensors`.

    Raises:
        ValueError: see there; tables are looked at whatever the digests say.
    """
    if recorded is None or not recorded.get("files") or not isinstance(recorded.get("packing"), dict):
        return find_tensors(files)
    if {place.key for place in files.places} != recorded["tensors"].keys() or recorded["files"] != files.digests():
        return find_tensors(files)
    _refuse_not_finite(files.not_finite_tables(TABLES))
    return FoundTensors(dict(recorded["tensors"]), dict(recorded["packing"]), [])


def noted_tensors(files: OpenFiles, recorded: dict) -> FoundTensors:
    """What files should hold by their headers and by what was recorded, before their bytes are read; tables are.

    Raises:
        ValueError: a table holds NaN or infinite values.
    """
    _refuse_not_finite(files.not_finite_tables(TABLES))
    digests = {place.key: recorded["tensors"].get(place.key, "") for place in files.places}
    return FoundTensors(digests, dict(recorded["packing"]), [])


def find_tensors(files: OpenFiles) -> FoundTensors:
    """Reads every byte of a checkpoint's tensors, on a few threads.

    Raises:
        ValueError: two files hold a tensor of the same name, or a table holds NaN or infinite values.
    """
    places: dict[str, StoredTensor] = {}
    for place in files.places:
        if place.key in places:
            raise ValueError(
                f"{place.key} stands in {places[place.key].path.name} and in {place.path.name}: files of two "
                f"checkpoints are mixed. {_REMEDY}"
            )
        places[place.key] = place
    modules = [key.removesuffix(".row_bits") for key in places if key.endswith(".row_bits")]
    weights = [
        {leaf: places.pop(f"{module}.{leaf}") for leaf in TENSOR_NAMES if f"{module}.{leaf}" in places}
        for module in modules
    ]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        packed = list(threads.map(lambda weight: _read_packed(weight, files), weights))
        dense = list(threads.map(lambda place: _digest(place, files), places.values()))
    _refuse_not_finite([name for weight in packed for name in weight.not_finite])
    digests = dict(zip(places, dense, strict=True))
    for weight in packed:
        digests.update(weight.digests)
    return FoundTensors(
        digests=digests,
        packing=packing_of_digests(weight.canonical for weight in packed),
        not_ascending=[name for weight in packed for name in weight.not_ascending],
    )


def _refuse_not_finite(names: list[str]) -> None:
    if names:
        raise ValueError(f"NaN or infinite values stand in {count_and_names(names)}. {_REMEDY}")


def write_digests(folder: pathlib.Path, files: OpenFiles, found: FoundTensors, variant: str | None = None) -> None:
    """Writes what was found in a finished checkpoint, or a variant of it, beside it, with a copy of its config.json."""
    config = read_json(folder / "config.json", "the config of the checkpoint")
    content = {
        "algorithm": ALGORITHM,
        "tensors": found.digests,
        "config": config,
        "files": files.digests(),
        "packing": found.packing,
    }
    save_json(content, folder / of_variant(DIGESTS_FILE, variant))


def read_digests(path: pathlib.Path) -> dict | None:
    """The content of a checkpoint's `lowra_digests.json`; None where it has none.

    Raises:
        ValueError: a file that is damaged, or of a later version.
    """
    if not path.exists():
        return None
    what = "the digests of a packed checkpoint"
    content = read_json(path, what)
    if content.get("algorithm") != ALGORITHM:
        raise ValueError(
            f"{path} has digests of the kind {content.get('algorithm')!r}, this lowra knows {ALGORITHM}: install the "
            "version of lowra that wrote it."
        )
    if not isinstance(content.get("tensors"), dict) or not isinstance(content.get("config"), dict):
        raise ValueError(f"{path} is damaged: it lacks `tensors` or `config`; expected {what}.")
    return content


def check_tensors(
    found: FoundTensors,
    recorded: dict | None,
    config: LowRAConfig,
    folder: pathlib.Path,
    variant: str | None = None,
) -> None:
    """Holds what was found against what was written.

    Args:
        found: in the files.
        recorded: the content of `lowra_digests.json`, or None.
        config: what config.json says of the packing; `packing` is None for checkpoints of an earlier version.
        folder: of the checkpoint.
        variant: of its weights, if any.

    Raises:
        ValueError: a tensor is another one than was written, missing or too many, or would be read otherwise.
    """
    packing = config.packing
    if recorded is not None:
        written = recorded["config"].get("quantization_config")
        was = written.get("group_size", config.group_size) if isinstance(written, dict) else config.group_size
        if was != config.group_size:
            raise ValueError(
                f"{folder / 'config.json'} says groups of {config.group_size} and the weights were packed in groups of "
                f"{was}, so that they would be others: put {was} back."
            )
        expected = recorded["tensors"]
        for names, what in (
            ([name for name in expected if name not in found.digests], "lacks"),
            ([name for name in found.digests if name not in expected], "holds, though they were not written with it,"),
            (
                [name for name in expected if found.digests.get(name, expected[name]) != expected[name]],
                "has other bytes than were written in",
            ),
        ):
            if names:
                raise ValueError(f"The packed checkpoint {folder} {what} {count_and_names(names)}. {_REMEDY}")
    if recorded is not None and recorded.get("packing", found.packing) != found.packing:
        raise ValueError(
            f"{folder / of_variant(DIGESTS_FILE, variant)} was not written with the weights beside it (packing): files "
            f"of two checkpoints are mixed. {_REMEDY}"
        )
    if packing is not None and packing != found.packing:
        raise ValueError(
            f"The packed weights in {folder} are not those that its config.json was written with (quantization_config."
            f"packing): they are damaged, or files of two checkpoints are mixed. {_REMEDY}"
        )
    if recorded is None and packing is not None:
        logger.warning(
            "lowra: %s has lost its %s, so only its packed weights could be checked, not what is dense.",
            folder,
            of_variant(DIGESTS_FILE, variant),
        )
    if recorded is None and packing is None and found.not_ascending:
        logger.warning(
            "lowra: the levels do not ascend in %s. Trained tables need not; if none were trained, %s is damaged.",
            count_and_names(found.not_ascending),
            folder,
        )


def changed_settings(recorded: dict, folder: pathlib.Path) -> list[str]:
    """How config.json differs from when the weights were written, such as "rms_norm_eps is 1e-05 and was 1e-06"; of
    what is nested the fields that differ.

    Such changes may be meant (a longer context), so they are told and not refused.
    """
    path = folder / "config.json"
    if not path.is_file():
        return []
    now, then = read_json(path, "the config of the checkpoint"), recorded["config"]
    return [f"{name} is {_short(is_)} and was {_short(was)}" for name, is_, was in _differing(now, then)]


def _differing(now: dict, then: dict, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Names of fields, dotted where they are nested, and both values."""
    for name in {**then, **now}:
        is_, was = now.get(name), then.get(name)
        if is_ == was or name in _OF_PROGRAMS:
            continue
        if isinstance(is_, dict) and isinstance(was, dict):
            yield from _differing(is_, was, f"{above}{name}.")
        else:
            yield f"{above}{name}", is_, was


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


@dataclasses.dataclass
class _PackedContent:
    """One packed weight: digests by name, canonical digests by leaf, and what is wrong with its tables."""

    digests: dict[str, str]
    canonical: dict[str, str]
    not_finite: list[str]
    not_ascending: list[str]


def _read_packed(weight: dict[str, StoredTensor], files: OpenFiles) -> _PackedContent:
    content = _PackedContent({}, {}, [], [])
    tables: dict[str, torch.Tensor] = {}
    for leaf, place in weight.items():
        content.digests[place.key] = content.canonical[leaf] = _digest(place, files)
        if leaf in TABLES and place.dtype is not None and place.dtype.is_floating_point or leaf == "row_bits":
            tables[leaf] = _tensor(place, files)
    for leaf, table in tables.items():
        if leaf != "row_bits":
            content.canonical[leaf] = canonical_digest(table)
            if table.numel() and not torch.stack(table.aminmax()).isfinite().all():
                content.not_finite.append(weight[leaf].key)
    if "levels" in tables and not _ascend(tables["levels"], tables["row_bits"]):
        content.not_ascending.append(weight["levels"].key)
    return content


def _ascend(levels: torch.Tensor, row_bits: torch.Tensor) -> bool:
    """Whether the levels of every row ascend; true for sizes that do not fit, which others refuse."""
    counts = row_bits.numel(), *row_counts(row_bits)
    if layout.levels_size(*counts) != levels.numel():
        return True
    for segment in layout.segments(*counts, in_features=0):
        table = levels[segment.levels_of(segment.first, segment.end)].view(-1, 2**segment.bits)
        if (table[:, 1:] < table[:, :-1]).any():
            return False
    return True


def _digest(place: StoredTensor, files: OpenFiles) -> str:
    return digest_of(place.stored_as, place.shape, files.bytes_of(place))


def _tensor(place: StoredTensor, files: OpenFiles) -> torch.Tensor:
    if place.dtype is None:
        raise ValueError(f"{place.key} is stored as {place.stored_as}, which no packed weight is. {_REMEDY}")
    owned = files.bytes_of(place).copy()
    return torch.from_numpy(owned).view(place.dtype).view(place.shape)
