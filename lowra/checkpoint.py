"""Dense checkpoints read tensor by tensor, under the names the model will know them by. Only safetensors are read."""

import copy
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def resolve_folder(model: str) -> pathlib.Path:
    """A local folder as it is, or the snapshot of a hub name.

    Raises:
        FileNotFoundError: neither a folder nor a name the hub knows.
    """
    folder = pathlib.Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise FileNotFoundError(f"{model} is not a folder with a model in it.")
    try:
        return pathlib.Path(snapshot_download(str(model), allow_patterns=_PATTERNS))
    except Exception as error:
        raise FileNotFoundError(
            f"{model} is neither a local folder nor could it be had from the hub: {error}"
        ) from error


def safetensors_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weight files of a checkpoint, in the order of its index where it has one.

    Raises:
        FileNotFoundError: no safetensors files, or one that the index names is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = list(dict.fromkeys(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).exists():
            others = sorted(path.name for path in folder.glob("*.bin"))
            raise FileNotFoundError(
                f"{folder} has no {name}"
                + (
                    f" (pickled files such as {others[0]} are not read: convert them to safetensors)."
                    if others
                    else "."
                )
            )
    return [folder / name for name in names]


def empty_model(folder: pathlib.Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint on "meta": shapes and names, no weights."""
    config = AutoConfig.from_pretrained(folder)
    for name in config.architectures or []:
        if hasattr(transformers, name):
            with torch.device("meta"):
                return getattr(transformers, name)._from_config(config, dtype=dtype or config.dtype or torch.float32)
    raise ValueError(
        f"{folder / 'config.json'} names the architectures {config.architectures}, none of which Transformers "
        f"{transformers.__version__} has."
    )


class DenseCheckpoint:
    """The tensors of a dense checkpoint under model names, one at a time.

    Transformers' own renamings and conversions (merged experts, old prefixes) are applied, lazily, so that memory holds
    what one conversion needs.
    """

    def __init__(self, files: list[pathlib.Path], model: PreTrainedModel):
        """Reads headers only.

        Raises:
            ValueError: a file is cut short, or tensors the model needs are missing.
        """
        self.model = model
        self._expected = model.state_dict()
        self._mappings: dict[str, WeightRenaming | WeightConverter] = {}
        matches = match_tensors(files, model)
        ties = getattr(model, "all_tied_weights_keys", {})
        present = {match.name for match in matches}
        for match in matches:
            if match.name is None:
                continue  # rotary caches and the like that the model does not keep
            name = match.name
            if name in ties and ties[name] not in present:  # some checkpoints hold a tied weight as the head alone
                name = ties[name]
            made_by = WeightRenaming(match.key, name) if match.converter is None else match.converter
            mapping = self._mappings.setdefault(name, copy.deepcopy(made_by))
            mapping.add_tensor(name, match.key, match.pattern, match.reader)

    def names(self) -> list[str]:
        """One name per conversion, in natural order; `load` may give several tensors for one."""
        return list(self._mappings)

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one conversion by model name, on the CPU.

        Raises:
            ValueError: a tensor has another shape than the model's.
        """
        # convert() consumes what it collected, and the planning pass and the writing pass both need it
        loaded = copy.copy(self._mappings[name])
        object.__setattr__(loaded, "collected_tensors", dict(loaded.collected_tensors))
        tensors = loaded.convert(name, model=self.model, config=self.model.config)
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in tensors.items()}
        for key, tensor in tensors.items():
            if key in self._expected and tensor.shape != self._expected[key].shape:
                raise ValueError(
                    f"Tensor {key} has shape {list(tensor.shape)}, but {type(self.model).__name__} of this config.json "
                    f"expects {list(self._expected[key].shape)}."
                )
        return tensors


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
    reader: "_Reader"


def match_tensors(
    files: list[pathlib.Path], model: PreTrainedModel, placed: dict[str, str] | None = None
) -> list[TensorMatch]:
    """Places the tensors of a checkpoint in the model, by Transformers' own renamings; reads headers only.

    Args:
        files: of the checkpoint.
        model: its parameters may be on "meta".
        placed: model names by the names in the files, of tensors whose place is known; left out of the result.

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
    missing = set(expected) - provided - set(ties)
    if missing:
        raise ValueError(
            f"The checkpoint lacks {_listed(missing)} that {type(model).__name__} needs. Download it again or check "
            "that config.json belongs to it."
        )
    return matches


def check_packed_names(files: list[pathlib.Path], model: PreTrainedModel, packed: dict[str, str]) -> None:
    """Holds the tensors of a packed checkpoint against its model, whose layers are packed already (on "meta").

    Transformers itself fills a missing tensor with random numbers and leaves an unknown one out, with a warning.

    Args:
        files: of the checkpoint.
        model: with packed layers.
        packed: model names of the packed tensors by their names in the files.

    Raises:
        ValueError: a tensor that the model needs is missing, or one has no place in it.
    """
    ignored = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ["(?!)"]))
    unknown = [
        match.key
        for match in match_tensors(files, model, packed)
        if match.name is None and not ignored.search(match.key)
    ]
    if unknown:
        raise ValueError(
            f"The packed checkpoint holds {_listed(unknown)} that {type(model).__name__} has no place for: files of "
            "two checkpoints are mixed, or config.json (modules_to_not_convert) was changed. Write it again with "
            "`lowra quantize`."
        )


def _listed(names) -> str:
    """Such as "2 tensor(s): a, b"."""
    names = sorted(names)
    return f"{len(names)} tensor(s): {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _tensors(files: list[pathlib.Path]) -> Iterator[tuple[str, "_Reader"]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as content:
                keys = list(content.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({error}): it is cut short or damaged. Download it again."
            ) from error
        for key in keys:
            yield key, _Reader(path, key)


class _Reader:
    """Loads one tensor when called; the file is opened anew, so no mapping keeps its pages alive."""

    def __init__(self, path: pathlib.Path, key: str):
        self.path, self.key = path, key

    def __call__(self) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as content:
            return content.get_tensor(self.key)
