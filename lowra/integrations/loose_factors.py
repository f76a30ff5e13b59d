"""Factors of an adapter that come as a state dict, past every door that asks whose base they belong to.

`peft.set_peft_model_state_dict`, `model.load_state_dict` and what engines resume with all end in the loading of the
packed model, so a hook looks there: what was just read by PEFT's `load_peft_weights` is held against the record beside
it, as a whole adapter would be. What came from elsewhere has no record. On a base that is less than the model by its
start it is refused, unless it can be what this process has read out of that base's adapters: the best of a training
run, an average of several, an engine's own checkpoint. Otherwise it is told.
"""

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import LowRAConfig
from ..nn.adapter_tables import adapter_tables
from ..nn.row_layout import is_sharded
from .adapter_keys import adapters_in
from .adapter_records import UNKNOWN, Arriving, check_adapter, check_saved, has_arrived, keep_record, settle
from .integrity import describe_again
from .missing_start import stored_start
from .stored_start import is_filled_from_file

logger = logging.getLogger(__name__)

_TOLD = "_lowra_told"  # attribute of a PeftConfig, which writes only its fields


class _Reading(threading.local):
    """What a thread has read with `load_peft_weights`.

    Attributes:
        source: folder or name of the adapter, and options.
        tensor: a weak reference to one of its tensors.
        checked: whoever reads has asked whose base it belongs to.
        putting_in: PEFT makes a state dict of the model to find names for the factors it puts in.
    """

    source: tuple[Any, dict[str, Any]] | None = None
    tensor: Any = None
    checked = False
    putting_in = False


_reading = _Reading()
_read_out: set[str] = set()  # packings whose adapters have been made a state dict


@contextlib.contextmanager
def already_checked() -> Iterator[None]:
    """Within, what is read has been held against its record."""
    _reading.checked = True
    try:
        yield
    finally:
        _reading.checked = False


def is_checked() -> bool:
    """Whether what is being put in was read and held against its record just now."""
    return _reading.checked


@contextlib.contextmanager
def putting_in() -> Iterator[None]:
    """Within, a state dict of the model is for names alone."""
    _reading.putting_in = True
    try:
        yield
    finally:
        _reading.putting_in = False


def remember_reading(adapter: Any, options: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Remembers where tensors were read from, unless they have been checked."""
    if not _reading.checked and tensors:
        _reading.source, _reading.tensor = (adapter, options), weakref.ref(next(iter(tensors.values())))


def read_from(state_dict: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The adapter that these tensors were just read from, and the options; None where that is not known or checked."""
    source, tensor = _reading.source, _reading.tensor and _reading.tensor()
    same = tensor is not None and any(given is tensor for given in state_dict.values())
    if same:
        _reading.source = _reading.tensor = None
    return source if same and not _reading.checked else None


def watch_factors(model: nn.Module) -> None:
    """Has a packed model ask, refuse or tell when factors of its adapters come as a state dict."""
    model.register_load_state_dict_pre_hook(_ask_whose_they_are)
    model.register_state_dict_pre_hook(_remember_reading_out)


def _remember_reading_out(model: Any, *others: Any) -> None:
    if _reading.putting_in or is_filled_from_file():
        return
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if adapted and isinstance(getattr(model.config, "quantization_config", None), LowRAConfig):
        _read_out.add(_identity(model))


def _identity(model: Any) -> str:
    """Of the packed weights in memory."""
    describe_again(model)
    config = model.config.quantization_config
    return f"{config.fingerprint} {config.packing}"


def refuse_unknown_origin(model: Any, name: str) -> None:
    """
    Args:
        model: a packed one of Transformers.
        name: of the adapter that factors are about to be put in, from wherever.

    Raises:
        ValueError: the base needs its start, or an adapter trained from it, and they could be any.
    """
    start = stored_start(model)
    if start is None or _identity(model) in _read_out:
        return
    if not any(map(is_sharded, model.parameters())):  # an engine's own checkpoints come as state dicts
        raise ValueError(
            f"These factors of adapter {name!r} come as a state dict, and nothing tells which base and packing they "
            f"were trained on. This base was packed together with an initial adapter ({start.what}), and without "
            "that, or one trained from it, its outputs are far off. Load the adapter's folder, with the record in it: "
            "PeftModel.from_pretrained, or model.load_adapter(FOLDER, any_base=True) where there is no record."
        )


def _ask_whose_they_are(model: Any, state_dict: dict[str, Any], *others: Any) -> None:
    """
    Raises:
        ValueError: they were read from the folder of an adapter of another packing, or could be of any, and the base
            needs those of its own.
    """
    config = getattr(model.config, "quantization_config", None)
    if is_filled_from_file() or not isinstance(config, LowRAConfig):
        return
    # with the packed base they are those of that base
    names = [] if any(key.endswith(".row_bits") for key in state_dict) else adapters_in(state_dict, model)
    source = read_from(state_dict) if len(names) == 1 else None
    for name in names:
        if source is not None:
            arriving = check_adapter(model, *source, any_base=False)
            check_saved(*source, arriving.record)
            settle(model, name, arriving)
            continue
        refuse_unknown_origin(model, name)
        settings, held = model.peft_config[name], adapter_tables(model)
        if config.initial_adapter is not None and not has_arrived(model, name):
            keep_record(settings, Arriving(UNKNOWN))
        if not hasattr(settings, _TOLD):  # averages and the like come at every step
            setattr(settings, _TOLD, True)
            tell_unknown_origin(name, held is not None and name in held.adapters)


def tell_unknown_origin(name: str, keeps_tables: bool = False) -> None:
    """
    Args:
        name: of an adapter whose factors come from wherever, on a base that is whole without them.
        keeps_tables: it has levels and scales of its own, which do not come with factors.
    """
    logger.warning(
        "lowra: factors of adapter %r come as a state dict, without the record of the base and packing that they were "
        "trained on, and without %s. On another one, or with others, the outputs are far off; "
        "PeftModel.from_pretrained and load_adapter ask, and bring both.",
        name,
        "levels and scales, of which those it has stay" if keeps_tables else "levels and scales if any were trained",
    )
