"""Packed weights of a mixture of experts: one matrix for all experts of a projection, used one expert at a time."""

from typing import NamedTuple

import torch

from bitsandbytes.backends.lowra import layout

from .linear import PackedModule, as_autocast


class LowRAExperts(PackedModule):
    """Stands where an experts module holds its fused weight [E, N, K]; `experts[e]` is the weight [N, K] of one expert.

    The rows of all experts are packed as one matrix [E * N, K]. Because packed rows are sorted by precision and stable
    within one, the rows of an expert are one run in each class, so an expert is cut out without unpacking the others.
    What comes out is no tensor but an `ExpertWeight`, which the model's own forward hands to `F.linear`.
    """

    def __init__(self, experts: int, in_features: int, out_features: int, group_size: int, packed, compute_dtype):
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
        self._runs: list[list[tuple[int, int]]] = []

    def count_rows(self, row_bits: torch.Tensor) -> None:
        super().count_rows(row_bits)
        # places of each expert's rows among the packed rows: one run per precision
        bits = row_bits.view(self.experts, -1)
        starts = dict.fromkeys(layout.PRECISIONS, 0)
        starts[2], starts[1] = self._rows[0], sum(self._rows)
        self._runs = []
        for counts in zip(*((bits == b).sum(dim=1).tolist() for b in layout.PRECISIONS), strict=True):
            runs = []
            for precision, count in zip(layout.PRECISIONS, counts, strict=True):
                runs.append((starts[precision], starts[precision] + count))
                starts[precision] += count
            self._runs.append(runs)

    def __getitem__(self, expert: int | torch.Tensor) -> "ExpertWeight":
        (order,) = self._layout()
        scales, steps, levels = self._decoding()
        rows = self.out_features // self.experts
        runs = self._runs[int(expert)]
        code_runs, level_runs = [], []
        code_start = level_start = 0
        for (bits, first, end), (start, stop) in zip(
            layout.segments(self.out_features, *self._rows), runs, strict=True
        ):
            stride, entries = layout.row_bytes(self.in_features, bits), 2**bits
            code_runs.append(self.weight[code_start + (start - first) * stride : code_start + (stop - first) * stride])
            level_runs.append(levels[level_start + (start - first) * entries : level_start + (stop - first) * entries])
            code_start += (end - first) * stride
            level_start += (end - first) * entries
        return ExpertWeight(
            torch.cat(code_runs),
            torch.cat([order[start:stop] for start, stop in runs]) - int(expert) * rows,
            torch.cat([_decode_rows(scales, steps, start, stop) for start, stop in runs]),
            torch.cat(level_runs),
            (runs[0][1] - runs[0][0], runs[1][1] - runs[1][0]),
            self.group_size,
        )

    def extra_repr(self) -> str:
        rows = "" if self._rows is None else f", rows of 4/2/1 bits={self._row_counts()}"
        return f"{self.experts} x [{self.out_features // self.experts}, {self.in_features}], packed{rows}"


class ExpertWeight(NamedTuple):
    """The packed weight [N, K] of one expert; `F.linear(x, weight)` is all that can be done with it.

    Attributes:
        codes, row_order, scales, levels: as the ops take them, of this expert's rows; scales in float32.
        rows: rows of 4 and of 2 bits.
        group_size: weights that share a scale.
    """

    codes: torch.Tensor
    row_order: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor
    rows: tuple[int, int]
    group_size: int

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
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
    return torch.ops.bitsandbytes.lowra_linear(
        x, weight.codes, weight.row_order, weight.scales, None, weight.levels, bias, *weight.rows, weight.group_size
    )


def _decode_rows(scales: torch.Tensor, steps: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    """float32 scales [stop - start, groups] of some packed rows."""
    rows = scales[start:stop].float()
    if steps is None:
        return rows
    groups = scales.shape[1]
    place = torch.arange(start * groups, stop * groups, device=scales.device) // layout.SCALE_BLOCK
    root = rows.reshape(-1)
    return (root * root * steps[place]).view(rows.shape)
