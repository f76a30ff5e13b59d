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
from .tables_in_state import IN_TRAINING, KEY, as_state, from_state


def as_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of autocast where that is on: it does not know our ops and functions."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"linear(): argument 'input' must be Tensor, not {type(x).__name__}")
    device_type = x.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)  # "meta" has none, and says so
    return x.to(torch.get_autocast_dtype(device_type)) if autocast else x


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
        if fault is not None or not self._tables_of_adapters():
            return fault
        codes = {name: given[name] for name in ("weight", "row_bits") if is_readable(given.get(name))}
        if all(torch.equal(tensor.cpu(), self._parameters[name].cpu()) for name, tensor in codes.items()):
            return None
        return "an adapter on it has tables that were trained for the codes it has: delete_adapter comes before others."

    def _tables_of_adapters(self) -> dict[str, dict[str, torch.Tensor]]:
        return {} if self.adapter_tables is None else self.adapter_tables.for_layer(self.table_name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if tables := self._tables_of_adapters():
            destination[prefix + KEY] = as_state(self.table_name, self.weight, tables)

    def _load_from_state_dict(  # noqa: PLR0917 - as PyTorch calls it
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes tables that adapters had where the state dict was made, after the codes that they belong to."""
        faults = len(error_msgs)
        learned = [name for name in IN_TRAINING if prefix + name in state_dict and name not in self._parameters]
        if learned:
            error_msgs.append(
                f"{prefix[:-1]}: this state dict was made while levels and scales were being trained ({learned[0]}), "
                "and here they are not, or not in that way: make it after bake_tables, or load it after such a "
                "train_tables."
            )
        others = {key: value for key, value in state_dict.items() if key != prefix + KEY}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if prefix + KEY in state_dict and len(error_msgs) == faults:
            try:
                self._take_tables(state_dict[prefix + KEY])
            except ValueError as error:
                error_msgs.append(f"{prefix[:-1]}: {error}")

    def _take_tables(self, state: object) -> None:
        """
        Raises:
            ValueError: they are damaged, or nothing here can have them.
        """
        if self.adapter_tables is None:
            raise ValueError(
                "this state dict has levels and scales of an adapter, and this model has no adapter that could have "
                "them: load the adapter's folder (PeftModel.from_pretrained or load_adapter)."
            )
        self.adapter_tables.put_layer(self.table_name, from_state(self.table_name, state, self.packed_tensors()))

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
