"""A packed linear layer whose levels and scales are trained, and `TrainedTablesLinear`, which trains each of them."""

import contextlib
from typing import Any

import torch
from torch import nn

from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import gradient_of_input, is_transformed, linear
from bitsandbytes.backends.lowra.reference import decode_scales, dequantize
from bitsandbytes.backends.lowra.table_gradients import table_gradients, table_gradients_of

from ..weights.packed import STORAGES, store_scales
from .linear import LowRALinear, as_autocast
from .row_layout import is_readable


class TablesBeyondStorage(ValueError):
    """What was trained is more than numbers of its storage, or none."""


class TabledLinear(LowRALinear):
    """A packed linear layer whose tables are functions of parameters.

    Attributes:
        adapter: whose tables they are; None on a model without adapters.
        trains_scales: whether scales are among them.
    """

    trains_scales: bool

    def __init__(self, layer: LowRALinear, adapter: str | None):
        super().__init__(
            layer.in_features, layer.out_features, layer.group_size, layer.packed.tensors(), None, layer.compute_dtype
        )
        self.bias = layer.bias
        self.adapter_tables, self.table_name, self.adapter = layer.adapter_tables, layer.table_name, adapter
        self.at_first_forward = layer.at_first_forward
        self.is_replaced = layer.is_replaced
        self.prepare()

    def _fault_of(self, given: dict[str, torch.Tensor], group_size: int) -> str | None:
        fault = super()._fault_of(given, group_size)
        bits = given.get("row_bits")
        if fault is not None or bits is None or not is_readable(bits):
            return fault
        if not torch.equal(bits.cpu(), self.row_layout().bits):
            return "its tables are being trained for the codes that it has: bake_tables comes before other codes."
        return None

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels [entries] and scales [N, groups] as they are now, float32, packed row order, differentiable."""
        raise NotImplementedError

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., K] times the transposed weight of these tables, plus bias, differentiable in the parameters."""
        raise NotImplementedError

    def counts(self) -> bool:
        """Whether these tables count now, and not those of another adapter, or of none: as a reference is asked."""
        return self.adapter is None or self.adapter_tables.active() == [self.adapter]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.counts():
            return super().forward(x)
        if self.at_first_forward is not None:
            self.at_first_forward(self)
        x = as_autocast(x)
        if x.dtype == torch.float64:  # the tables are float32
            return self(x.float()).double()
        bias = self.bias_as(x.dtype)
        if is_transformed():
            return nn.functional.linear(x, dense(self.matrix(), *self.tables(), x.dtype), bias)
        return self.product(x, bias)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """As of a plain layer, with these tables where they count: a merge adds to it, DoRA takes norms from it."""
        if not self.counts() or dtype == torch.float64:  # which comes back here in float32
            return super().dequantize(dtype)
        levels, scales = self.tables()
        changed = self.matrix().with_tables(levels.half(), scales)
        return torch.ops.bitsandbytes.lowra_dequantize(*changed, dtype)

    @torch.no_grad()
    def baked_tables(self) -> dict[str, torch.Tensor]:
        """These tables in their storage, those parts that are trained or that an adapter brought.

        Raises:
            TablesBeyondStorage: they are no numbers there.
        """
        if self.adapter is None:
            current, own = self.current_tables(), contextlib.nullcontext()
        else:
            current = dict(self.adapter_tables.of_adapter(self.adapter).get(self.table_name, {}))
            own = self.adapter_tables.of([self.adapter])  # changes are of these, whichever adapter is active
        with own:
            levels, scales = self.tables()
        current["levels"] = levels.half()
        if self.trains_scales:
            if self.scales.dtype == torch.float16:
                current["scales"] = scales.half()
            else:
                current["scales"], steps = store_scales(scales, STORAGES[self.scales.dtype])
                if steps is not None:
                    current["scale_steps"] = steps
        for part, tensor in current.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise TablesBeyondStorage(
                    f"The {part} that were trained for {self.table_name or 'a layer'} are no numbers any more in "
                    f"{tensor.dtype}: the training diverged; take an earlier checkpoint, and a lower learning rate."
                )
        return current

    def baked(self) -> LowRALinear:
        """The plain packed layer with these tables; on the same codes.

        Raises:
            TablesBeyondStorage: they are no numbers there.
        """
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


class TrainedTablesLinear(TabledLinear):
    """One whose levels, and scales if asked, are changed one by one.

    Attributes:
        level_change: float32 [entries], packed row order: what is added to the levels.
        scale_change: float32 [N, groups], packed row order: relative change of a scale; or None.
    """

    level_change: nn.Parameter
    scale_change: nn.Parameter | None

    def __init__(self, layer: LowRALinear, scales: bool, adapter: str | None = None):
        super().__init__(layer, adapter)
        self.trains_scales = scales
        self.level_change = nn.Parameter(torch.zeros_like(layer.levels, dtype=torch.float32))
        change = nn.Parameter(torch.zeros_like(layer.scales, dtype=torch.float32)) if scales else None
        self.register_parameter("scale_change", change)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        current = self.current_tables()
        scales = decode_scales(current["scales"], current.get("scale_steps"))
        if self.scale_change is not None:
            scales = scales * (1 + self.scale_change.float()).clamp(min=0)  # one below zero has no storage
        return current["levels"].float() + self.level_change.float(), scales

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _TrainedTables.apply(x, *self.tables(), bias, self.matrix())


class _TrainedTables(torch.autograd.Function):
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
        return linear(x, packed.with_tables(levels.half(), scales), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, levels, scales, codes, row_order = ctx.saved_tensors
        packed = PackedMatrix(codes, row_order, scales, None, levels.half(), *ctx.sizes)
        for_x = for_levels = for_scales = for_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        again = torch.is_grad_enabled()  # to be differentiated again, which the kernels are not
        if ctx.needs_input_grad[0]:
            if again:
                for_x = gradient @ dense(packed, levels, scales, gradient.dtype)
            else:
                for_x = gradient_of_input(gradient, packed)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = flat.T @ x.reshape(-1, x.shape[-1])
            with_scales = ctx.needs_input_grad[2]
            if again:
                packed = packed._replace(levels=_rounded(levels))
                for_levels, for_scales = table_gradients(of_weight, packed, with_scales)
            else:
                for_levels, for_scales = table_gradients_of(of_weight, packed, with_scales)
        if ctx.with_bias and ctx.needs_input_grad[3]:
            for_bias = flat.sum(dim=0)
        return for_x, for_levels, for_scales, for_bias, None


def dense(packed: PackedMatrix, levels: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight of these tables as PyTorch differentiates it, any number of times and in both directions."""
    return dequantize(packed.with_tables(_rounded(levels), scales), dtype)


def _rounded(levels: torch.Tensor) -> torch.Tensor:
    """Levels as they are in float16, in float32, which their gradients are too: in float16 they would be added up, and
    small ones lost.
    """
    return levels + (levels.half().float() - levels).detach()  # exactly the rounded ones
