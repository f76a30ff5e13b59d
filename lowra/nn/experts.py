"""Packed weights of a mixture of experts: one matrix for all experts of a projection, used one expert at a time."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import PackedLinear, linear
from bitsandbytes.backends.lowra.reference import decode_scales

from .linear import as_autocast
from .packed_module import PackedModule
from .row_layout import RowLayout


class LowRAExperts(PackedModule):
    """Stands where an experts module holds its fused weight [E, N, K]; `experts[e]` is the weight [N, K] of one expert.

    The rows of all experts are packed as one matrix [E * N, K]. Because packed rows are sorted by precision and stable
    within one, the rows of an expert are one run in each class, so an expert is cut out without unpacking the others.
    What comes out is no tensor but an `ExpertWeight`, which the model's own forward hands to `F.linear`.
    """

    _layout: Any  # an _ExpertsLayout, once it is made

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        group_size: int,
        packed: dict[str, torch.Tensor],
        compute_dtype: torch.dtype,
    ):
        """
        Args:
            experts: E.
            in_features: K.
            out_features: E * N, the rows of the packed matrix.
            group_size: weights that share a scale.
            packed: tensors of packed format 1.
            compute_dtype: of the dense weight.
        """
        super().__init__(in_features, out_features, group_size, packed, None, compute_dtype)
        self.experts = experts
        self._orders: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layout_of(self, row_bits: torch.Tensor) -> "_ExpertsLayout":
        return _ExpertsLayout(row_bits, self.experts)

    def __getitem__(self, expert: int | torch.Tensor) -> "ExpertWeight":
        return self(expert)  # by way of the module's hooks, which bring what is offloaded

    def forward(self, expert: int | torch.Tensor) -> "ExpertWeight":
        packed = self.matrix()
        expert = range(self.experts)[operator.index(expert)]
        runs = self._layout.runs[expert]
        parts = list(zip(packed.segments(), runs, strict=True))
        places = torch.cat([torch.arange(start, stop, device=packed.codes.device) for start, stop in runs])
        with torch.autocast(packed.codes.device.type, enabled=False):  # that of CPUs refuses to join float16
            codes = torch.cat([packed.codes[segment.codes_of(*run)] for segment, run in parts])
            levels = torch.cat([packed.levels[segment.levels_of(*run)] for segment, run in parts])
        order = self._order_of(expert, packed.row_order, places)
        scales = decode_scales(packed.scales, packed.scale_steps, places)
        rows_4bit, rows_2bit, _ = (stop - start for start, stop in runs)
        sizes = rows_4bit, rows_2bit, self.in_features, self.group_size
        return ExpertWeight(PackedMatrix(codes, order, scales, None, levels, *sizes))

    def _order_of(self, expert: int, row_order: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Row order of one expert's rows, kept for as long as that of all is the same tensor: on a GPU the ops wait for
        it once for each tensor that they have not seen.
        """
        kept = self._orders.get(expert)
        if kept is not None and kept[0] is row_order:
            return kept[1]
        with torch.inference_mode(False):  # what a first forward made there serves training as well
            own = row_order[places] - expert * (self.out_features // self.experts)
        self._orders[expert] = row_order, own
        return own

    def extra_repr(self) -> str:
        rows = "" if self._layout is None else f", rows of 4/2/1 bits={self._row_counts(self._layout)}"
        return f"{self.experts} x [{self.out_features // self.experts}, {self.in_features}], packed{rows}"


class _ExpertsLayout(RowLayout):
    """Attributes:
    runs: for each expert the places of its rows among the packed rows, one run [start, stop) per precision.
    """

    def __init__(self, bits: torch.Tensor, experts: int):
        super().__init__(bits)
        starts = dict.fromkeys(layout.PRECISIONS, 0)
        starts[2], starts[1] = self.counts[0], sum(self.counts)
        self.runs: list[list[tuple[int, int]]] = []
        of_experts = bits.view(experts, -1)
        for counts in zip(*((of_experts == b).sum(dim=1).tolist() for b in layout.PRECISIONS), strict=True):
            runs = []
            for precision, count in zip(layout.PRECISIONS, counts, strict=True):
                runs.append((starts[precision], starts[precision] + count))
                starts[precision] += count
            self.runs.append(runs)


@dataclasses.dataclass(frozen=True)
class ExpertWeight:
    """The packed weight [N, K] of one expert; `F.linear(x, weight)` is all that can be done with it.

    Attributes:
        packed: this expert's rows alone, scales in float32.
    """

    packed: PackedMatrix

    @classmethod
    def __torch_function__(
        cls, function: Callable, kinds: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        if function is not torch.nn.functional.linear:
            raise TypeError(
                "A packed expert can only be used in F.linear(x, expert), not in "
                f"{getattr(function, '__name__', function)}: set config._experts_implementation = 'eager', or keep the "
                "experts dense (modules_to_not_convert)."
            )
        return _linear(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: ExpertWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    x = as_autocast(input)
    bias = None if bias is None else bias.to(x.dtype)
    if x.dtype == torch.float64:  # which the kernels do not know
        dense = torch.ops.bitsandbytes.lowra_dequantize(*weight.packed, torch.float32).double()
        return torch.nn.functional.linear(x, dense, bias)
    product = linear if torch.compiler.is_compiling() else PackedLinear.apply
    return product(x, weight.packed, bias)
