"""Whether what Transformers loads is what was written, and digests beside what it saves."""

import concurrent.futures
import contextlib
import logging
import pathlib
import re

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..checkpoints.atomic import save_json
from ..checkpoints.dense import safetensors_files
from ..checkpoints.guarded import read_json
from ..checkpoints.integrity import (
    DIGESTS_FILE,
    changed_settings,
    check_tensors,
    find_tensors,
    read_digests,
    write_digests,
)
from ..config import LowRAConfig
from ..nn.packed_module import PackedModule
from ..weights.digests import packing_of

logger = logging.getLogger(__name__)


class IntegrityCheck:
    """Reads a packed checkpoint's files through while Transformers loads them.

    Attributes:
        folder: of the checkpoint.
    """

    def __init__(self, files: list[pathlib.Path], config: PreTrainedConfig):
        """
        Args:
            files: of the checkpoint.
            config: of the model, which knows where on the hub it comes from.

        Raises:
            ValueError: digests that cannot be read.
        """
        self.folder = files[0].parent
        self._recorded = read_digests(_digests_file(self.folder, config)) if _are_usual(files) else None
        self._reader = concurrent.futures.ThreadPoolExecutor(1)
        self._found = self._reader.submit(find_tensors, files)

    def finish(self, config: LowRAConfig) -> None:
        """Waits for the reading. A config of an earlier version learns what packing this is.

        Raises:
            ValueError: a tensor is another one than was written, or a table holds NaN or infinite values.
        """
        found = self._found.result()
        self._reader.shutdown(wait=False)
        check_tensors(found, self._recorded, config.packing, self.folder)
        config.packing = found.packing
        changes = [] if self._recorded is None else changed_settings(self._recorded, self.folder)
        if changes:
            logger.warning(
                "lowra: config.json of %s was changed after the weights were written: %s.",
                self.folder,
                "; ".join(changes),
            )


def packing_in_memory(model: nn.Module) -> dict[str, str] | None:
    """The packing of a model's packed weights; None where some are offloaded and not to be had."""
    modules = {id(module.weight): module for module in model.modules() if isinstance(module, PackedModule)}.values()
    if any(module.weight.is_meta for module in modules):
        return None
    return packing_of(module.packed_tensors() for module in modules)


def write_digests_of_saved(folder: pathlib.Path, config: LowRAConfig) -> None:
    """Writes digests of a packed checkpoint that has just been saved, and in its config.json which packing it is.

    Read from the files: what Transformers writes is not always what the model calls it.
    """
    try:
        files = safetensors_files(folder)
    except FileNotFoundError:
        return  # a variant under a name of its own, or a distributed checkpoint
    found = find_tensors(files)
    if config.packing != found.packing:  # tables were trained, or layers left out
        config.packing = found.packing
        content = read_json(folder / "config.json", "the config that was just saved")
        content["quantization_config"]["packing"] = found.packing
        save_json(content, folder / "config.json")
    write_digests(folder, found)


def _are_usual(files: list[pathlib.Path]) -> bool:
    """Whether these are the checkpoint's own files and not a variant beside them, which has no digests."""
    return all(re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", path.name) for path in files)


def _digests_file(folder: pathlib.Path, config: PreTrainedConfig) -> pathlib.Path:
    """Where the digests are: beside the weights, or on the hub where they come from."""
    local = folder / DIGESTS_FILE
    name = config.name_or_path
    if local.exists() or not name or pathlib.Path(name).exists():
        return local
    with contextlib.suppress(OSError):  # a hub that cannot be reached; without digests less is checked
        found = cached_file(
            name,
            DIGESTS_FILE,
            _commit_hash=getattr(config, "_commit_hash", None),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return local if found is None else pathlib.Path(found)
    return local
