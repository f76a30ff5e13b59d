"""The tensors of a checkpoint and their places in a model, by Transformers' own renamings; only headers are read."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .guarded import open_tensors


@dataclasses.dataclass
class TensorMatch:
    """One tensor of a checkpoint and its place in a model.

    Attributes:
        key: its name in the file.
        name: of the model's tensor that it becomes or is converted into; None where the model has no place for it.
        pattern: what `key` matched in `converter`, or `key` itself.
        converter: Transformers' conversion, for tensors that are merged or split while loading.
        reader: loads the tensor.
    """

    key: str
    name: str | None
    pattern: str
    converter: WeightConverter | None
    reader: "Reader"


def match_tensors(
    files: list[pathlib.Path],
    model: PreTrainedModel,
    placed: dict[str, str] | None = None,
    needed: set[str] | None = None,
) -> list[TensorMatch]:
    """Places the tensors of a checkpoint in the model, by Transformers' own renamings; reads headers only.

    Args:
        files: of the checkpoint.
        model: its parameters may be on "meta".
        placed: model names by the names in the files, of tensors whose place is known; left out of the result.
        needed: names that must be there; None needs all but those that the model's class does without.

    Raises:
        ValueError: a file is cut short, or tensors that the model needs are missing.
    """
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    placed = placed or {}
    matches, provided = [], set(placed.values())
    unplaced = (item for item in _tensors(files) if item[0] not in placed)
    for key, reader in sorted(unplaced, key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if name not in expected:
            matches.append(TensorMatch(key, None, key, None, reader))
            continue
        provided.add(name)
        converter = None if pattern is None else by_pattern[pattern]
        if converter is not None:
            first, *others = converter.target_patterns
            provided.update(name.replace(first, other) for other in others)
        matches.append(TensorMatch(key, name, pattern or key, converter, reader))
    ties = getattr(model, "all_tied_weights_keys", {})
    provided.update(source for tied, source in ties.items() if tied in provided)
    optional = _any_of({*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())})
    missing = {
        name
        for name in (expected if needed is None else needed)
        if name not in provided and name not in ties and not optional.search(name)
    }
    if missing:
        raise ValueError(
            f"The checkpoint lacks {count_and_names(missing)} that {type(model).__name__} needs. Download it again or "
            "check that config.json belongs to it."
        )
    return matches


def check_packed_names(
    files: list[pathlib.Path], model: PreTrainedModel, packed: dict[str, str], shapes: bool = False
) -> None:
    """Holds the tensors of a packed checkpoint against its model, whose layers are packed already (on "meta").

    Transformers itself fills a missing tensor with random numbers and leaves an unknown one out, with a warning.

    Args:
        files: of the checkpoint.
        model: with packed layers.
        packed: model names of the packed tensors by their names in the files.
        shapes: hold the shapes of the others against the model too; Transformers does that unless it is told not to.

    Raises:
        ValueError: a tensor that the model needs is missing, one has no place in it, or another shape.
    """
    matches = match_tensors(files, model, packed)
    unknown = unplaced(matches, model)
    if unknown:
        raise ValueError(
            f"The packed checkpoint holds {count_and_names(unknown)} that {type(model).__name__} has no place for: "
            "files of two checkpoints are mixed, or config.json (modules_to_not_convert) was changed. Write it again "
            "with `lowra quantize`."
        )

    if shapes:
        list(check_shapes(matches, model))


def unplaced(matches: list[TensorMatch], model: PreTrainedModel) -> list[str]:
    """Names in the files that the model has no place for, but for those that its class is known to leave out."""
    # rotary caches of old checkpoints, which Transformers leaves out too
    ignored = _any_of({*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"})
    return [match.key for match in matches if match.name is None and not ignored.search(match.key)]


def check_shapes(matches: list[TensorMatch], model: PreTrainedModel) -> Iterator[tuple[TensorMatch, str]]:
    """Every tensor that has a place, with its type as safetensors calls it.

    Raises:
        ValueError: one that is not converted while loading has another shape than the model's.
    """
    expected = model.state_dict()
    by_file: dict[pathlib.Path, list[TensorMatch]] = {}
    for match in matches:
        if match.name is not None:
            by_file.setdefault(match.reader.path, []).append(match)
    for path, members in by_file.items():
        with open_tensors(path, "weights of a checkpoint") as content:
            for match in members:
                header = content.get_slice(match.key)
                if match.converter is None:
                    check_shape(match.key, header.get_shape(), expected[str(match.name)].shape, model)
                yield match, header.get_dtype()


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int], model: PreTrainedModel) -> None:
    if list(shape) != list(expected):
        raise ValueError(
            f"Tensor {name} has shape {list(shape)}, but {type(model).__name__} of this config.json expects "
            f"{list(expected)}."
        )


def _any_of(patterns: set[str]) -> re.Pattern:
    return re.compile("|".join(patterns or ["(?!)"]))


def count_and_names(names: Iterable[str]) -> str:
    """Such as "2 tensor(s): a, b"."""
    names = sorted(names)
    return f"{len(names)} tensor(s): {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _tensors(files: list[pathlib.Path]) -> Iterator[tuple[str, "Reader"]]:
    for path in files:
        with open_tensors(path, "weights of a checkpoint") as content:
            keys = list(content.keys())
        for key in keys:
            yield key, Reader(path, key)


class Reader:
    """Loads one tensor when called; the file is opened anew, so no mapping keeps its pages alive."""

    def __init__(self, path: pathlib.Path, key: str):
        self.path, self.key = path, key

    def __call__(self) -> torch.Tensor:
        with open_tensors(self.path, "weights of a checkpoint") as content:
            return content.get_tensor(self.key)
