"""`lowra verify`: whether a packed checkpoint is, byte for byte, what was written."""

import argparse

from ..checkpoints.dense import resolve_folder, safetensors_files
from ..checkpoints.integrity import DIGESTS_FILE, changed_settings, check_tensors, find_tensors, read_digests
from ..inspection.packed import PackedFolder


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="check every byte of a packed checkpoint against what was written",
        description="Reads a packed checkpoint through and checks names, shapes, every byte of its tensors and its "
        "config.json against what was written. Exit status 2, with the names, where something differs.",
    )
    parser.add_argument("model", metavar="DIR", help="folder or hub name of a packed checkpoint")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError, ValueError: no packed checkpoint, or one that is damaged or was changed.
    """
    folder = resolve_folder(args.model)
    packing = PackedFolder(args.model).config.packing
    recorded = read_digests(folder / DIGESTS_FILE)
    found = find_tensors(safetensors_files(folder))
    check_tensors(found, recorded, packing, folder)
    changes = [] if recorded is None else changed_settings(recorded, folder)
    if changes:
        raise ValueError(f"{folder / 'config.json'} was changed after the weights were written: {'; '.join(changes)}.")
    checked = "all" if recorded is not None else "none" if packing is None else "packed weights"
    print(f"{args.model}: {len(found.digests)} tensors; {_SAID[checked]}")
    return {"model": args.model, "tensors": len(found.digests), "checked": checked, "packing": found.packing}


_SAID = {
    "all": "every byte is as it was written",
    "packed weights": "the packed ones are as they were written, and of the others nothing is known without "
    f"{DIGESTS_FILE}",
    "none": "names, shapes and tables are in order, but an earlier version of lowra wrote them without "
    f"{DIGESTS_FILE}: whether a byte has changed cannot be told",
}
