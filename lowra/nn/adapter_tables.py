"""Levels and scales of adapters over one packed base: the active adapter's count, and without one the base's own.

Which adapter that is the layers ask PEFT's own layers at every product, because it changes through many doors:
set_adapter of five classes, disable_adapter, merging, deleting. Copying tables at each of them would forget one.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..checkpoints.records import WITHOUT_TABLES
from .linear import LowRALinear
from .packed_module import PackedModule

NO_ADAPTER = "__base__"  # PEFT's name for rows of a batch that use no adapter


class AdapterTables:
    """The tables of all adapters of one model. Every packed linear layer holds it and asks it for its own.

    Attributes:
        in_training: name of the adapter for which `train_tables` made tables trainable, until they are baked; or None.
    """

    in_training: str | None = None

    def __init__(self, layer: BaseTunerLayer):
        """Args: layer: any that PEFT put on the model; it knows which adapters are active, as all do."""
        self._layer = layer
        self._tables: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
        self._instead: list[str] | None = None

    @property
    def adapters(self) -> list[str]:
        """Names of adapters that have tables, be they still in training."""
        return list(dict.fromkeys([*self._tables, *([] if self.in_training is None else [self.in_training])]))

    def put(self, adapter: str, tables: dict[str, dict[str, torch.Tensor]]) -> None:
        """Gives an adapter tables: by layer and by `levels`, `scales` and `scale_steps`, of which it may have some."""
        with torch.inference_mode(False):  # what was read under it serves training as well
            self._tables[adapter] = {
                layer: {part: t.clone() if t.is_inference() else t for part, t in parts.items()}
                for layer, parts in tables.items()
            }

    def forget(self, adapter: str) -> None:
        """Takes them from an adapter that is gone, or another one of its name."""
        self._tables.pop(adapter, None)

    def of_adapter(self, adapter: str) -> dict[str, dict[str, torch.Tensor]]:
        """What `put` was given; empty for adapters without tables."""
        return self._tables.get(adapter, {})

    def put_layer(self, layer: str, tables: dict[str, dict[str, torch.Tensor]]) -> None:
        """Gives adapters tables of one layer, by adapter and part; what others have stays."""
        for adapter, parts in tables.items():
            self.put(adapter, {**self.of_adapter(adapter), layer: parts})

    def for_layer(self, layer: str) -> dict[str, dict[str, torch.Tensor]]:
        """What adapters have for a layer, by adapter and part."""
        return {adapter: tables[layer] for adapter, tables in self._tables.items() if tables.get(layer)}

    def active(self) -> list[str]:
        """Names of the adapters that count now: none while they are disabled, those that were merged, or the active."""
        if self._instead is not None:
            return self._instead
        if self._layer.disable_adapters:
            return []
        return list(self._layer.merged_adapters or self._layer.active_adapters)

    def chosen(self) -> str | None:
        """The adapter whose tables count now; None where the base's own do.

        Raises:
            ValueError: several adapters are active, of which one at least has tables.
        """
        return self.common(self.active()) if self.adapters else None

    def common(self, adapters: Sequence[str]) -> str | None:
        """The one of these adapters that has tables; None where none has.

        Raises:
            ValueError: they differ in their tables.
        """
        own = self.adapters
        having = [name for name in dict.fromkeys(adapters) if name in own]
        if not having:
            return None
        if len(dict.fromkeys(adapters)) > 1:
            raise ValueError(
                f"The adapters {', '.join(map(repr, dict.fromkeys(adapters)))} cannot be used together: {having[0]!r} "
                "was trained with levels and scales of its own (tables.safetensors), and a layer has one set at a "
                f"time; {WITHOUT_TABLES}."
            )
        return having[0]

    def check_batch(self, adapters: Sequence[str]) -> None:
        """Raises ValueError where the rows of one batch name adapters of other tables than count now."""
        if self.adapters:
            self.common(adapters)
            if self.common([name for name in adapters if name != NO_ADAPTER]) != self.chosen():
                raise ValueError(
                    f"The rows of this batch name {', '.join(map(repr, dict.fromkeys(adapters)))}, and the levels and "
                    f"scales that count are those of the active adapter, {self.active()}: set_adapter first, and "
                    f"give rows with other tables in a batch of their own; {WITHOUT_TABLES}."
                )

    def of_layer(self, name: str, device: torch.device) -> dict[str, torch.Tensor]:
        """What counts now in place of a layer's own tables; empty where they do.

        Args:
            name: of the layer in the base.
            device: of the layer; tables that are elsewhere are moved there.
        """
        chosen = self.chosen()
        if chosen is None:
            return {}
        tables = self.of_adapter(chosen).get(name, {})
        for part, tensor in tables.items():
            if tensor.device != device:
                with torch.inference_mode(False):
                    tables[part] = tensor.to(device)
        return tables

    @contextlib.contextmanager
    def of(self, adapters: Sequence[str]) -> Iterator[None]:
        """Lets the tables of these adapters count, whichever are active."""
        before, self._instead = self._instead, list(adapters)
        try:
            yield
        finally:
            self._instead = before


def adapter_tables(model: nn.Module) -> AdapterTables | None:
    """The tables of a model's adapters; None while none has any."""
    return next((m.adapter_tables for m in model.modules() if isinstance(m, LowRALinear) and m.adapter_tables), None)


def hold_adapter_tables(model: nn.Module) -> AdapterTables | None:
    """The same, made where there is none yet; None for a model that has no adapters on its layers."""
    tables = adapter_tables(model)
    if tables is None:
        layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
        if layer is None:
            return None
        tables = AdapterTables(layer)
    for name, module in packed_linears(model).items():
        module.adapter_tables, module.table_name = tables, name
    return tables


def release_adapter_tables(model: nn.Module, keep: Sequence[str] | None = None) -> None:
    """Leaves the layers with tables of their own alone, for a model whose adapters are taken off.

    Args:
        model: with adapters.
        keep: adapters that are merged into the model and whose tables become its own; None for those that are active,
            an empty list for none.
    """
    tables = adapter_tables(model)
    if tables is None:
        return
    for module in packed_linears(model).values():
        with tables.of(tables.active() if keep is None else keep):
            own = tables.of_layer(module.table_name, module.weight.device)
        module.adapter_tables = None
        if own:
            module.set_tensors({part: tensor.clone() for part, tensor in own.items()})
            module.is_replaced = True
            module.prepare()


def packed_linears(model: nn.Module) -> dict[str, LowRALinear]:
    """The packed linear layers of a model by their names in the base, but for a head tied to packed embeddings."""
    modules = dict(model.named_modules())
    # it has no tables of its own
    tied = {id(m.levels) for m in modules.values() if isinstance(m, PackedModule) and not isinstance(m, LowRALinear)}
    return {
        base_name(name): module
        for name, module in modules.items()
        if isinstance(module, LowRALinear) and id(module.levels) not in tied
    }


def base_name(name: str) -> str:
    """Name of a layer in the base, without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")
