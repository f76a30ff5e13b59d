"""Levels and group scales trained together with an adapter: the codes stay, what they stand for is learned.

LowRA, section 4.1: one set of thresholds, and so one set of codes, for all adapters, with levels for each task.

    parameters = train_tables(model, scales=True)  # a PeftModel on a packed base; by name, for a trainer's checkpoints
    ...                                            # any training loop
    bake_tables(model)                             # what was learned, in packed format 1: the kernels run as before
    model.save_pretrained("adapter")               # the tables beside it; the packed base itself is for all adapters
    PeftModel.from_pretrained(base, "adapter")     # with its tables; without PEFT: save_tables, load_tables
"""

import pathlib
from typing import Any

import torch
from torch import nn

from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import gradient_of_input, is_transformed, linear
from bitsandbytes.backends.lowra.reference import decode_scales, dequantize
from bitsandbytes.backends.lowra.table_gradients import table_gradients, table_gradients_of

from ..checkpoints.atomic import save_tensors
from ..checkpoints.guarded import read_tensors
from ..checkpoints.places import expanded
from ..checkpoints.records import TABLES_FILE, renew_record
from ..checkpoints.targets import replace_module
from ..weights.packed import STORAGES, TABLES, store_scales
from .adapter_tables import AdapterTables, adapter_tables, base_name, hold_adapter_tables, packed_linears
from .linear import LowRALinear, as_autocast
from .row_layout import is_readable
from .tables_in_state import check_part, codes_digest

_EXPECTED = "the trained tables of an adapter"


def train_tables(model: nn.Module, scales: bool = False) -> dict[str, nn.Parameter]:
    """Makes the levels of every packed linear layer trainable, and a factor of each group's scale if asked.

    What is trained are changes, float32 and zero at first. A learning rate near 4e-3 suits them, whatever the adapter's
    is (docs/lab/accuracy.md). PEFT does not keep them: a trainer that resumes has to. On a model with adapters they are
    those of the active one: they count while it is active, and the base keeps its own.

    Args:
        model: after the adapter has been put on it; changed in place.
        scales: train scales as well; a number for every `group_size` weights, where levels are some for each channel.

    Returns:
        the new parameters by name.

    Raises:
        ValueError: there is no packed linear layer, tables are trained already, or several adapters are active.
    """
    layers = _packed_layers(model)
    if any(isinstance(layer, TrainedTablesLinear) for layer in layers.values()):
        raise ValueError("The tables of this model are being trained already: bake_tables ends that.")
    held = hold_adapter_tables(model)
    adapter = None if held is None else _only_active(held)
    for name, layer in layers.items():
        replace_module(model, name, TrainedTablesLinear(layer, scales, adapter))
    endings = ("level_change", "scale_change")
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in endings}


def bake_tables(model: nn.Module) -> None:
    """Puts plain packed layers with the trained levels and scales in the places of those that train them.

    Levels are rounded to float16 and scales to their storage, so outputs change by that rounding, once.

    Raises:
        ValueError: no tables are being trained.
    """
    trained = {n: layer for n, layer in _packed_layers(model).items() if isinstance(layer, TrainedTablesLinear)}
    if not trained:
        raise ValueError("No tables are being trained in this model: train_tables comes first.")
    adapter = next(iter(trained.values())).adapter
    tables = adapter_tables(model)
    if adapter is not None and tables is not None:
        tables.put(adapter, {base_name(name): layer.baked_tables() for name, layer in trained.items()})
    for name, layer in trained.items():
        replace_module(model, name, layer.baked() if adapter is None else layer.untrained())


def save_tables(model: nn.Module, folder: str | pathlib.Path, scales: bool = True) -> pathlib.Path:
    """Writes levels and, unless told otherwise, scales of all packed linear layers to `folder/tables.safetensors`.

    They are those that count now: of the active adapter, if it has any.

    Raises:
        ValueError: tables are still being trained.
    """
    tables = {}
    for name, layer in _packed_layers(model).items():
        if isinstance(layer, TrainedTablesLinear):
            raise ValueError("The tables of this model are still being trained: bake_tables comes before saving.")
        current = layer.current_tables()
        tables[base_name(name)] = current if scales else {"levels": current["levels"]}
    return _write(model, tables, expanded(folder))


def save_tables_of(model: nn.Module, adapter: str, folder: pathlib.Path) -> None:
    """Writes the tables of one adapter beside it; where it has none, it takes away those that an earlier one left.

    Those that are being trained are written as they are now.
    """
    held = adapter_tables(model)
    tables = {} if held is None else held.of_adapter(adapter)
    training = [layer for layer in packed_linears(model).values() if isinstance(layer, TrainedTablesLinear)]
    if training and training[0].adapter == adapter:
        tables = {layer.table_name: layer.baked_tables() for layer in training}
    if tables:
        _write(model, tables, folder)
    else:
        (folder / TABLES_FILE).unlink(missing_ok=True)


def is_training_tables(model: nn.Module) -> bool:
    """Whether `train_tables` was called and `bake_tables` was not yet."""
    return any(isinstance(module, TrainedTablesLinear) for module in model.modules())


def _write(model: nn.Module, tables: dict[str, dict[str, torch.Tensor]], folder: pathlib.Path) -> pathlib.Path:
    tensors = {}
    for name, layer in packed_linears(model).items():
        tensors[f"{name}.codes"] = codes_digest(name, layer.weight)
        own = tables.get(name, {})
        tensors.update({f"{name}.{part}": tensor.detach().cpu() for part, tensor in own.items()})
    save_tensors(tensors, folder / TABLES_FILE)
    renew_record(folder)
    return folder / TABLES_FILE


def load_tables(model: nn.Module, folder: str | pathlib.Path) -> None:
    """Puts the levels and scales of `folder/tables.safetensors` into the packed linear layers, all or none.

    On a model with adapters they are those of the active one, and the base keeps its own.

    Raises:
        FileNotFoundError, ValueError: no such file; the tables of other codes or layers than this model's; several
            adapters are active.
    """
    path = expanded(folder) / TABLES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: this adapter has no tables of its own.")
    tables = read_tables(model, path)
    held = hold_adapter_tables(model)
    if held is not None:
        held.put(_only_active(held), tables)
        return
    for name, layer in packed_linears(model).items():
        for part, tensor in tables[name].items():
            getattr(layer, part).data.copy_(tensor)
        layer.prepare()


def read_tables(model: nn.Module, path: pathlib.Path) -> dict[str, dict[str, torch.Tensor]]:
    """Tables by layer and part from a file, as `AdapterTables.put` takes them.

    Raises:
        OSError, ValueError: a file that cannot be read; the tables of other codes or layers than this model's.
    """
    return check_tables(model, read_tensors(path, _EXPECTED)[0], str(path))


def check_tables(model: nn.Module, stored: dict[str, torch.Tensor], path: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a file of tables, by layer and part.

    Args:
        model: with packed layers, whose tables they are to be.
        stored: the content of the file.
        path: of the file, for messages.

    Raises:
        ValueError: the tables of other codes or layers than this model's, cut short or not finite.
    """
    layers = {base_name(name): layer for name, layer in _packed_layers(model).items()}
    tables: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layers}
    for key, tensor in sorted(stored.items(), key=lambda item: not item[0].endswith(".codes")):
        name, _, part = key.rpartition(".")
        if name not in layers or part not in ("codes", *TABLES):
            raise ValueError(f"{path} holds {key}, which this model does not have: it belongs to another base.")
        layer = layers[name]
        if isinstance(layer, TrainedTablesLinear):
            raise ValueError("The tables of this model are being trained: load others after bake_tables, or before.")
        if part == "codes":
            if not torch.equal(tensor, codes_digest(name, layer.weight)):
                raise ValueError(
                    f"{path} belongs to other codes of {name} than this model has: load it on the packed base that the "
                    "adapter was trained on."
                )
            continue
        check_part(key, tensor, getattr(layer, part), path)
        tables[name][part] = tensor
    if missing := [name for name, parts in tables.items() if "levels" not in parts or f"{name}.codes" not in stored]:
        raise ValueError(f"{path} is cut short: it has no levels or no digest of {', '.join(missing[:3])}.")
    return tables


def _only_active(held: AdapterTables) -> str:
    active = held.active()
    if len(active) != 1:
        raise ValueError(
            f"Tables belong to one adapter, and active are {active}: make that one active first (set_adapter)."
        )
    return active[0]


class TrainedTablesLinear(LowRALinear):
    """A packed linear layer whose levels, and scales if asked, are parameters.

    Attributes:
        level_change: float32 [entries], packed row order: what is added to the levels.
        scale_change: float32 [N, groups], packed row order: relative change of a scale; or None.
        adapter: whose tables they are; None on a model without adapters.
    """

    level_change: nn.Parameter
    scale_change: nn.Parameter | None

    def __init__(self, layer: LowRALinear, scales: bool, adapter: str | None = None):
        super().__init__(
            layer.in_features, layer.out_features, layer.group_size, layer.packed.tensors(), None, layer.compute_dtype
        )
        self.bias = layer.bias
        self.adapter_tables, self.table_name, self.adapter = layer.adapter_tables, layer.table_name, adapter
        self.at_first_forward = layer.at_first_forward
        self.is_replaced = layer.is_replaced
        self.prepare()
        self.level_change = nn.Parameter(torch.zeros_like(layer.levels, dtype=torch.float32))
        change = nn.Parameter(torch.zeros_like(layer.scales, dtype=torch.float32)) if scales else None
        self.register_parameter("scale_change", change)

    def _fault_of(self, given: dict[str, torch.Tensor], group_size: int) -> str | None:
        fault = super()._fault_of(given, group_size)
        bits = given.get("row_bits")
        if fault is not None or bits is None or not is_readable(bits):
            return fault
        if not torch.equal(bits.cpu(), self.row_layout().bits):
            return "its tables are being trained for the codes that it has: bake_tables comes before other codes."
        return None

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels [entries] and scales [N, groups] as they are now, float32, packed row order."""
        current = self.current_tables()
        scales = decode_scales(current["scales"], current.get("scale_steps"))
        if self.scale_change is not None:
            scales = scales * (1 + self.scale_change).clamp(min=0)  # one below zero has no storage
        return current["levels"].float() + self.level_change, scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.adapter is not None and self.adapter_tables.active() != [self.adapter]:
            return super().forward(x)  # another adapter, or none: as a reference model is asked
        if self.at_first_forward is not None:
            self.at_first_forward(self)
        x = as_autocast(x)
        if x.dtype == torch.float64:  # the tables are float32
            return self(x.float()).double()
        levels, scales = self.tables()
        packed, bias = self.matrix(), self.bias_as(x.dtype)
        if is_transformed():
            return nn.functional.linear(x, _dense(packed, levels, scales, x.dtype), bias)
        return TabledLinear.apply(x, levels, scales, bias, packed)

    @torch.no_grad()
    def baked_tables(self) -> dict[str, torch.Tensor]:
        """These tables in their storage, those parts that are trained or that an adapter brought."""
        if self.adapter is None:
            current = self.current_tables()
        else:
            current = dict(self.adapter_tables.of_adapter(self.adapter).get(self.table_name, {}))
        levels, scales = self.tables()
        current["levels"] = levels.half()
        if self.scale_change is not None:
            current["scales"], steps = store_scales(scales, STORAGES[self.scales.dtype])
            if steps is not None:
                current["scale_steps"] = steps
        return current

    def baked(self) -> LowRALinear:
        """The plain packed layer with these tables; on the same codes."""
        layer = self._plain({**self.packed.tensors(), **self.baked_tables()})
        layer.is_replaced = True
        return layer

    def untrained(self) -> LowRALinear:
        """The plain packed layer with the base's tables."""
        return self._plain(self.packed.tensors())

    def _plain(self, tensors: dict[str, torch.Tensor]) -> LowRALinear:
        layer = LowRALinear(self.in_features, self.out_features, self.group_size, tensors, None, self.compute_dtype)
        layer.bias = self.bias
        layer.adapter_tables, layer.table_name = self.adapter_tables, self.table_name
        layer.at_first_forward = self.at_first_forward
        layer.is_replaced = self.is_replaced
        layer.prepare()
        return layer


class TabledLinear(torch.autograd.Function):
    """x W^T + bias with gradients for the levels and the scales of the packed W [N, K].

    Backward makes the gradient of the dense weight, in the dtype of the output, and sums it over the weights of each
    code and of each group; nothing dense stays alive between forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        levels: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        packed: PackedMatrix,
    ) -> torch.Tensor:
        """Args: x [..., K], levels float32 [entries] and scales float32 [N, groups] in packed row order, bias [N] or
        None, and the packed weight, whose own levels and scales do not matter.
        """
        ctx.save_for_backward(x, levels, scales, packed.codes, packed.row_order)
        ctx.sizes, ctx.with_bias = packed.sizes, bias is not None
        return linear(x, packed._replace(scales=scales, scale_steps=None, levels=levels.half()), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, levels, scales, codes, row_order = ctx.saved_tensors
        packed = PackedMatrix(codes, row_order, scales, None, levels.half(), *ctx.sizes)
        for_x = for_levels = for_scales = for_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        again = torch.is_grad_enabled()  # to be differentiated again, which the kernels are not
        if ctx.needs_input_grad[0]:
            dense = _dense(packed, levels, scales, gradient.dtype) if again else None
            for_x = gradient_of_input(gradient, packed) if dense is None else gradient @ dense
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = flat.T @ x.reshape(-1, x.shape[-1])
            gradients_of = table_gradients if again else table_gradients_of
            for_levels, for_scales = gradients_of(of_weight, packed, ctx.needs_input_grad[2])
        if ctx.with_bias and ctx.needs_input_grad[3]:
            for_bias = flat.sum(dim=0)
        return for_x, for_levels, for_scales, for_bias, None


def _dense(packed: PackedMatrix, levels: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight of these tables as PyTorch differentiates it, any number of times and in both directions."""
    return dequantize(packed._replace(scales=scales, scale_steps=None, levels=levels.half()), dtype)


def _packed_layers(model: nn.Module) -> dict[str, LowRALinear]:
    """The packed linear layers that have tables of their own, by their names in the model.

    Raises:
        ValueError: there is none.
    """
    having = set(map(id, packed_linears(model).values()))
    layers = {name: module for name, module in model.named_modules() if id(module) in having}
    if not layers:
        raise ValueError("This model has no packed linear layer: load one that `lowra quantize` wrote.")
    return layers
