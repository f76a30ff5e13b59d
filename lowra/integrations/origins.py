"""Where the packed weights in a model come from, which a state dict can change: its base, its packing, its start.

`load_state_dict` of another packing changes weights under a config that describes those before. Whose they are is known
of each layer's codes (`lowra.nn.known_codes`); here the model learns it, and whether they need an initial adapter.
"""

import logging
import pathlib
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.integrity import FoundTensors
from ..checkpoints.packed import PackedFiles
from ..config import LowRAConfig
from ..nn.known_codes import Origin, joined_codes
from ..nn.packed_module import PackedModule
from ..nn.row_layout import is_readable
from ..quantization.initial_adapter import ADAPTER_FOLDER
from .missing_start import StoredStart, expect_start, start_of, stored_start

logger = logging.getLogger(__name__)

_FIELDS = ("base", "fingerprint", "initial_adapter", "calibration", "error")  # of a packing, beside its recipe
_ORIGIN = "_lowra_origin"  # attribute of a packed model


def remember_stored(
    model: PreTrainedModel, config: LowRAConfig, folder: pathlib.Path, files: PackedFiles, found: FoundTensors
) -> None:
    """After a packed checkpoint was loaded: whose its codes are, by the digests found in its files, and its start.

    Args:
        model: just loaded.
        config: of the packing.
        folder: of the checkpoint.
        files: where its tensors are.
        found: in them.
    """
    origin = _origin_by(config)
    start = start_of(folder, config)
    if start is not None:
        origin["start"] = [start, str(folder / ADAPTER_FOLDER)]
        expect_start(model, StoredStart(start, folder / ADAPTER_FOLDER))
    for name, module in _packed(model).items():
        stored = {leaf: place for leaf, place in files.of(name).items() if place.stored_as == "U8"}
        if stored:
            module.remember_codes(joined_codes({leaf: found.digests[p.key] for leaf, p in stored.items()}), origin)
        module.origin = origin
    _watch(model, origin)


def remember_packed(model: PreTrainedModel, config: LowRAConfig) -> None:
    """The same after a dense model was packed while it was loaded."""
    origin = _origin_by(config)
    for module in _packed(model).values():
        module.origin = origin
        if is_readable(module.row_bits):
            module.codes_digest()
    _watch(model, origin)


def _origin_by(config: LowRAConfig) -> Origin:
    return {name: getattr(config, name) for name in _FIELDS}


def _packed(model: nn.Module) -> dict[str, PackedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def _watch(model: PreTrainedModel, origin: Origin) -> None:
    setattr(model, _ORIGIN, origin)
    model.register_load_state_dict_post_hook(_follow_origin)


def _follow_origin(model: Any, incompatible: Any) -> None:
    """After `load_state_dict`: the config describes what is there now, and a start that it needs is asked for."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, LowRAConfig):
        return
    origins = [module.origin for module in _packed(model).values() if module.origin is not None]
    others = [origin for origin in origins if origin != getattr(model, _ORIGIN, None)]
    if not others:
        return
    origin = others[0]
    if any(another != origin for another in origins):
        logger.warning(
            "lowra: a state dict brought layers of another packing beside those that stay: no model was packed like "
            "this, and its outputs are nobody's."
        )
    for name in _FIELDS:
        setattr(config, name, origin[name])
    setattr(model, _ORIGIN, origin)
    start = origin.get("start")
    before = stored_start(model)
    if start is not None or before is not None:
        expect_start(model, None if start is None else StoredStart(start[0], pathlib.Path(start[1])))
