"""Truncated singular value decomposition: the best low-rank part of a matrix."""

import contextlib

import torch

from ..device import one_thread

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_LARGE = 2**21  # elements of a matrix, whose products are worth several threads


def truncated_svd(matrix: torch.Tensor, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Best rank-r factors [N, r] and [r, K] with the square root of the singular values on both sides.

    Randomised range finding with power iterations (Halko, Martinsson and Tropp 2011); the residual is within 1 % of the
    full decomposition's. Made of products with the matrix and eigenvectors of small Gram matrices alone, because the QR
    of a tall matrix costs more than everything else together, on a CPU as on a GPU. The same seed gives the same
    factors on every device.
    """
    with one_thread() if matrix.is_cpu and matrix.numel() < _LARGE else contextlib.nullcontext():
        return _truncated_svd(matrix, rank, seed)


def _truncated_svd(matrix: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    for _ in range(_POWER_ITERATIONS):
        basis = _orthonormal(matrix.T @ _orthonormal(matrix @ basis))
    basis = _orthonormal(_orthonormal(matrix @ basis))  # twice: the first leaves errors of the squared condition number
    small = basis.T @ matrix  # [width, K]
    values, vectors = _eigenvectors(small @ small.T)
    values, vectors = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank].to(matrix)
    root = values.to(matrix).pow(0.25)  # of the singular values, whose squares these are
    left = (basis @ vectors) * root
    right = (vectors.T @ small) / root.clamp(min=torch.finfo(matrix.dtype).tiny)[:, None]
    return left, right


def _orthonormal(tall: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns; directions lost in rounding come out as zero."""
    values, vectors = _eigenvectors(tall.T @ tall)
    kept = values > values[-1] * 1e-12
    scale = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), torch.zeros_like(values))
    return tall @ (vectors * scale).to(tall)


def _eigenvectors(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending eigenvalues and vectors in double precision, on the device of `gram` but computed on the CPU.

    A Gram matrix here is at most some hundred wide, where a GPU's solver takes several times as long as the CPU's.
    """
    with one_thread():
        values, vectors = torch.linalg.eigh(gram.double().cpu())
    return values.to(gram.device), vectors.to(gram.device)
