"""The folder in which a quantisation is made, `OUTPUT.partial`: finished pieces on disk, so that a killed run resumes.

    recipe.json   what the folder was begun for
    text/         what the model has written for its calibration, before there is a recipe
    learned/      tables of each matrix
    adapter/      factors of the initial adapter on each matrix
    pieces/       packed and dense tensors of each conversion of the source
    trained_adapter/, trained_pieces/   the same of matrices whose blocks were trained
    end_to_end/   how far the training of all blocks together has come
    joint_adapter/, joint_pieces/   the same of matrices after that
    final/        the checkpoint that is being put together

Every piece carries the digest of the recipe it was made by, and is taken for that recipe alone: wherever a run was
killed, also while it cleared another one's pieces, nothing of two recipes comes together.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable

import torch

from ..checkpoints.atomic import LOCK_FILE, move_folder, save_json, save_tensors
from ..checkpoints.guarded import open_tensors, read_json
from ..checkpoints.places import WORK_SUFFIX

logger = logging.getLogger(__name__)

LEARNED, ADAPTER, PIECES = "learned", "adapter", "pieces"
TRAINED_ADAPTER, TRAINED_PIECES = "trained_adapter", "trained_pieces"
END_TO_END, JOINT_ADAPTER, JOINT_PIECES = "end_to_end", "joint_adapter", "joint_pieces"
_KINDS = (LEARNED, ADAPTER, PIECES, TRAINED_ADAPTER, TRAINED_PIECES, END_TO_END, JOINT_ADAPTER, JOINT_PIECES)
_RECIPE_FILE = "recipe.json"
_TEXT, _FINAL = "text", "final"
_OWN = {_RECIPE_FILE, f"{_RECIPE_FILE}.tmp", LOCK_FILE, *_KINDS, _TEXT, _FINAL}


class WorkFolder:
    """Pieces of one recipe.

    Attributes:
        folder: where they lie.
        final: where the finished checkpoint is put together.
        text: where text is kept that the model has written.
    """

    def __init__(self, place: pathlib.Path):
        """Takes the name of the folder beside `place`, where the finished checkpoint will go; writes nothing.

        Raises:
            ValueError: a folder of this name holds files of others, which clearing it would delete.
        """
        self.place = place
        self.folder = place.with_name(place.name + WORK_SUFFIX)
        self.final, self.text = self.folder / _FINAL, self.folder / _TEXT
        self._digest = ""
        others = {path.name for path in self.folder.iterdir()} - _OWN if self.folder.is_dir() else set()
        if others:
            raise ValueError(
                f"{self.folder}, in which {place.name} is to be made, holds {sorted(others)[0]}, which is not lowra's: "
                "move it away, or give another output."
            )

    def begin(self, recipe: dict) -> bool:
        """Keeps the pieces of an earlier run of this recipe, and deletes those of another.

        Args:
            recipe: all that the pieces depend on, as JSON takes it.

        Returns:
            whether there was an earlier run of this recipe.
        """
        self._digest = _digest(recipe)
        begun = self.folder / _RECIPE_FILE
        goes_on = self._begun_for_this(begun)
        if not goes_on:
            self._warn_of_loss(begun, recipe)
            begun.unlink(missing_ok=True)  # first, so that a kill in between leaves nothing that looks like this one's
            for kind in _KINDS:
                _remove(self.folder / kind)
        save_json(recipe, begun)
        _remove(self.final)
        return goes_on

    def _warn_of_loss(self, begun: pathlib.Path, recipe: dict) -> None:
        """Says that an earlier run's pieces go: they may have taken hours, and only a mistyped option may differ."""
        if not any(path.is_file() for kind in _KINDS for path in (self.folder / kind).rglob("*")):
            return
        try:
            then = _flat(read_json(begun, "the recipe of an earlier run"))
        except (FileNotFoundError, ValueError):
            return
        now = _flat(recipe)
        changed = [f"{name}={_word(then.get(name))}" for name in {**then, **now} if then.get(name) != now.get(name)]
        logger.warning(
            "%s holds what an unfinished run had done, with %s; this run differs: that is deleted, it begins anew.",
            self.folder,
            ", ".join(changed),
        )

    def _begun_for_this(self, begun: pathlib.Path) -> bool:
        try:
            return _digest(read_json(begun, "the recipe of an earlier run")) == self._digest
        except (FileNotFoundError, ValueError):  # killed while it cleared, or a disk that lost the end of a file
            return False

    def has_text(self) -> bool:
        """Whether an earlier run has written text."""
        return self.text.is_dir() and any(self.text.iterdir())

    def path(self, kind: str, name: str) -> pathlib.Path:
        """The file of a piece."""
        return self.folder / kind / f"{name}.safetensors"

    def has(self, kind: str, name: str) -> bool:
        """Whether a piece of this recipe is finished."""
        try:
            with open_tensors(self.path(kind, name), "a piece of an earlier run") as content:
                return (content.metadata() or {}).get("recipe") == self._digest
        except (FileNotFoundError, ValueError):  # not there, or damaged: it is made again
            return False

    def save(
        self, kind: str, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """Writes a piece."""
        save_tensors(tensors, self.path(kind, name), {**(metadata or {}), "format": "pt", "recipe": self._digest})

    def finish(self) -> None:
        """Renames the finished checkpoint to its place, and removes the rest.

        Raises:
            OSError: something came to be there meanwhile; the finished checkpoint stays in `final`.
        """
        move_folder(self.final, self.place)
        try:
            self.clear()
        except OSError as error:  # the checkpoint is where it should be
            logger.warning("lowra: %s is finished; what is left in %s can go (%s).", self.place, self.folder, error)

    def clear(self) -> None:
        """Removes the folder."""
        _remove(self.folder)


def identities(files: Iterable[pathlib.Path]) -> list[list]:
    """Where files lie, how large they are and when they were written, as JSON takes it: others are other ones."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _digest(recipe: dict) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _remove(folder: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _flat(recipe: dict) -> dict:
    """The recipe with the options of its two parts beside the rest."""
    parts = {part: recipe.get(part) or {} for part in ("config", "adapter")}
    options = {name: value for part in parts.values() for name, value in part.items()}
    return {name: value for name, value in recipe.items() if name not in parts} | options


def _word(value: object) -> str:
    """An option's value; of a digest or a list of files only that it is another."""
    return "none" if value is None else str(value) if len(str(value)) <= 20 else "another"
