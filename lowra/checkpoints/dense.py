"""Dense checkpoints read tensor by tensor, under the names the model will know them by. Only safetensors are read."""

import contextlib
import copy
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import transformers
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .companions import NOT_WANTED
from .configs import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    of_variant,
    read_model_config,
    shards_of_index,
    variants_in,
)
from .guarded import check_file, open_tensors
from .places import expanded

_DENSE_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def local_folder(model: str) -> pathlib.Path | None:
    """A local folder as it is; None for what can only be a name on the hub.

    Raises:
        FileNotFoundError: a path at which there is no folder.
    """
    folder = expanded(model)
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        hint = f": it is a file; give its folder, {folder.parent}" if folder.is_file() else ""
        raise FileNotFoundError(f"{model} is not a folder with a model in it{hint}.")
    return None


def resolve_folder(model: str) -> pathlib.Path:
    """A local folder as it is, or the snapshot of a hub name.

    Raises:
        FileNotFoundError: neither a folder nor a name the hub knows.
    """
    if (folder := local_folder(model)) is not None:
        return folder
    try:
        return pathlib.Path(snapshot_download(str(model), ignore_patterns=NOT_WANTED))
    except Exception as error:
        raise FileNotFoundError(
            f"{model} is neither a local folder nor could it be had from the hub: {reason_of_hub(error)}."
        ) from error


@contextlib.contextmanager
def offline_without_connection() -> Iterator[None]:
    """Within, the hub is not asked where it does not answer: what has been downloaded counts."""
    former = constants.HF_HUB_OFFLINE
    try:
        if not former:
            try:
                get_session().head(constants.ENDPOINT, timeout=5)
            except Exception:  # of whichever HTTP library it uses
                constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = former


def reason_of_hub(error: Exception) -> str:
    """Why something could not be had from the hub, in a few words."""
    for kinds, reason in (
        (GatedRepoError, "its owner has to grant access first, and you have to log in (hf auth login)"),
        (RepositoryNotFoundError, "it has no model of this name, or none that you may see (hf auth login)"),
        (HFValidationError, "this is no name that it could have; they are OWNER/MODEL"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and it has not been downloaded yet"),
        (
            LocalEntryNotFoundError,
            "HF_HUB_OFFLINE is set, and it has not been downloaded yet"
            if constants.HF_HUB_OFFLINE
            else "there is no connection to it, and it has not been downloaded yet",
        ),
    ):
        if isinstance(error, kinds):
            return reason
    return one_line(error).rstrip(".")


def safetensors_files(folder: pathlib.Path, variant: str | None = None) -> list[pathlib.Path]:
    """The weight files of a checkpoint, those that Transformers would read: a single one, or the shards of the index.

    Args:
        folder: of the checkpoint.
        variant: as `save_pretrained(variant=)` was given; None for the usual files.

    Raises:
        FileNotFoundError: no safetensors files, or one that the index names is not there.
        OSError, ValueError: an index that cannot be read or names other than files beside it, a shard that is no file.
    """
    single, index = (folder / of_variant(name, variant) for name in (SINGLE_FILE, INDEX_FILE))
    if single.exists() or not index.exists():
        paths = [single]
    else:
        paths = [folder / name for name in shards_of_index(index)]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no {path.name}{_what_is_there_instead(folder)}.")
        check_file(path, "weights of a checkpoint")
    return paths


def _what_is_there_instead(folder: pathlib.Path) -> str:
    """A hint for a folder without the weights it should have."""
    pickled, shards = sorted(folder.glob("*.bin")), sorted(folder.glob("*-of-*.safetensors"))
    if pickled:
        return f" (pickled files such as {pickled[0].name} are not read: convert them to safetensors)"
    if shards and not (folder / INDEX_FILE).exists():
        return f", and its {shards[0].name} is of no use without model.safetensors.index.json"
    if variants := [name for name in variants_in(folder) if name is not None]:
        return f" (its weights are a variant: from_pretrained(…, variant={variants[0]!r}) loads them)"
    return ""


def read_config(folder: pathlib.Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Args:
        folder: of the checkpoint.
        trust_remote_code: run the Python code that comes with it, where it brings its own.

    Raises:
        ValueError: it brings code of its own that may not be run, or Transformers cannot read it.
    """
    described = read_model_config(folder)
    own, names = described.get("auto_map") or {}, described.get("architectures") or []
    own_config = "AutoConfig" in own and described.get("model_type") not in CONFIG_MAPPING
    # by its model_type alone Transformers would take a class of its own for it
    own_model = _door_to_own_code(own, names) and not any(hasattr(transformers, name) for name in names)
    if (own_config or own_model) and not trust_remote_code:
        raise ValueError(
            f"{folder} brings Python code of its own, which would have to be run: read it, then allow it with "
            "trust_remote_code=True (--trust-remote-code on the command line)."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever line of a model's config class meets a value that it cannot use
        raise ValueError(f"{folder / CONFIG_FILE} cannot be read by Transformers: {one_line(error)}.") from error
    if config.dtype is not None and not getattr(config.dtype, "is_floating_point", False):
        raise ValueError(
            f"{folder / CONFIG_FILE} names the dtype {config.dtype!r}; expected one of floating point, such as "
            "'bfloat16', or none."
        )
    return config


def empty_model(
    folder: pathlib.Path, trust_remote_code: bool = False, files: Sequence[pathlib.Path] = ()
) -> PreTrainedModel:
    """The model of a checkpoint on "meta": shapes and names, no weights.

    Args:
        folder: of the checkpoint.
        trust_remote_code: see `read_config`.
        files: of its weights; where config.json names no dtype they tell it, as for Transformers' dtype="auto".

    Raises:
        ValueError: an architecture that Transformers does not have, or code of its own that may not be run.
    """
    config = read_config(folder, trust_remote_code)
    dtype = config.dtype or _stored_dtype(files)
    door = _door_to_own_code(getattr(config, "auto_map", None) or {}, config.architectures or [])
    names = [name for name in config.architectures or [] if hasattr(transformers, name)]
    try:
        with torch.device("meta"):
            if trust_remote_code and door is not None:
                return getattr(transformers, door).from_config(config, trust_remote_code=True, dtype=dtype)
            if names:
                return _class_with_head(names[0], config)._from_config(config, dtype=dtype)
    except ImportError as error:
        raise ValueError(f"The code that {folder} brings cannot be imported: {error}") from error
    except Exception as error:  # sizes that do not go together, and whatever else a model's class stumbles over
        raise ValueError(f"No model can be built by {folder / CONFIG_FILE}: {one_line(error)}.") from error
    raise ValueError(
        f"{folder / CONFIG_FILE} names the architectures {config.architectures}, none of which Transformers "
        f"{transformers.__version__} has."
    )


def one_line(error: Exception) -> str:
    """A message of many lines in one, with the kind of error where it says little by itself."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def _door_to_own_code(auto_map: dict[str, str], architectures: list[str]) -> str | None:
    """The Auto class of Transformers under which a checkpoint offers the model class that its config.json names."""
    doors = {auto: str(place) for auto, place in auto_map.items() if auto.startswith("AutoModel")}
    named = (auto for auto, place in doors.items() if place.rpartition(".")[2] in architectures)
    return next(named, "AutoModelForCausalLM" if "AutoModelForCausalLM" in doors else next(iter(doors), None))


def _stored_dtype(files: Sequence[pathlib.Path]) -> torch.dtype:
    """The dtype of the first floating tensor, by which Transformers too goes; float32 where there is none."""
    for path in sorted(files):
        with open_tensors(path, "the weights of a checkpoint") as content:
            for key in content.keys():
                if (stored := content.get_slice(key).get_dtype()) in _DENSE_TYPES:
                    return _DENSE_TYPES[stored]
    return torch.float32


def _class_with_head(name: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of this name; for a bare encoder-decoder that one which generates with a head tied to the embeddings.

    Checkpoints such as facebook/bart-large name the bare model, which no task can be trained with.
    """
    named = getattr(transformers, name)
    bare: Any = MODEL_MAPPING.get(type(config), None)
    if config.is_encoder_decoder and config.tie_word_embeddings and bare is named:
        with_head: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), named)
        return with_head
    return named


class DenseCheckpoint:
    """The tensors of a dense checkpoint under model names, one at a time.

    Transformers' own renamings and conversions (merged experts, old prefixes) are applied, lazily, so that memory holds
    what one conversion needs.

    Attributes:
        model: see below.
        unplaced: names of tensors in the files that the model has no place for.
    """

    def __init__(self, files: list[pathlib.Path], model: PreTrainedModel, needed: set[str] | None = None):
        """Reads headers only.

        Args:
            files: of the checkpoint.
            model: its parameters may be on "meta".
            needed: names that must be there, where the model's class may have others that it starts anew (the head of
                another task); None needs all.

        Raises:
            ValueError: a file is cut short, or tensors the model needs are missing, of another shape or of a type that
                is no dense one.
        """
        self.model = model
        self._expected = model.state_dict()
        self._mappings: dict[str, WeightRenaming | WeightConverter] = {}
        matches = match_tensors(files, model, needed=needed)
        self.unplaced = _unplaced(matches, model)
        for match, dtype in _check_shapes(matches, model):
            if self._expected[str(match.name)].is_floating_point() and dtype not in _DENSE_TYPES:
                raise ValueError(
                    f"Tensor {match.key} is stored as {dtype}: only dense checkpoints in 16 or 32 bits "
                    f"({', '.join(_DENSE_TYPES)}) are read."
                )
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
            reader: Any = match.reader  # called, as it would call a future's result
            mapping.add_tensor(name, match.key, match.pattern, reader)

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
            if key in self._expected:
                _check_shape(key, tensor.shape, self._expected[key].shape, self.model)
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
    unknown = _unplaced(matches, model)
    if unknown:
        raise ValueError(
            f"The packed checkpoint holds {count_and_names(unknown)} that {type(model).__name__} has no place for: "
            "files of two checkpoints are mixed, or config.json (modules_to_not_convert) was changed. Write it again "
            "with `lowra quantize`."
        )

    if shapes:
        list(_check_shapes(matches, model))


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for NaN or Inf in a tensor of floating point."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"Tensor {name} holds {bad} NaN or Inf value(s) of {tensor.numel()}; the checkpoint is damaged."
        )


def _unplaced(matches: list[TensorMatch], model: PreTrainedModel) -> list[str]:
    """Names in the files that the model has no place for, but for those that its class is known to leave out."""
    # rotary caches of old checkpoints, which Transformers leaves out too
    ignored = _any_of({*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"})
    return [match.key for match in matches if match.name is None and not ignored.search(match.key)]


def _check_shapes(matches: list[TensorMatch], model: PreTrainedModel) -> Iterator[tuple[TensorMatch, str]]:
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
                    _check_shape(match.key, header.get_shape(), expected[str(match.name)].shape, model)
                yield match, header.get_dtype()


def _check_shape(name: str, shape: Sequence[int], expected: Sequence[int], model: PreTrainedModel) -> None:
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


def _tensors(files: list[pathlib.Path]) -> Iterator[tuple[str, "_Reader"]]:
    for path in files:
        with open_tensors(path, "weights of a checkpoint") as content:
            keys = list(content.keys())
        for key in keys:
            yield key, _Reader(path, key)


class _Reader:
    """Loads one tensor when called; the file is opened anew, so no mapping keeps its pages alive."""

    def __init__(self, path: pathlib.Path, key: str):
        self.path, self.key = path, key

    def __call__(self) -> torch.Tensor:
        with open_tensors(self.path, "weights of a checkpoint") as content:
            return content.get_tensor(self.key)
