"""Split a LoRA into components and choose the important ones (LoraQuant, Section 3.1).

A LoRA B [m, r], A [r, n] is a sum of r components b_i a_i^T. The thin SVD of the product, found from QR factors of B
and of A^T so that B A itself is never formed, gives another set of components with the same sum whose weight is
gathered in the first few. Factors of equal shape are stacked and treated in one call.
"""

import torch


def svd_components(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reparametrises stacked LoRA factors by the SVD of their products (Equations 1 and 2).

    Args:
        b: [layers, m, r].
        a: [layers, r, n].

    Returns:
        columns of B' = U S^1/2 as rows [layers, c, m], rows of A' = S^1/2 V^T [layers, c, n], both float32, and the
        singular values [layers, c] float64 in descending order. c is min(r, m, n).
    """
    # float64: the factors are thin, so it costs little, and the product is then kept to float32 rounding.
    q_b, r_b = torch.linalg.qr(b.to(torch.float64))
    q_a, r_a = torch.linalg.qr(a.to(torch.float64).mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s.sqrt().unsqueeze(-1)
    columns = root * (q_b @ u).mT
    rows = root * (vt @ q_a.mT)
    return columns.to(torch.float32), rows.to(torch.float32), s


def explained_count(singular_values: torch.Tensor, ratio: float) -> int:
    """The smallest h whose first h components hold at least `ratio` of the squared singular values (Equation 5).

    Args:
        singular_values: [c], descending.
        ratio: rho, in (0, 1].

    A product of zero needs no component: h = 0.
    """
    explained = singular_values.to(torch.float64).square().cumsum(0)
    if explained[-1] == 0:
        return 0
    return int(torch.searchsorted(explained, ratio * explained[-1])) + 1


def importance_order(columns: torch.Tensor, rows: torch.Tensor, split: str, generator: torch.Generator) -> torch.Tensor:
    """Order of the components of one layer, most important first, for the splits of Figure 2.

    Args:
        columns: columns of B as rows [c, m].
        rows: rows of A [c, n].
        split: "norm" ranks by the Frobenius norm of b_i a_i^T, "random" draws a permutation from `generator`.
    """
    if split == "random":
        return torch.randperm(len(rows), generator=generator)
    norms = columns.norm(dim=1) * rows.norm(dim=1)
    return torch.argsort(norms, descending=True, stable=True)
