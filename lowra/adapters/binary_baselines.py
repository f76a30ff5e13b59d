"""PB-LLM and BiLLM on adapter factors (LoraQuant, Table 1): partly binarised baselines, data-free, groups of 128.

Both were made for full weight matrices, rank numbers by a Hessian and compensate errors as GPTQ does. Here they see the
factors alone, in the layout of all other methods (groups along columns of B and rows of A), as the paper's equal group
size and average bits imply; salience is magnitude.
"""

import torch

from .codes import RoundToNearest, from_groups, group_sizes, into_groups, round_scale
from .formats import PBLLM_BITS, BillmCodes, BillmRows, PbllmCodes, PbllmRows, salient_count
from .loraquant import layout
from .source import LoraAdapter
from .storage import PackedAdapter, pack

_RESIDUAL_SHARE = 4  # one component in this many is binarised twice
# Break points that BiLLM tries between the two magnitude groups, as shares of a group's largest |w|.
_BREAKS = torch.linspace(0.1, 0.9, 17)


def pbllm_rows(rows: torch.Tensor) -> PbllmRows:
    """PB-LLM codes of float32 rows [c, length]: the largest tenth of each row at 8 bits, signs for the others."""
    length = rows.shape[1]
    salient = torch.zeros(rows.shape, dtype=torch.bool)
    salient.scatter_(1, rows.abs().topk(salient_count(length), dim=1).indices, True)
    kept = rows[salient].view(len(rows), -1)
    near = RoundToNearest(PBLLM_BITS)
    # One scale for all salient numbers of a row: they are a single group, however long.
    grid_scale, grid_zero = near.grid(kept) if kept.numel() else (torch.zeros(len(rows), 1), torch.zeros(len(rows), 1))
    codes = near.codes_on(kept, grid_scale, grid_zero).to(torch.uint8)
    others = into_groups(rows.abs() * ~salient).sum(-1)
    counts = into_groups((~salient).to(torch.float32)).sum(-1)
    return PbllmRows(
        salient,
        codes,
        grid_scale.squeeze(1).to(torch.float16),
        grid_zero.squeeze(1).to(torch.uint8),
        (rows >= 0)[~salient].view(len(rows), -1),
        round_scale(others / counts.clamp(min=1)),
    )


def quantize_pbllm(adapter: LoraAdapter) -> PackedAdapter:
    """PB-LLM on the factors as trained: 1 + 0.1 x 8 + 0.9 + 16/128 = 2.83 bits, and a scale and zero point a row."""
    coded = []
    for layer in adapter.layers:
        codes = PbllmCodes(pbllm_rows(layer.b.mT), pbllm_rows(layer.a))
        coded.append((layout(layer, len(layer.a), 0), codes))
    return pack(adapter, "pbllm", "pbllm", PBLLM_BITS, coded)


def _binarize_twice(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual binarisation: signs of the rows, signs of what is left, and both scales [c, groups, 2]."""
    sizes = group_sizes(rows.shape[1], rows.device)
    first = rows >= 0
    scale0 = round_scale(into_groups(rows.abs()).sum(-1) / sizes)
    left = rows - from_groups(into_groups(first.float() * 2 - 1) * scale0.float().unsqueeze(-1), rows.shape[1])
    scale1 = round_scale(into_groups(left.abs()).sum(-1) / sizes)
    return first, left >= 0, torch.stack([scale0, scale1], dim=-1)


def _binarize_bell(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bell-shaped split: signs, tail membership, scales [c, groups, 2], at the break point of least error a group."""
    length = rows.shape[1]
    magnitude = into_groups(rows.abs())
    real = into_groups(torch.ones_like(rows)).bool()
    peak = magnitude.amax(-1, keepdim=True)
    best_error = torch.full(magnitude.shape[:-1], torch.inf)
    best_tail = torch.zeros_like(real)
    best_scales = torch.zeros(*magnitude.shape[:-1], 2)
    for share in _BREAKS:
        tail = (magnitude > share * peak) & real
        scales = []
        for members in (real & ~tail, tail):
            scales.append((magnitude * members).sum(-1) / members.sum(-1).clamp(min=1))
        centre, far = (scale.unsqueeze(-1) for scale in scales)
        error = ((magnitude - torch.where(tail, far, centre)).square() * real).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_tail[better] = tail[better]
        best_scales[better] = torch.stack(scales, dim=-1)[better]
    return rows >= 0, from_groups(best_tail, length), round_scale(best_scales)


def billm_rows(rows: torch.Tensor) -> BillmRows:
    """BiLLM codes of float32 rows [c, length].

    The quarter of the components with the largest norm is binarised twice, the others are split by magnitude. BiLLM's
    search for the number of columns to binarise twice would take as many as its bound allows, since against plain
    binarisation a second bit always helps.
    """
    twice, bell = _binarize_twice(rows), _binarize_bell(rows)
    order = rows.norm(dim=1).argsort(descending=True)
    residual = torch.zeros(len(rows), dtype=torch.bool)
    residual[order[: len(rows) // _RESIDUAL_SHARE]] = True
    pick = residual[:, None]
    return BillmRows(
        residual,
        torch.where(pick, twice[0], bell[0]),
        torch.where(pick, twice[1], bell[1]),
        torch.where(pick[:, None], twice[2], bell[2]),
    )


def quantize_billm(adapter: LoraAdapter) -> PackedAdapter:
    """BiLLM on the factors as trained: 2 + 2 x 16/128 = 2.25 bits, and one bit a component."""
    coded = []
    for layer in adapter.layers:
        codes = BillmCodes(billm_rows(layer.b.mT), billm_rows(layer.a))
        coded.append((layout(layer, len(layer.a), 0), codes))
    return pack(adapter, "billm", "billm", 1, coded)
