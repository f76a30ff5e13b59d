"""Modules whose frozen weight lies in packed bits; `LowRALinear` is to PEFT an `nn.Linear`."""

import torch
from torch import nn

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import PackedLinear, linear

from ..weights.packed import TENSOR_NAMES, PackedWeight

_FLOAT_TENSORS = ("scales", "scale_steps", "levels")


def as_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of autocast where that is on: it does not know our ops and functions."""
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x


class PackedModule(nn.Module):
    """Holds W [N, K] in packed format 1 (csrc/lowra.h).

    All packed tensors are frozen parameters: DDP would send buffers at every step, and FSDP2 shards parameters.

    Attributes:
        weight, row_bits, scales, scale_steps, levels: see `PackedWeight`; `scale_steps` only for 8-bit scales.
        bias: [N] or None.
        compute_dtype: of the dense layer in whose place this one stands, and of what a merge writes; follows
            `model.to(dtype)`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        packed: dict[str, torch.Tensor],
        bias: torch.Tensor | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ):
        """Takes the packed tensors as they are (on "meta" too, where they only carry shapes)."""
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.compute_dtype = compute_dtype
        self.set_tensors({name: packed.get(name) for name in TENSOR_NAMES})
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self._rows: tuple[int, int] | None = None
        self._row_order: dict[torch.device, torch.Tensor] = {}

    def set_tensors(self, tensors: dict[str, torch.Tensor | None]) -> None:
        """Puts packed tensors in their places, frozen."""
        for name, tensor in tensors.items():
            self._parameters[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=False)

    def packed_tensors(self) -> dict[str, nn.Parameter]:
        """The packed tensors that this module has, by name."""
        return {name: self._parameters[name] for name in TENSOR_NAMES if self._parameters[name] is not None}

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, sharing this module's tensors."""
        tensors = {name: self._parameters[name] for name in TENSOR_NAMES}
        return PackedWeight(**tensors, in_features=self.in_features, group_size=self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense weight [N, K], detached."""
        return torch.ops.bitsandbytes.lowra_dequantize(*self.matrix(), dtype)

    def matrix(self) -> PackedMatrix:
        """The packed weight as the ops take it, on the device where it is now."""
        order = self.row_order()
        # PEFT's k-bit preparation casts every float16 parameter to float32, which is exact and is undone here.
        levels = self.levels if self.levels.dtype == torch.float16 else self.levels.to(torch.float16)
        sizes = *self._rows, self.in_features, self.group_size
        return PackedMatrix(self.weight, order, self.scales, self.scale_steps, levels, *sizes)

    @property
    def row_counts(self) -> tuple[int, int] | None:
        """Rows of 4 and of 2 bits; None until they have been counted."""
        return self._rows

    def prepare(self) -> None:
        """Makes everything that the first forward would have to make."""
        if self._rows is None:
            self.count_rows(self.row_bits.detach().cpu())  # the only step that waits for a GPU
        self.row_order()

    def count_rows(self, row_bits: torch.Tensor) -> None:
        """Counts the rows of each precision and builds the row order.

        Args:
            row_bits: this module's, on the CPU.

        Raises:
            ValueError: other precisions than 4, 2 and 1.
        """
        counts = torch.bincount(row_bits, minlength=5).tolist()
        if counts[4] + counts[2] + counts[1] != self.out_features:
            raise ValueError("row_bits holds other values than 1, 2 and 4: the packed checkpoint is damaged.")
        self._rows = counts[4], counts[2]
        order = layout.row_order(row_bits)
        self._row_order = {order.device: order}

    def row_order(self) -> torch.Tensor:
        """int32 [N]: the row of W that stands at each packed place, on the device of the weight."""
        if self._rows is None:
            self.prepare()
        device = self.weight.device
        if device not in self._row_order:
            # Offloading hooks move parameters between devices under our feet; the order follows on demand.
            self._row_order[device] = next(iter(self._row_order.values())).to(device)
        return self._row_order[device]

    def _apply(self, fn, recurse=True):
        """Moves the packed tensors but never casts them: `model.to(torch.bfloat16)` must not touch scales or levels."""
        dtypes = {name: getattr(self, name).dtype for name in _FLOAT_TENSORS if getattr(self, name) is not None}
        for name in dtypes:
            self._parameters[name] = nn.Parameter(self._parameters[name].data.view(torch.uint8), requires_grad=False)
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        for name, dtype in dtypes.items():
            self._parameters[name] = nn.Parameter(self._parameters[name].data.view(dtype), requires_grad=False)
        self._row_order = {device: order for device, order in self._row_order.items() if device.type == "cpu"}
        if self._row_order and self.weight.device.type != "meta":
            self.row_order()  # now, so that a compiled forward finds it
        return self

    def _row_counts(self) -> str:
        four, two = self._rows
        return f"{four}/{two}/{self.out_features - four - two}"


class LowRALinear(PackedModule, nn.Linear):
    """y = x W^T + bias with a packed W [N, K].

    Forward and backward run on `bitsandbytes::lowra_linear`, which keeps no dense weight between them.
    """

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: torch.Tensor | None = None) -> "LowRALinear":
        module = cls(packed.in_features, packed.row_bits.numel(), packed.group_size, packed.tensors(), bias)
        module.prepare()
        return module

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802 - the name under which PEFT looks for a quantised weight
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = as_autocast(x)
        # Compiled code has no host to spare, and the compiler knows the op but not the function.
        product = linear if torch.compiler.is_compiling() else PackedLinear.apply
        return product(x, self.matrix(), self.bias_as(x.dtype))

    def bias_as(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias as the ops take it beside an x of this dtype."""
        return None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        rows = "" if self._rows is None else f", rows of 4/2/1 bits={self._row_counts()}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, packed{rows}"
