"""JD-Diagonal: several adapters as one pair of shared factors and a diagonal each (LoraQuant, Table 1).

For each layer, B_i A_i of adapter i is approximated by U diag(d_i) V with U [m, r] and V [r, n] shared. That is a CP
decomposition of the stack of products, found by alternating least squares on the factors; no product is formed.
"""

import torch
from tqdm import tqdm

from .codes import round_scale
from .formats import DiagonalCodes, LayerLayout
from .loraquant import layout
from .source import LoraAdapter
from .storage import PackedAdapter, SharedBasis, pack

SWEEPS = 50


def _solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Least-squares solution for a symmetric positive semi-definite Gram matrix that may be singular."""
    return torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ right


def joint_diagonal(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shared factors and diagonals of one layer.

    Args:
        b: [adapters, m, r]; a: [adapters, r, n].
        rank: components of the shared factors.

    Returns:
        (U^T [rank, m], V [rank, n], d [adapters, rank]) float32, rows of U^T and V of unit norm.
    """
    b, a = b.to(torch.float64), a.to(torch.float64)
    # Start at the leading singular directions of the sum of products, found in the span of all factors.
    stacked_b, stacked_a = torch.cat(list(b), dim=1), torch.cat(list(a), dim=0)
    q_b, r_b = torch.linalg.qr(stacked_b)
    q_a, r_a = torch.linalg.qr(stacked_a.mT)
    left, _, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    rank = min(rank, left.shape[1])
    # All later work stays in these spans, which hold every optimum: b [N, sum r, r], a [N, r, sum r] are small.
    b, a = q_b.mT @ b, a @ q_a
    u, v = left[:, :rank], right[:rank]
    diagonals = torch.zeros(len(b), rank, dtype=torch.float64)
    for _ in range(SWEEPS):
        products = torch.einsum("kc,nkr,nrl,cl->nc", u, b, a, v)
        diagonals = _solve((u.mT @ u) * (v @ v.mT), products.mT).mT
        weighted = torch.einsum("nkr,nrl,cl,nc->ck", b, a, v, diagonals)
        u = _solve((v @ v.mT) * (diagonals.mT @ diagonals), weighted).mT
        weighted = torch.einsum("nkr,nrl,kc,nc->cl", b, a, u, diagonals)
        v = _solve((u.mT @ u) * (diagonals.mT @ diagonals), weighted)
        norm_u, norm_v = u.norm(dim=0).clamp(min=1e-30), v.norm(dim=1).clamp(min=1e-30)
        u, v = u / norm_u, v / norm_v[:, None]
    products = torch.einsum("kc,nkr,nrl,cl->nc", u, b, a, v)
    diagonals = _solve((u.mT @ u) * (v @ v.mT), products.mT).mT
    return (q_b @ u).mT.float(), (v @ q_a.mT).float(), diagonals.float()


def check_alike(adapters: list[LoraAdapter]) -> None:
    """Raises ValueError unless there are several adapters with the same layers in the same shapes."""
    if len(adapters) < 2:
        raise ValueError(
            "jd-diagonal shares factors between adapters; expected two or more adapter folders, came "
            f"{len(adapters)}. Give more, or use another method."
        )
    first = {layer.name: (layer.b.shape, layer.a.shape) for layer in adapters[0].layers}
    for adapter in adapters[1:]:
        shapes = {layer.name: (layer.b.shape, layer.a.shape) for layer in adapter.layers}
        for name in sorted(first.keys() | shapes.keys()):
            if first.get(name) != shapes.get(name):
                raise ValueError(
                    f"Layer {name} has factors {first.get(name)} in {adapters[0].folder} and {shapes.get(name)} in "
                    f"{adapter.folder}; jd-diagonal expects adapters of one base with the same target modules and rank."
                )


def quantize_joint(adapters: list[LoraAdapter], progress: bool = False) -> list[PackedAdapter]:
    """JD-Diagonal over several adapters, one packed adapter each around one shared basis, all in float16."""
    check_alike(adapters)
    coded: list[list[tuple[LayerLayout, DiagonalCodes]]] = [[] for _ in adapters]
    shared: dict[str, list[torch.Tensor]] = {"shared_b": [], "shared_a": []}
    for layers in tqdm(list(zip(*(x.layers for x in adapters), strict=True)), desc="jd-diagonal", disable=not progress):
        b, a = torch.stack([layer.b for layer in layers]), torch.stack([layer.a for layer in layers])
        columns, rows, diagonals = joint_diagonal(b, a, a.shape[1])
        columns, rows = columns.to(torch.float16), rows.to(torch.float16)
        for codes, layer, diagonal in zip(coded, layers, diagonals, strict=True):
            values = DiagonalCodes(diagonal.sign().to(torch.float16) * round_scale(diagonal.abs()), columns, rows)
            codes.append((layout(layer, len(rows), 0), values))
        for name, tensor in coded[0][-1][1].pack_shared().items():
            shared[name].append(tensor)
    basis = SharedBasis({name: torch.cat(parts) for name, parts in shared.items()}, len(adapters))
    result = []
    for adapter, codes in zip(adapters, coded, strict=True):
        packed = pack(adapter, f"jd-diagonal of {len(adapters)}", "diagonal", 16, codes)
        packed.shared = basis
        result.append(packed)
    return result
