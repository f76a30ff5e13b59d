"""What lies beside the weights of a checkpoint and belongs to it: tokenizer, processor, chat templates, code, licence.

Which files a tokenizer reads nobody can list: they are named by hundreds of classes, and by code that comes with
checkpoints. Without one of them the tokenizer may still load and give other ids. So everything is taken but weights,
what a packed checkpoint has of its own, and the traces of training runs and downloads.
"""

import logging
import os
import pathlib
import re
import shutil
from collections.abc import Collection

from .guarded import check_file

logger = logging.getLogger(__name__)

# Weights in any format, and the states of optimisers.
_WEIGHTS = frozenset(
    ".safetensors .bin .pt .pth .ckpt .h5 .hdf5 .keras .msgpack .onnx .onnx_data .gguf .ggml .tflite .ot .pdparams "
    ".nemo .distcp .engine .mlmodel".split()
)
# A packed checkpoint or adapter has these of its own, or they say something that is no longer true of it.
_REPLACED = frozenset(
    "config.json README.md adapter_config.json lowra_report.json lowra_digests.json lowra_base.json lowra_adapter.json "
    "trainer_state.json params.json".split()
)
_OTHER_FORMATS = ("original", "onnx", "openvino", "coreml", "metal", "gguf", "tflite")
# For the hub: what is not to be downloaded. Weights in safetensors are wanted, but not second copies of them.
NOT_WANTED = [
    *(f"*{ending}" for ending in sorted(_WEIGHTS - {".safetensors"})),
    *(f"{folder}/*" for folder in _OTHER_FORMATS),
    "*/*.safetensors",
    "consolidated*",
]
_INDEX = re.compile(r"\.index(\..+)?\.json$")  # the one of a variant has its name in the middle
_DIGESTS_OF_VARIANT = re.compile(r"lowra_digests\..+\.json")
_MANY_BYTES = 1 << 30


def with_tokenizer(adapter: pathlib.Path | None) -> pathlib.Path | None:
    """The adapter's folder where it brings the tokenizer it was trained with, and the chat template in it, or None."""
    return adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else None


def companions(folder: pathlib.Path, outside: Collection[pathlib.Path] = ()) -> list[pathlib.Path]:
    """Paths, relative to `folder`, of its files that are no weights.

    Folders inside are looked into, unless they hold weights: then they are other models, or the same in another format.

    Args:
        folder: of a checkpoint or adapter.
        outside: folders that may lie in it without belonging to it, such as the one that is being written.

    Raises:
        OSError: one of them is no file or may not be read.
    """
    found, size = [], 0
    seen = {path.resolve() for path in (folder, *outside)}
    for place, folders, names in os.walk(folder, followlinks=True):
        here = pathlib.Path(place)
        folders[:] = sorted(name for name in folders if _is_looked_into(here / name, seen))
        for name in sorted(names):
            if _is_companion(name, on_top=here == folder):
                check_file(here / name, "a file to be copied with the checkpoint")
                size += (here / name).stat().st_size
                found.append((here / name).relative_to(folder))
    if size > _MANY_BYTES:
        logger.warning("lowra: %s has %d files, %.1f GB, that are no weights; copied.", folder, len(found), size / 1e9)
    return found


def copy_companions(source: pathlib.Path, paths: list[pathlib.Path], target: pathlib.Path) -> None:
    """Copies files, given relative to `source`, to the same places in `target`; what is there already stays."""
    for path in paths:
        place = target / path
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, place)


def _is_companion(name: str, on_top: bool) -> bool:
    lowered = name.lower()
    return not (
        name.startswith(".")
        or pathlib.PurePath(lowered).suffix in _WEIGHTS
        or _INDEX.search(lowered)
        or (on_top and (name in _REPLACED or _DIGESTS_OF_VARIANT.fullmatch(name)))
    )


def _is_looked_into(folder: pathlib.Path, seen: set[pathlib.Path]) -> bool:
    place = folder.resolve()
    if folder.name.startswith(".") or folder.name in ("__pycache__", *_OTHER_FORMATS) or place in seen:
        return False
    seen.add(place)  # a link may lead back to where it is
    return not any(path.suffix.lower() in _WEIGHTS for path in folder.iterdir())
