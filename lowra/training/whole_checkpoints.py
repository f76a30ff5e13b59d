"""Checkpoints of the Trainer that are whole or not there, and the newest whole one to go on from.

The Trainer writes into CHECKPOINTS/.partial. When it has finished, a list of all files with their digests is added and
the folder is renamed into its place; only then an older one goes. So a killed run leaves whole checkpoints and, at
worst, something in .partial; what befalls a file later (a machine that lost its power, a copy cut short) is told by its
digest.
"""

import hashlib
import logging
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints.atomic import save_json
from ..checkpoints.guarded import read_json

logger = logging.getLogger(__name__)

KEPT = 2  # the newest, and one before it

_LIST = "whole.json"
_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_CHUNK_BYTES = 1 << 20


def partial_folder(checkpoints: pathlib.Path) -> pathlib.Path:
    """Where the Trainer writes the checkpoints that are to lie in `checkpoints` (its `output_dir`)."""
    return checkpoints / ".partial"


class WholeCheckpoints(TrainerCallback):
    """Moves each finished checkpoint into its place and removes older ones. Comes after callbacks that add files."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a run that goes on saves, evaluates and logs as it is told now, not as its checkpoint's run was
        state.compute_steps(args, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone()  # each process has a file of its own in it
        if not state.is_world_process_zero:
            return
        partial = pathlib.Path(str(args.output_dir))
        written = partial / f"checkpoint-{state.global_step}"
        files = {str(path.relative_to(written)): _digest(path) for path in _files(written)}
        save_json({"files": files}, written / _LIST)
        place = partial.parent / written.name
        put_in_place(written, place)
        keep_newest(partial.parent, state.global_step)


def newest_whole(checkpoints: pathlib.Path, warn: bool = True) -> pathlib.Path | None:
    """The newest checkpoint that is as it was written, or None; those that are not are named in a warning."""
    for step, path in _steps(checkpoints):
        fault = _fault(path, step)
        if fault is None:
            return path
        if warn:
            logger.warning("%s is not whole (%s) and is left out.", path, fault)
    return None


def keep_newest(checkpoints: pathlib.Path, newest: int) -> None:
    """Leaves the checkpoint of this step and what counts beside it, and removes the others."""
    # one of a later step was not whole, or the run would have gone on from there
    kept = [path for step, path in _steps(checkpoints) if step <= newest and (path / _LIST).exists()][:KEPT]
    for _, path in _steps(checkpoints):
        if path not in kept:
            remove_whole(path, partial_folder(checkpoints))


def put_in_place(finished: pathlib.Path, place: pathlib.Path) -> None:
    """Renames a finished folder; what is in its place goes at once and not file by file."""
    if place.exists():
        remove_whole(place, finished.parent)
    finished.rename(place)


def remove_whole(folder: pathlib.Path, partial: pathlib.Path) -> None:
    """Removes a folder by way of `partial`, so that a killed run leaves it or not, but not a part of it."""
    removed = partial / f"removed-{folder.name}"
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _steps(checkpoints: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Checkpoint folders with their optimiser steps, the newest first."""
    if not checkpoints.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir())
    return sorted(((int(match[1]), path) for match, path in named if match and path.is_dir()), reverse=True)


def _fault(checkpoint: pathlib.Path, step: int) -> str | None:
    """What differs from the list that was made when it was written."""
    if not (checkpoint / _LIST).is_file():
        return f"it has no {_LIST}, which is written last"
    try:
        files = read_json(checkpoint / _LIST, "the list of a checkpoint's files").get("files")
        state = read_json(checkpoint / _STATE, "the state of a training")
    except (OSError, ValueError) as error:
        return str(error)
    if not isinstance(files, dict) or _STATE not in files:
        return f"its {_LIST} is no list of its files"
    if state.get("global_step") != step:
        return f"its {_STATE} is of step {state.get('global_step')}"
    for name, digest in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        # the state is text that may be edited, and cut short it is no JSON
        if name != _STATE and _digest(path) != digest:
            return f"{name} was changed or cut short"
    return None


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
