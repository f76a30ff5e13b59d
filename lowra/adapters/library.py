"""Many packed adapters on one base: held packed, decoded when used, served in mixed batches through PEFT.

Every adapter stays in memory as its packed tensors. To be used it is decoded into a PEFT adapter of the same name,
and at most `cache_size` of these exist at a time; the one unused for longest makes room. Nothing is ever written
back, so an adapter that leaves the cache is only dropped. Adding, switching or removing one adapter does not touch
the others. Trained levels and scales that came with an adapter count while it is the active one.

PEFT keeps one module per adapter and layer, so its `adapter_names=` batches work as they are: the rows of a batch that
name the same adapter go through its factors together.
"""

import copy
import pathlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..checkpoints.places import expanded
from ..checkpoints.records import TABLES_FILE
from ..integrations.adapter_keys import own_keys
from ..integrations.adapter_records import Arriving, settle
from ..integrations.stored_start import filled_from_file
from ..nn.trained_tables import check_tables
from ..nn.walk import modules_of
from .labels import BaseIdentity, check_label
from .storage import PackedAdapter, SharedBasis, read_packed, tensor_bytes

BASE = "__base__"  # PEFT's name for rows of a batch that use no adapter


def attach(model: nn.Module, packed: PackedAdapter, name: str) -> PeftModel:
    """Decodes a packed adapter into a PEFT adapter of this name, without checks of its label.

    Args:
        model: the base model, which gets wrapped, or a PeftModel, which gets one adapter more; what is active stays so.

    Raises:
        ValueError: the adapter has factors for layers that the model does not have, or of another shape.
    """
    _check_fit(model, packed, name)
    tables = check_tables(model, packed.tables, f"The {TABLES_FILE} of adapter {name}") if packed.tables else {}
    config = PeftConfig.from_peft_type(**copy.deepcopy(packed.config))
    config.inference_mode = True
    # The weights are about to be replaced; LoftQ, PiSSA and others would start by changing the base.
    config.init_lora_weights = True
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, low_cpu_mem_usage=True)
    else:
        wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        model = wrapper(model, config, adapter_name=name, low_cpu_mem_usage=True)
    with filled_from_file():
        result: Any = set_peft_model_state_dict(model, packed.dequantize(), adapter_name=name, low_cpu_mem_usage=True)
    absent = [key for key in result.missing_keys if "lora_" in key and f".{name}." in f"{key}."]
    if result.unexpected_keys or absent:
        model.delete_adapter(name)
        raise ValueError(
            f"Adapter {name} has other factors than its PEFT configuration asks for, such as "
            f"{(list(result.unexpected_keys) + absent)[0]}; expected the configuration it was trained with."
        )
    _move_to_its_layers(model, name)
    settle(model, name, Arriving({}, tables or None))
    return model


def _check_fit(model: nn.Module, packed: PackedAdapter, name: str) -> None:
    """Raises ValueError unless the model has every layer of the adapter in its shape; PEFT would find out too late."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(bare.named_modules())
    for layer in packed.layers:
        module = modules.get(layer.name.removeprefix("base_model.model."))
        kind = (
            ("embedding_dim", "num_embeddings")
            if hasattr(module, "num_embeddings")
            else ("out_features", "in_features")
        )
        found = tuple(getattr(module, attribute, None) for attribute in kind)
        if module is None or (None not in found and found != (layer.m, layer.n)):
            came = "has no such layer" if module is None else f"has [{found[0]}, {found[1]}] there"
            raise ValueError(
                f"Adapter {name} does not fit the model: {layer.name} is [{layer.m}, {layer.n}] and the model {came}; "
                f"expected the base it was trained on: {packed.label.get('base')}."
            )


def _move_to_its_layers(model: nn.Module, name: str) -> None:
    """Moves an adapter's parameters to where the layers they belong to are, which may be several devices."""
    for module in model.modules():
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
            own: list[nn.Parameter] = []
            others: list[nn.Parameter] = []
            for parameter_name, parameter in module.named_parameters():
                (own if f".{name}." in f".{parameter_name}." else others).append(parameter)
            for parameter in own if others else []:
                parameter.data = parameter.data.to(others[0].device)


def load_packed(
    model: nn.Module, folder: str | pathlib.Path, adapter_name: str = "default", force: bool = False
) -> PeftModel:
    """Loads one packed adapter into a model, its label checked; the counterpart of `PeftModel.from_pretrained`.

    Args:
        model: the base model or a PeftModel on it.
        folder: what `lowra adapter quantize` wrote.
        force: load in spite of the label, with a warning.

    Raises:
        LabelError: another base, past retirement, or changed bytes. ValueError, FileNotFoundError: unreadable.
    """
    packed = read_packed(folder)
    check_label(packed, BaseIdentity.of(model), str(folder), force)
    model = attach(model, packed, adapter_name)
    _activate(model, adapter_name)
    return model


class AdapterLibrary:
    """Packed adapters by name on one base model.

    Args:
        base: the base model, without adapters; the library wraps it with PEFT when the first adapter is used.
        cache_size: adapters decoded at a time, and so the most that one batch can mix.

    A batch of rows for different adapters:

        library.prepare(["law", "news", "law"])
        library.model(**batch, adapter_names=["law", "news", "law"])
    """

    def __init__(self, base: nn.Module, cache_size: int = 4):
        if isinstance(base, PeftModel):
            raise ValueError("AdapterLibrary got a PeftModel; expected the base model. Pass model.unload().")
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):  # which would change with its switches
            raise ValueError(
                "AdapterLibrary got a base on which a PeftModel is already: load it anew, or unload() that."
            )
        if cache_size < 1:
            raise ValueError(f"cache_size is {cache_size}; expected at least 1.")
        self.model: nn.Module = base
        self.cache_size = cache_size
        self.base = BaseIdentity.of(base)
        self._packed: dict[str, PackedAdapter] = {}
        self._shared: dict[str, SharedBasis] = {}  # by the folder the basis lies in
        self._decoded: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._active: str | None = None  # what `switch` chose; it keeps its place in the cache

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: str) -> bool:
        return name in self._packed

    @property
    def names(self) -> list[str]:
        return list(self._packed)

    @property
    def decoded(self) -> list[str]:
        """Adapters that are decoded at present, least recently used first."""
        return list(self._decoded)

    def add(self, name: str, folder: str | pathlib.Path, force: bool = False) -> None:
        """Takes a packed adapter into the library; it stays packed.

        Args:
            name: what batches call it; no dots, since PEFT makes module names of it.
            force: take it in spite of its label, with a warning.

        Raises:
            LabelError: another base, past retirement, or changed bytes. ValueError, FileNotFoundError: unreadable, or a
                name that is taken or unusable.
        """
        if name in self._packed:
            raise ValueError(f"The library already has an adapter {name!r}; remove it first, or give another name.")
        if not name or "." in name or name == BASE:
            raise ValueError(
                f"Adapter name {name!r} cannot be used; expected one without dots, not empty, not {BASE!r}."
            )
        above = str(expanded(folder).resolve().parent)
        packed = read_packed(folder, self._shared.get(above))
        check_label(packed, self.base, str(folder), force)
        if packed.shared:
            self._shared[above] = packed.shared
        self._packed[name] = packed

    def remove(self, name: str) -> None:
        """Forgets an adapter; the others, decoded or not, stay as they are."""
        self._require(name)
        if name == self._active:
            self._active = None
        if name in self._decoded:
            self._drop(name)
        packed = self._packed.pop(name)
        if packed.shared and not any(other.shared is packed.shared for other in self._packed.values()):
            self._shared = {above: basis for above, basis in self._shared.items() if basis is not packed.shared}

    def label(self, name: str) -> dict:
        """The label of an adapter."""
        self._require(name)
        return self._packed[name].label

    def prepare(self, names: Sequence[str]) -> None:
        """Decodes every adapter that a batch names, "__base__" apart, for `self.model(..., adapter_names=names)`.

        Raises:
            ValueError: an unknown name; more different adapters than the cache holds beside the active one; no adapters
                in the library, whose model takes no names then.
        """
        wanted = [name for name in dict.fromkeys(names) if name != BASE]
        if names and not wanted and not self._decoded:
            if not self._packed:
                raise ValueError("The library has no adapters, so its model takes no names: call it without.")
            wanted = self.names[:1]  # a base that no adapter is on takes no names
        for name in wanted:
            self._require(name)
        # Were the active adapter to leave, a batch without names would silently go through the base alone.
        staying = set(wanted) | ({self._active} if self._active else set())
        if len(staying) > self.cache_size:
            raise ValueError(
                f"The batch names {len(wanted)} different adapters, the active one is {self._active!r}, and the cache "
                f"holds {self.cache_size}; split the batch, or make the library with a larger cache_size."
            )
        for name in wanted:
            if name in self._decoded:
                self._decoded.move_to_end(name)
                continue
            # The newcomer comes before the oldest goes, so that the model stays wrapped.
            is_first = not self._decoded
            self.model = attach(self.model, self._packed[name], name)
            if is_first:
                _rest(self.model, name)  # PEFT has made it the active one, which nobody has chosen
            self._decoded[name] = None
            if len(self._decoded) > self.cache_size:
                self._drop(next(old for old in self._decoded if old not in staying))
        if any(module.training for module in modules_of(self.model)):  # eval() itself takes ten times as long to look
            self.model.eval()

    def switch(self, name: str) -> None:
        """Makes one adapter the active one, for batches that name none; it stays decoded until another is.

        Before the first switch, and once the active adapter was removed, such batches go through the base alone.

        Raises:
            ValueError: an unknown name, or an adapter that does not fit the model.
        """
        self._require(name)
        before, self._active = self._active, None  # which may make room
        try:
            self.prepare([name])
        except ValueError:
            self._active = before
            raise
        _activate(self._wrapped, name)
        self._active = name

    def memory(self) -> dict[str, float]:
        """Bytes held: packed adapters, bases they share, trained tables, decoded copies; factors in float16."""
        adapters = self._packed.values()
        parameters = sum(packed.parameters for packed in adapters)
        packed_bytes = sum(packed.tensor_bytes for packed in adapters)
        shared_bytes = sum(tensor_bytes(basis.tensors) for basis in self._shared.values())
        decoded = {f".{name}." for name in self._decoded}
        decoded_bytes = sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in self.model.named_parameters()
            if "lora_" in name and any(mark in f"{name}." for mark in decoded)
        )
        return {
            "adapters": len(self),
            "packed_bytes": packed_bytes,
            "shared_bytes": shared_bytes,
            "table_bytes": sum(packed.table_bytes for packed in adapters),
            "decoded_adapters": len(self._decoded),
            "decoded_bytes": decoded_bytes,
            "float16_bytes": 2 * parameters,
            "average_bits": 8 * (packed_bytes + shared_bytes) / parameters if parameters else 0.0,
        }

    @property
    def _wrapped(self) -> PeftModel:
        if not isinstance(self.model, PeftModel):
            raise ValueError("No adapter of this library has been used yet, so its model is the bare base.")
        return self.model

    def _require(self, name: str) -> None:
        if name not in self._packed:
            known = ", ".join(sorted(self._packed)[:10]) or "none"
            raise ValueError(f"The library has no adapter {name!r} among its {len(self)}: {known}.")

    def _drop(self, name: str) -> None:
        model = self._wrapped
        if len(self._decoded) == 1:  # a PeftModel without any adapter is no model
            self.model = model.unload()
        else:
            if self._active is None:
                _rest(model, next(other for other in self._decoded if other != name))
            model.delete_adapter(name)
        del self._decoded[name]


def _activate(model: PeftModel, adapter_name: str) -> None:
    """Makes an adapter the active one and leaves it frozen; `inference_mode` of `set_adapter` since PEFT 0.19."""
    model.set_adapter(adapter_name)
    own = own_keys(model, adapter_name)
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.requires_grad_(False)


def _rest(model: PeftModel, adapter_name: str) -> None:
    """Makes no adapter the active one, so that a batch that names none goes through the base alone.

    Args:
        adapter_name: of any that stays, whose configuration PEFT goes by.
    """
    tuner: Any = model.base_model
    model.active_adapter = adapter_name
    tuner.set_adapter([])
