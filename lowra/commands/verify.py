"""`lowra verify`: whether a packed checkpoint or an adapter is, byte for byte, what was written."""

import argparse
import pathlib

from ..adapters.labels import bytes_problem
from ..adapters.storage import PACKED_FILE, read_packed
from ..checkpoints.configs import CONFIG_FILE, variants_in
from ..checkpoints.hub import resolve_folder
from ..checkpoints.integrity import DIGESTS_FILE, changed_settings
from ..checkpoints.records import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    BASE_RECORD,
    check_adapter_folder,
    differences,
    read_record,
    record_of_base,
)
from ..inspection.packed import PackedFolder
from ..quantization.initial_adapter import ADAPTER_FOLDER


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError, ValueError: no packed checkpoint or adapter, or one that is damaged or was changed.
    """
    folder = resolve_folder(args.model)
    if (folder / PACKED_FILE).exists():
        checked, details = _packed_adapter(folder)
    elif (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        checked, details = _adapter(folder)
    else:
        checked, details = _checkpoint(folder, args.trust_remote_code)
    print(f"{args.model}: {_SAID[checked]}")
    return {"model": args.model, "checked": checked, **details}


def _checkpoint(folder: pathlib.Path, trust_remote_code: bool) -> tuple[str, dict]:
    checked, tensors, packing = [], 0, None
    for variant in (variants_in(folder) if (folder / CONFIG_FILE).is_file() else []) or [None]:
        content = PackedFolder(str(folder), trust_remote_code, variant)
        recorded, packing = content.recorded, content.found.packing
        _refuse_changes([] if recorded is None else changed_settings(recorded, folder), folder / CONFIG_FILE)
        described = content.config.packing
        checked.append("all" if recorded is not None else "no digests" if described is None else "packed weights")
        tensors += len(content.found.digests)
    adapter = None
    if (folder / ADAPTER_FOLDER).is_dir():
        adapter = _adapter(folder / ADAPTER_FOLDER)[0]
        _check_belongs(folder / ADAPTER_FOLDER, record_of_base(content.config))
    return max(checked, key=list(_SAID).index), {"tensors": tensors, "packing": packing, "initial_adapter": adapter}


def _check_belongs(adapter: pathlib.Path, here: dict) -> None:
    """Raises ValueError where the initial adapter of a checkpoint is that of another one."""
    there = read_record(adapter / BASE_RECORD) if (adapter / BASE_RECORD).is_file() else {}
    different, prints = differences(there, here), (there.get("fingerprint"), here["fingerprint"])
    if None not in prints and prints[0] != prints[1]:
        different = "of another original"
    if different:
        raise ValueError(
            f"{adapter} belongs to another packing than the checkpoint it stands in ({different}, there "
            "vs here): copy the whole checkpoint again."
        )


def _adapter(folder: pathlib.Path) -> tuple[str, dict]:
    known, changes = check_adapter_folder(folder)
    _refuse_changes(changes, folder / ADAPTER_CONFIG)
    files = [name for name in ADAPTER_FILES if (folder / name).exists()]
    return "all" if known else "no digests", {"files": files}


def _packed_adapter(folder: pathlib.Path) -> tuple[str, dict]:
    packed = read_packed(folder)
    if problem := bytes_problem(packed):
        raise ValueError(f"The packed adapter {folder} is damaged: {problem}.")
    return "all", {"sha256": packed.sha256}


def _refuse_changes(changes: list[str], path: pathlib.Path) -> None:
    if changes:
        raise ValueError(f"{path} was changed after what stands beside it was written: {'; '.join(changes)}.")


_SAID = {
    "all": "every byte is as it was written",
    "packed weights": "the packed weights are as they were written, and of the others nothing is known without "
    f"{DIGESTS_FILE}",
    "no digests": "names, shapes and tables are in order, but an earlier version of lowra wrote it, without digests: "
    "whether a byte has changed cannot be told",
}
