"""A base that was packed together with an initial adapter, used without it: said once, at the first forward.

Its packed weights are what is left of W less that adapter's product, so that alone they are far from W (perplexity 6917
instead of 574 on base-30m at 1.25 bits). Only at a forward is it known whether an adapter has come.
"""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
import weakref

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.records import BASE_RECORD, read_record
from ..config import LowRAConfig
from ..nn.linear import LowRALinear
from ..quantization.initial_adapter import ADAPTER_FOLDER
from .adapter_records import has_arrived

logger = logging.getLogger(__name__)

_STORED = "_lowra_start"  # attribute of a packed model
_numbers = itertools.count()
_watches: "weakref.WeakValueDictionary[int, _Watch]" = weakref.WeakValueDictionary()  # compiled code knows numbers


@dataclasses.dataclass(frozen=True)
class StoredStart:
    """
    Attributes:
        what: such as "loftq, rank 8".
        folder: of the initial adapter; it need not be there.
    """

    what: str
    folder: pathlib.Path


def expect_start(model: PreTrainedModel, start: StoredStart | None) -> None:
    """Warns at the next forward that runs without the start that a model's packed base needs, or one trained from it.

    Args:
        model: whose packed weights have just come.
        start: None where they are the whole base.
    """
    setattr(model, _STORED, start)
    layers = [module for module in model.modules() if isinstance(module, LowRALinear)]
    for layer in layers:
        if isinstance(layer.at_first_forward, _Watch):
            layer.at_first_forward = None
    if start is not None and layers:
        layers[0].at_first_forward = _Watch(model, start.what, start.folder)


def stored_start(model: nn.Module) -> StoredStart | None:
    """The initial adapter that a packed model's base needs; None where its weights are the whole base."""
    return getattr(model, _STORED, None)


def start_of(folder: pathlib.Path, config: LowRAConfig) -> str | None:
    """The initial adapter that holds a part of a base's weights, such as "loftq, rank 8"; None where none does."""
    if config.initial_adapter is not None:
        method, rank = config.initial_adapter.get("method"), config.initial_adapter.get("rank")
        return None if method == "lora" else f"{method}, rank {rank}"
    path = folder / ADAPTER_FOLDER / BASE_RECORD  # of an earlier version
    if not path.is_file():
        return None
    with contextlib.suppress(ValueError, OSError):  # whoever loads that adapter is told
        method = read_record(path).get("init")
        return None if method in (None, "lora") else method
    return None


class _Watch:
    """What one packed layer calls before its forward, which no adapter's forward goes past; it speaks once. Can be
    pickled.

    No hook: with one, a layer takes PEFT's own forward, and what a checkpointed block makes again must go the way that
    it went first.
    """

    _satisfied: tuple[weakref.ref[BaseTunerLayer], list[str]] | None = None  # by whom, in the forwards before

    def __init__(self, model: nn.Module, start: str, adapter: pathlib.Path):
        self.model, self.start, self.adapter = model, start, adapter
        self.is_told = False
        self._register()

    def _register(self) -> None:
        self.number = next(_numbers)
        _watches[self.number] = self

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_satisfied"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._register()

    def __call__(self, layer: LowRALinear) -> None:
        if torch.compiler.is_compiling():
            _tell_while_compiling(self.number)
        elif self._is_satisfied():  # at every forward
            return
        elif self.tell():
            layer.at_first_forward = None

    def _is_satisfied(self) -> bool:
        """Whether the adapters of an earlier forward are still there: they may have been deleted, or unloaded."""
        if self._satisfied is None:
            return False
        layer, active = self._satisfied[0](), self._satisfied[1]
        return layer is not None and layer.active_adapters == active

    def tell(self) -> bool:
        """Says what is missing, if it is; returns whether there is nothing to say later."""
        tuner = next((module for module in self.model.modules() if isinstance(module, BaseTunerLayer)), None)
        if tuner is not None and tuner.disable_adapters:
            return False  # a reference model; what counts is the next forward
        if self.is_told:
            return True
        active = [] if tuner is None else list(tuner.active_adapters)
        if tuner is not None and any(has_arrived(self.model, name) for name in active):
            self._satisfied = weakref.ref(tuner), active
            return False
        self.is_told = True
        where = str(self.adapter) if self.adapter.is_dir() else f"the {ADAPTER_FOLDER} of the checkpoint"
        what = f"this base was packed together with an initial adapter ({self.start}) that holds a part of its weights"
        if not active:
            logger.warning(
                "lowra: %s; without it the outputs are far off. Load %s, or an adapter trained from it "
                "(PeftModel.from_pretrained; --adapter on the command line).",
                what,
                where,
            )
        else:
            logger.warning(
                "lowra: %s, and adapter %s starts anew: training starts far off. Start from %s: "
                "PeftModel.from_pretrained(model, '%s', is_trainable=True).",
                what,
                ", ".join(map(repr, active)),
                where,
                where,
            )
        return True


def say_of_dequantised(model: PreTrainedModel) -> None:
    """Before a packed base becomes a dense model, which knows of no start: says so unless an adapter was merged."""
    start, head = stored_start(model), model.get_output_embeddings()
    if start is not None and any(isinstance(module, LowRALinear) and module is not head for module in model.modules()):
        logger.warning(
            "lowra: this base was packed together with an initial adapter (%s) that holds a part of its weights, and "
            "dequantised alone its outputs are far off. lowra.merge_into_dense makes a dense model of base and adapter "
            "(`lowra merge` on the command line).",
            start.what,
        )


@torch.compiler.assume_constant_result
def _tell_while_compiling(number: int) -> None:
    """Runs once, while a forward is being compiled, and leaves nothing in the compiled code."""
    if (watch := _watches.get(number)) is not None:
        watch.tell()
