"""The JSON files of a checkpoint that say what its weights are, checked before anybody builds on them.

Transformers takes what stands in them as it comes: a list in the place of a dictionary, a null or a billion of layers
end in errors of whatever line meets them first, or never end. Whoever loads, inspects, evaluates or quantises a
checkpoint has them checked here, by `read_model_config` and, where it is packed, `check_packed_folder`.
"""

import pathlib
import re
import reprlib

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG

from ..config import LowRAConfig
from .guarded import check_file, open_tensors, read_json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS_FILE = re.compile(r"model(\.(?P<variant>.+?))?(-\d+-of-\d+)?\.safetensors")
_INDEX_OF_VARIANT = re.compile(r"model\.safetensors\.index(\.(?P<variant>.+))?\.json")
# Files that only `lowra quantize` and saved packed models have.
_TRACES = ("lowra_digests.json", "lowra_report.json")

_MOST_LAYERS = 10_000
_LAYERS = re.compile(r"(^|_)(layers?|blocks)$")


def read_model_config(folder: pathlib.Path) -> dict:
    """The content of config.json, with the keys by which a model's class is chosen of the right kinds.

    Raises:
        OSError, ValueError: no such file, no JSON object, or a key of another kind.
    """
    path = folder / CONFIG_FILE
    refuse_adapter(folder)
    content = read_json(path, "the configuration of a model")
    for names, kind, fits in (
        (("model_type", "name_or_path"), "text", lambda value: isinstance(value, str)),
        (("architectures",), "a list of names", _is_names),
        (("auto_map", "quantization_config"), "a dictionary", lambda value: isinstance(value, dict)),
    ):
        for name in names:
            value = content.get(name)
            absent = value is None and not (name == "auto_map" and name in content)  # Transformers looks into that one
            if not absent and not fits(value):
                raise ValueError(f"{path}: {name} must be {kind}; got {reprlib.repr(value)}.")
    method = (content.get("quantization_config") or {}).get("quant_method")
    if method is not None and not isinstance(method, str):
        raise ValueError(f"{path}: quant_method must be text; got {reprlib.repr(method)}.")
    for name, value in content.items():
        # the model is built before a tensor is missed
        if _LAYERS.search(name) and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"{path}: {name} is {value:.3g}; no model has so many layers.")
    return content


def refuse_adapter(folder: pathlib.Path) -> None:
    """
    Raises:
        FileNotFoundError: where a model is expected there is an adapter.
    """
    if not (folder / CONFIG_FILE).exists() and (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} is an adapter, not a model: give the model that it belongs to, and the adapter with "
            "--adapter where the command takes one (in Python PeftModel.from_pretrained)."
        )


def require_adapter(folder: pathlib.Path) -> None:
    """
    Raises:
        FileNotFoundError: where an adapter of PEFT is expected there is none.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        why = f"it has no {ADAPTER_CONFIG}" if folder.exists() else "there is no such folder"
        raise FileNotFoundError(f"{folder} is no adapter: {why}.")


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def packing_described(folder: pathlib.Path) -> LowRAConfig | None:
    """What config.json says of a packing; None where the checkpoint is dense, or quantised by another program.

    Raises:
        OSError, ValueError: see `read_model_config`; a `quantization_config` of lowra that is none.
    """
    described = read_model_config(folder).get("quantization_config") or {}
    if described.get("quant_method") != "lowra":
        return None
    try:
        return LowRAConfig.from_dict(described)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error


def of_variant(name: str, variant: str | None) -> str:
    """The name of a checkpoint's file for weights under `variant=`, as Transformers calls it; None for the usual ones.

    "model.safetensors" becomes "model.fp16.safetensors", the index "model.safetensors.index.fp16.json".
    """
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def variant_of(path: pathlib.Path) -> str | None:
    """The variant that a file of weights belongs to; None for the usual ones, and for names of another kind."""
    match = _WEIGHTS_FILE.fullmatch(path.name)
    return None if match is None else match["variant"]


def variants_in(folder: pathlib.Path) -> list[str | None]:
    """The variants whose weights lie in a folder, the usual ones (None) first."""
    names = [path.name for path in folder.iterdir()]
    whole = [_WEIGHTS_FILE.fullmatch(name) for name in names if not re.search(r"-\d+-of-\d+\.", name)]
    matches = [*whole, *(_INDEX_OF_VARIANT.fullmatch(name) for name in names)]
    found: set[str | None] = {match["variant"] for match in matches if match is not None}
    return sorted(found, key=lambda variant: (variant is not None, variant or ""))


def is_of_lowra(folder: pathlib.Path) -> bool:
    """Whether a local folder holds, or held, a packed checkpoint; nothing is checked."""
    if not folder.is_dir():
        return False
    if any((folder / name).exists() for name in _TRACES):
        return True
    config = folder / CONFIG_FILE
    return config.is_file() and b'"lowra"' in config.read_bytes()


def check_generation_config(folder: pathlib.Path) -> None:
    """Raises OSError or ValueError where generation_config.json is no JSON object; it need not be there."""
    if (folder / GENERATION_FILE).exists():
        read_json(folder / GENERATION_FILE, "how a model generates")


def shards_of_index(index: pathlib.Path) -> list[str]:
    """The names of an index's files, each once.

    Raises:
        OSError, ValueError: no JSON object, or names that are not those of safetensors files in its folder.
    """
    content = read_json(index, "the index of a checkpoint's shards")
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is damaged (its weight_map is {reprlib.repr(names)}; expected files by tensor).")
    for tensor, name in names.items():
        path = pathlib.PurePath(name if isinstance(name, str) else "")
        if path.suffix != ".safetensors" or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(
                f"{index} is damaged (weight_map has {reprlib.repr(name)} for {reprlib.repr(tensor)}; expected a "
                "safetensors file in the folder of the index). Download it again."
            )
    return list(dict.fromkeys(names.values()))


def check_packed_folder(folder: pathlib.Path, variant: str | None = None) -> None:
    """Holds the JSON files of a local packed checkpoint, and what its index names, against what a loader expects.

    Args:
        folder: of the checkpoint.
        variant: of the weights that are about to be loaded.

    Raises:
        OSError, ValueError: one of them is damaged, or names weights that are not there.
    """
    packed = packing_described(folder)
    check_generation_config(folder)
    single, index = (folder / of_variant(name, variant) for name in (SINGLE_FILE, INDEX_FILE))
    if single.exists():
        files = [single]
    elif index.exists():
        files = [folder / name for name in shards_of_index(index)]
        metadata = read_json(index, "the index of a checkpoint's shards").get("metadata")
        if not isinstance(metadata, dict):
            raise ValueError(f"{index} is damaged (its metadata is {reprlib.repr(metadata)}; expected a dictionary).")
    else:
        return  # under names of another kind, which the loader knows
    for path in files:
        check_file(path, "weights of a checkpoint")
    if packed is None and any(_holds_packed(path) for path in files):
        raise ValueError(
            f"{folder} holds weights packed by lowra, and its {CONFIG_FILE} has no quantization_config of lowra: that "
            "was changed or belongs to another checkpoint. Put the original file back."
        )


def _holds_packed(path: pathlib.Path) -> bool:
    with open_tensors(path, "weights of a checkpoint") as content:
        return any(key.endswith(".row_bits") for key in content.keys())
