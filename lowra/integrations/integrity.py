"""Whether what Transformers loads is what was written, and digests beside what it saves."""

import concurrent.futures
import contextlib
import contextvars
import copy
import functools
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..checkpoints.atomic import save_json
from ..checkpoints.configs import INDEX_FILE, SINGLE_FILE, of_variant, variant_of
from ..checkpoints.dense import safetensors_files
from ..checkpoints.guarded import read_json
from ..checkpoints.integrity import (
    DIGESTS_FILE,
    FoundTensors,
    changed_settings,
    check_tensors,
    find_tensors,
    known_tensors,
    noted_tensors,
    read_digests,
    write_digests,
)
from ..checkpoints.whole_files import OpenFiles
from ..config import LowRAConfig
from ..nn.first_use import FirstUse
from ..nn.packed_module import PackedModule
from ..nn.row_layout import is_readable
from ..weights.digests import packing_of
from ..weights.packed import STORAGES

logger = logging.getLogger(__name__)


_READ_AT_ONCE = 64 << 20  # takes some 5 ms, a tenth of what a small model takes to load
_HUB_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
_fetched_with: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("fetched_with", default=None)


@contextlib.contextmanager
def fetched_with(options: dict[str, Any]) -> Iterator[None]:
    """Within, digests are sought on the hub where `from_pretrained` seeks the weights, and as it does."""
    given = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
    token = _fetched_with.set(given)
    try:
        yield
    finally:
        _fetched_with.reset(token)


class IntegrityCheck:
    """Holds a packed checkpoint's files against what was written.

    They are read through while Transformers loads them, or, where that would be most of what a load does, before the
    model is first used: on a CPU tensors are mapped and a load reads none of them.

    Attributes:
        folder: of the checkpoint.
    """

    def __init__(self, files: list[pathlib.Path], config: PreTrainedConfig, mapped: bool):
        """
        Args:
            files: of the checkpoint.
            config: of the model, which knows where on the hub it comes from.
            mapped: the load reads nothing.

        Raises:
            ValueError: digests that cannot be read.
        """
        self.folder = files[0].parent
        self._variant = variant_of(files[0])
        self._recorded = read_digests(_digests_file(self.folder, of_variant(DIGESTS_FILE, self._variant), config))
        known = (self._recorded or {}).get("packing") is not None and (self._recorded or {}).get("files") is not None
        self._found: concurrent.futures.Future | None = None
        if mapped and known and sum(path.stat().st_size for path in files) > _READ_AT_ONCE:
            # now: by the time of the first use the folder may be gone, or another's, or relative to somewhere else
            self._opened = OpenFiles(files)
        else:
            self._reader = concurrent.futures.ThreadPoolExecutor(1)
            self._found = self._reader.submit(lambda: known_tensors(OpenFiles(files), self._recorded))

    def finish(self, model: nn.Module, config: LowRAConfig) -> FoundTensors:
        """Waits for the reading, or has the model's first use wait for it. A config of an earlier version learns what
        packing this is.

        Returns:
            what the files hold.

        Raises:
            ValueError: a tensor is another one than was written, or a table holds NaN or infinite values.
        """
        if self._found is None:
            found = noted_tensors(self._opened, self._recorded or {})
            before_use = FirstUse(functools.partial(self._read, copy.copy(config)))
            for module in model.modules():
                if isinstance(module, PackedModule):
                    module.at_first_use = before_use
        else:
            found = self._found.result()
            self._reader.shutdown(wait=False)
        check_tensors(found, self._recorded, config, self.folder, self._variant)
        config.packing = found.packing
        changes = [] if self._recorded is None else changed_settings(self._recorded, self.folder)
        if changes:
            logger.warning(
                "lowra: config.json of %s was changed after the weights were written: %s.",
                self.folder,
                "; ".join(changes),
            )
        return found

    def _read(self, config: LowRAConfig) -> None:
        found = known_tensors(self._opened, self._recorded)
        check_tensors(found, self._recorded, config, self.folder, self._variant)


def packing_in_memory(model: nn.Module) -> dict[str, str] | None:
    """The packing of a model's packed weights; None where some are offloaded or sharded, and so not to be had."""
    modules = {id(module.weight): module for module in model.modules() if isinstance(module, PackedModule)}.values()
    if not all(is_readable(module.weight) for module in modules):
        return None
    return packing_of(module.packed_tensors() for module in modules)


def describe_again(model: nn.Module) -> None:
    """Brings the config of a packed model up to date where other packed tensors were put in: by `load_state_dict`, by
    tables that were trained into the base.

    Whose adapters belong to it is decided by that, and what is saved says it.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    modules = {id(module.weight): module for module in model.modules() if isinstance(module, PackedModule)}.values()
    if not isinstance(config, LowRAConfig) or not any(module.is_replaced for module in modules):
        return
    found = packing_in_memory(model)
    if found is None:
        return
    if found != config.packing:
        config.packing = found
        weights = [module.packed for module in modules]
        size = sum(weight.row_bits.numel() * weight.in_features for weight in weights)
        codes = sum(int(weight.row_bits.sum()) * weight.in_features for weight in weights)
        config.nominal_bits = round(codes / size, 6)
        config.true_bits = round(sum(weight.stored_bits for weight in weights) / size, 6)
        storages = {STORAGES[weight.scales.dtype] for weight in weights}
        if len(storages) == 1:
            (config.scales,) = storages
    for module in modules:
        module.is_replaced = False


def write_digests_of_saved(folder: pathlib.Path, config: LowRAConfig, variant: str | None) -> None:
    """Writes digests of a packed checkpoint that has just been saved, and in its config.json which packing it is.

    Read from the files: what Transformers writes is not always what the model calls it.
    """
    _remove_outdated(folder, variant)
    try:
        files = OpenFiles(safetensors_files(folder, variant))
    except FileNotFoundError:
        return  # a distributed checkpoint
    found = find_tensors(files)
    if config.packing != found.packing:  # tables were trained, or layers left out
        config.packing = found.packing
        content = read_json(folder / "config.json", "the config that was just saved")
        content["quantization_config"]["packing"] = found.packing
        save_json(content, folder / "config.json")
    write_digests(folder, files, found, variant)


def _remove_outdated(folder: pathlib.Path, variant: str | None) -> None:
    """Removes a single file of an earlier save in the same folder where the model has just been saved in shards.

    Transformers replaces earlier shards and leaves that one, and whoever loads the folder would get it.
    """
    single, index = (folder / of_variant(name, variant) for name in (SINGLE_FILE, INDEX_FILE))
    if single.exists() and index.exists() and index.stat().st_mtime_ns > single.stat().st_mtime_ns:
        logger.warning("lowra: %s of an earlier save gives way to the shards that were just saved.", single)
        single.unlink()


def _digests_file(folder: pathlib.Path, file_name: str, config: PreTrainedConfig) -> pathlib.Path:
    """Where the digests are: beside the weights, or on the hub where they come from."""
    local = folder / file_name
    name = config.name_or_path
    if local.exists() or not name or pathlib.Path(name).exists():
        return local
    with contextlib.suppress(OSError):  # a hub that cannot be reached; without digests less is checked
        found = cached_file(
            name,
            file_name,
            **(_fetched_with.get() or {}),
            _commit_hash=getattr(config, "_commit_hash", None),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return local if found is None else pathlib.Path(found)
    return local
