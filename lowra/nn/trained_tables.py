"""Levels and group scales trained together with an adapter: the codes stay, what they stand for is learned.

LowRA, section 4.1: one set of thresholds, and so one set of codes, for all adapters, with levels for each task.

    parameters = train_tables(model, scales=True)  # a PeftModel on a packed base; by name, for a trainer's checkpoints
    ...                                            # any training loop
    bake_tables(model)                             # what was learned, in packed format 1: the kernels run as before
    save_tables(model, "adapter")                  # beside the adapter; the packed model itself is for all adapters
    load_tables(model, "adapter")                  # on the base again
"""

import pathlib

import torch
from torch import nn

from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import gradient_of_input, linear
from bitsandbytes.backends.lowra.reference import decode_scales
from bitsandbytes.backends.lowra.table_gradients import table_gradients_of

from ..checkpoints.atomic import save_tensors
from ..checkpoints.guarded import read_tensors
from ..checkpoints.places import expanded
from ..checkpoints.targets import replace_module
from ..weights.fingerprint import weight_digest
from ..weights.packed import store_scales
from .linear import LowRALinear, as_autocast
from .packed_module import PackedModule
from .row_layout import is_readable

TABLES_FILE = "tables.safetensors"

_STORAGES = {torch.uint8: "double_quant", torch.float16: "float16", torch.float32: "float32"}


def train_tables(model: nn.Module, scales: bool = False) -> dict[str, nn.Parameter]:
    """Makes the levels of every packed linear layer trainable, and a factor of each group's scale if asked.

    What is trained are changes, float32 and zero at first. A learning rate near 4e-3 suits them, whatever the adapter's
    is (docs/accuracy.md). PEFT does not keep them: a trainer that resumes has to.

    Args:
        model: after the adapter has been put on it; changed in place.
        scales: train scales as well; a number for every `group_size` weights, where levels are some for each channel.

    Returns:
        the new parameters by name.

    Raises:
        ValueError: there is no packed linear layer, or tables are trained already.
    """
    layers = _packed_layers(model)
    if any(isinstance(layer, TrainedTablesLinear) for layer in layers.values()):
        raise ValueError("The tables of this model are being trained already: bake_tables ends that.")
    for name, layer in layers.items():
        replace_module(model, name, TrainedTablesLinear(layer, scales))
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
    for name, layer in trained.items():
        replace_module(model, name, layer.baked())


def save_tables(model: nn.Module, folder: str | pathlib.Path, scales: bool = True) -> pathlib.Path:
    """Writes levels and, unless told otherwise, scales of all packed linear layers to `folder/tables.safetensors`.

    Raises:
        ValueError: tables are still being trained.
    """
    tensors = {}
    for name, layer in _packed_layers(model).items():
        if isinstance(layer, TrainedTablesLinear):
            raise ValueError("The tables of this model are still being trained: bake_tables comes before saving.")
        name = _base_name(name)
        tensors[f"{name}.codes"] = _codes_digest(name, layer)
        for part in ("levels", "scales", "scale_steps") if scales else ("levels",):
            if getattr(layer, part) is not None:
                tensors[f"{name}.{part}"] = getattr(layer, part).detach().cpu()
    path = expanded(folder) / TABLES_FILE
    save_tensors(tensors, path)
    return path


def load_tables(model: nn.Module, folder: str | pathlib.Path) -> None:
    """Puts the levels and scales of `folder/tables.safetensors` into the packed linear layers, all or none.

    Raises:
        FileNotFoundError, ValueError: no such file; the tables of other codes or layers than this model's.
    """
    path = expanded(folder) / TABLES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: this adapter has no tables of its own.")
    stored, _ = read_tensors(path, "the trained tables of an adapter")
    layers = {_base_name(name): layer for name, layer in _packed_layers(model).items()}
    pending = []
    for key, tensor in sorted(stored.items(), key=lambda item: not item[0].endswith(".codes")):
        name, _, part = key.rpartition(".")
        if name not in layers or part not in ("codes", "levels", "scales", "scale_steps"):
            raise ValueError(f"{path} holds {key}, which this model does not have: it belongs to another base.")
        layer = layers[name]
        if isinstance(layer, TrainedTablesLinear):
            raise ValueError("The tables of this model are being trained: load others after bake_tables, or before.")
        if part == "codes":
            if not torch.equal(tensor, _codes_digest(name, layer)):
                raise ValueError(
                    f"{path} belongs to other codes of {name} than this model has: load it on the packed base that the "
                    "adapter was trained on."
                )
            continue
        own = getattr(layer, part)
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            found = "none" if own is None else f"{own.dtype} {list(own.shape)}"
            raise ValueError(f"{path} has {key} as {tensor.dtype} {list(tensor.shape)}, this model has {found}.")
        pending.append((own, tensor))
    if missing := [name for name in layers if f"{name}.levels" not in stored]:
        raise ValueError(f"{path} is cut short: it has no levels of {', '.join(missing[:3])}.")
    for own, tensor in pending:
        own.data.copy_(tensor)
    for layer in layers.values():
        layer.prepare()


class TrainedTablesLinear(LowRALinear):
    """A packed linear layer whose levels, and scales if asked, are parameters.

    Attributes:
        level_change: float32 [entries], packed row order: what is added to `levels`.
        scale_change: float32 [N, groups], packed row order: relative change of a scale; or None.
    """

    def __init__(self, layer: LowRALinear, scales: bool):
        super().__init__(
            layer.in_features, layer.out_features, layer.group_size, layer.packed.tensors(), None, layer.compute_dtype
        )
        self.bias = layer.bias
        self.prepare()
        self.level_change = nn.Parameter(torch.zeros_like(layer.levels, dtype=torch.float32))
        change = nn.Parameter(torch.zeros_like(layer.scales, dtype=torch.float32)) if scales else None
        self.register_parameter("scale_change", change)

    def _fault_of(self, given: dict[str, torch.Tensor], group_size: int) -> str | None:
        fault = super()._fault_of(given, group_size)
        bits = given.get("row_bits")
        if fault is None and is_readable(bits) and not torch.equal(bits.cpu(), self.row_layout().bits):
            return "its tables are being trained for the codes that it has: bake_tables comes before other codes."
        return fault

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels [entries] and scales [N, groups] as they are now, float32, packed row order."""
        scales = decode_scales(self.scales, self.scale_steps)
        if self.scale_change is not None:
            scales = scales * (1 + self.scale_change).clamp(min=0)  # one below zero has no storage
        return self.levels.float() + self.level_change, scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = as_autocast(x)
        if x.dtype == torch.float64:  # the tables are float32
            return self(x.float()).double()
        levels, scales = self.tables()
        return TabledLinear.apply(x, levels, scales, self.bias_as(x.dtype), self.matrix())

    @torch.no_grad()
    def baked(self) -> LowRALinear:
        """The plain packed layer with these tables; on the same codes."""
        levels, scales = self.tables()
        tensors = {**self.packed.tensors(), "levels": levels.half()}
        if self.scale_change is not None:
            stored, steps = store_scales(scales, _STORAGES[self.scales.dtype])
            tensors["scales"] = stored
            if steps is not None:
                tensors["scale_steps"] = steps
        layer = LowRALinear(self.in_features, self.out_features, self.group_size, tensors, None, self.compute_dtype)
        layer.bias = self.bias
        layer.prepare()
        return layer


class TabledLinear(torch.autograd.Function):
    """x W^T + bias with gradients for the levels and the scales of the packed W [N, K].

    Backward makes the gradient of the dense weight, in the dtype of the output, and sums it over the weights of each
    code and of each group; nothing dense stays alive between forward and backward.
    """

    @staticmethod
    def forward(ctx, x, levels, scales, bias, packed):
        """Args: x [..., K], levels float32 [entries] and scales float32 [N, groups] in packed row order, bias [N] or
        None, and the packed weight, whose own levels and scales do not matter.
        """
        ctx.save_for_backward(x, levels, scales, packed.codes, packed.row_order)
        ctx.sizes, ctx.with_bias = packed.sizes, bias is not None
        return linear(x, packed._replace(scales=scales, scale_steps=None, levels=levels.half()), bias)

    @staticmethod
    def backward(ctx, gradient):
        x, levels, scales, codes, row_order = ctx.saved_tensors
        packed = PackedMatrix(codes, row_order, scales, None, levels.half(), *ctx.sizes)
        for_x = for_levels = for_scales = for_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            for_x = gradient_of_input(gradient, packed)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = flat.T @ x.reshape(-1, x.shape[-1])
            for_levels, for_scales = table_gradients_of(of_weight, packed, ctx.needs_input_grad[2])
        if ctx.with_bias and ctx.needs_input_grad[3]:
            for_bias = flat.sum(dim=0)
        return for_x, for_levels, for_scales, for_bias, None


def _packed_layers(model: nn.Module) -> dict[str, LowRALinear]:
    modules = dict(model.named_modules())
    # a head tied to embeddings has no tables of its own
    tied = {id(m.levels) for m in modules.values() if isinstance(m, PackedModule) and not isinstance(m, LowRALinear)}
    layers = {n: m for n, m in modules.items() if isinstance(m, LowRALinear) and id(m.levels) not in tied}
    if not layers:
        raise ValueError("This model has no packed linear layer: load one that `lowra quantize` wrote.")
    return layers


def _base_name(name: str) -> str:
    """Name of a layer in the base, without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _codes_digest(name: str, layer: LowRALinear) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(weight_digest(name, layer.weight)), dtype=torch.uint8)
