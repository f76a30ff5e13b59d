"""Dense checkpoints read tensor by tensor, under the names the model will know them by. Only safetensors are read."""

import copy
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming

from .configs import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    of_variant,
    read_model_config,
    refuse_adapter,
    shards_of_index,
    variants_in,
)
from .guarded import check_file, one_line, open_tensors
from .matching import check_shape, check_shapes, count_and_names, match_tensors, unplaced

_DENSE_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
            refuse_adapter(folder)
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
        self.unplaced = unplaced(matches, model)
        for match, dtype in check_shapes(matches, model):
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

    def check_stored(self, names: Iterable[str]) -> None:
        """Raises ValueError where weights come from a stored tensor that gives others too: each is packed by itself."""
        split = set(names) - self._mappings.keys()
        if split:
            raise ValueError(
                f"{count_and_names(split)} of this {type(self.model).__name__} are stored with others as one tensor, "
                "and weights are packed of which each is stored by itself: leave these dense (modules_to_not_convert, "
                "on the command line --keep-dense)."
            )

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
                check_shape(key, tensor.shape, self._expected[key].shape, self.model)
        return tensors


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for NaN or Inf in a tensor of floating point."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"Tensor {name} holds {bad} NaN or Inf value(s) of {tensor.numel()}; the checkpoint is damaged."
        )
