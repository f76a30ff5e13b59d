"""`LowRALinear`, a linear layer whose frozen weight lies in packed bits; to PEFT it is an `nn.Linear`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import PackedLinear, linear

from ..weights.packed import TABLES, PackedWeight
from .packed_module import PackedModule
from .row_layout import is_readable

_TABLES_HELD = "adapter_tables"  # of a state dict's metadata: digests of the tables that adapters have


def as_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of autocast where that is on: it does not know our ops and functions."""
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x


class LowRALinear(PackedModule, nn.Linear):
    """y = x W^T + bias with a packed W [N, K].

    Forward and backward run on `bitsandbytes::lowra_linear`, which keeps no dense weight between them.

    Attributes:
        adapter_tables: what adapters on this model have in place of `levels` and scales (`AdapterTables`), or None.
        table_name: under which they know this layer.
        at_first_forward: called with this layer before its forward, until it puts None in its own place; or None.
    """

    adapter_tables: Any = None
    table_name = ""
    at_first_forward: Callable[["LowRALinear"], None] | None = None

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: torch.Tensor | None = None) -> "LowRALinear":
        module = cls(packed.in_features, packed.row_bits.numel(), packed.group_size, packed.tensors(), bias)
        module.prepare()
        return module

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802 - the name under which PEFT looks for a quantised weight
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.at_first_forward is not None:
            self.at_first_forward(self)
        x = as_autocast(x)
        if x.dtype == torch.float64:  # which the kernels do not know
            return nn.functional.linear(x, self.dequantize(x.dtype), self.bias_as(x.dtype))
        # Compiled code has no host to spare, and the compiler knows the op but not the function.
        product = linear if torch.compiler.is_compiling() else PackedLinear.apply
        return product(x, self.matrix(), self.bias_as(x.dtype))

    def matrix(self) -> PackedMatrix:
        if self.adapter_tables is None:
            return super().matrix()
        tensors = {**self._parameters, **self.current_tables()}
        return self._matrix(tensors, self.row_layout(), self.weight.device)

    def _fault_of(self, given: dict[str, torch.Tensor], group_size: int) -> str | None:
        fault = super()._fault_of(given, group_size)
        if fault is not None or self.adapter_tables is None or not self.adapter_tables.has_some_for(self.table_name):
            return fault
        codes = {name: given[name] for name in ("weight", "row_bits") if is_readable(given.get(name))}
        if all(torch.equal(tensor.cpu(), self._parameters[name].cpu()) for name, tensor in codes.items()):
            return None
        return "an adapter on it has tables that were trained for the codes it has: delete_adapter comes before others."

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            held = {} if self.adapter_tables is None else self.adapter_tables.digests_of_layer(self.table_name)
            destination._metadata.setdefault(prefix[:-1], {})[_TABLES_HELD] = held

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        """Refuses a state dict that was made beside other tables of an adapter: they are no part of it."""
        recorded = local_metadata.get(_TABLES_HELD)
        if recorded is not None and (recorded or self.adapter_tables is not None):
            held = {} if self.adapter_tables is None else self.adapter_tables.digests_of_layer(self.table_name)
            # factors come with the layers that PEFT has put its own around
            for adapter in recorded.keys() | (held.keys() if prefix.endswith(".base_layer.") else set()):
                if recorded.get(adapter) != held.get(adapter):
                    others[-1].append(  # the messages
                        f"{prefix[:-1]}: this state dict was made beside other levels and scales of adapter "
                        f"{adapter!r} than this model has, and they are no part of it: load the adapter's folder "
                        "(PeftModel.from_pretrained or load_adapter)."
                    )
                    return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def current_tables(self) -> dict[str, torch.Tensor]:
        """Levels, scales and scale steps that count now, by name."""
        own: dict[str, torch.Tensor] = {n: tensor for n, tensor in self.packed_tensors().items() if n in TABLES}
        if self.adapter_tables is None:
            return own
        return own | self.adapter_tables.of_layer(self.table_name, self.weight.device)

    def bias_as(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias as the ops take it beside an x of this dtype."""
        return None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        rows = "" if self._layout is None else f", rows of 4/2/1 bits={self._row_counts(self._layout)}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, packed{rows}"
