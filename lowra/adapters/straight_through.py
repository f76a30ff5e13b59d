"""Straight-through refinement of components before they are quantised (LoraQuant, Section 3.3).

Each component (b, a) is moved to the (b~, a~) whose quantised outer product is nearest to b a^T (Equation 9).
Components do not interact, so all components of one shape form one batch, and the squared Frobenius distance of two
outer products needs inner products only:

    |b a^T - p q^T|^2 = |b|^2 |a|^2 - 2 (b.p)(a.q) + |p|^2 |q|^2     with p = D(Q(b~)), q = D(Q(a~)).

The gradients at p and q follow from the same inner products, and the quantiser hands them to b~ and a~ by its
straight-through rule; no autograd graph is kept. Plain gradient descent, each side divided by the squared norm of the
other, makes one step size fit components of any magnitude. Adam was tried and ends at 1.4 times the error: its steps of
equal size move every number of a group, and with them the range that the grid is cut from.

For sign codes the start is already the global minimum: whatever q is, the best p has the signs of b and group means of
|b| up to a factor, and the matrix of products of group means has rank one. Their refinement stops after PATIENCE steps.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from ..device import one_thread

STEPS = 100  # "converges within one hundred gradient steps"
PATIENCE = 10  # steps without a better component in the whole batch after which the batch is done
STEP_SIZE = 0.015  # first step; falls to zero linearly. 2 bits: error 0.25 of |b a^T|^2, against 0.57 at the start
# Numbers in a batch of components. On a processor its state should stay in the cache of one core; a GPU wants few
# launches, and 2^25 numbers with their state take about a gigabyte.
BATCH_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 25}


class Quantizer(Protocol):
    """What refinement needs of a quantiser of rows, float32 [components, length]; rows do not influence one another."""

    def simulate(self, rows: torch.Tensor) -> torch.Tensor:
        """Quantises and dequantises, [components, length]."""

    def straight_through(self, rows: torch.Tensor, simulated: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient at `rows` from the gradient at `simulated`, all [components, length]."""


def outer_error(b: torch.Tensor, a: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """|b a^T - p q^T|_F^2 per component, for b, p [components, m] and a, q [components, n]; float64 [components]."""
    inner = _dot(b, p).double() * _dot(a, q).double()
    return _dot(b, b).double() * _dot(a, a).double() - 2 * inner + _dot(p, p).double() * _dot(q, q).double()


def refine(
    b: torch.Tensor,
    a: torch.Tensor,
    quantizer: Quantizer,
    on_batch: Callable[[int], None] = lambda components: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refines all components of one shape.

    Args:
        b: columns of B' as rows, float32 [components, m].
        a: rows of A', float32 [components, n].
        quantizer: the quantiser that the refined components will go through.
        on_batch: told the number of components finished, for a progress bar.

    Returns:
        (b~, a~), of the shapes of b and a. The quantised outer product of each returned component is at least as near
        to b a^T as that of the component it started from, since the best step is kept and the start counts as a step.
    """
    size = max(1, BATCH_NUMBERS[b.device.type] // max(1, b.shape[1] + a.shape[1]))
    best_b, best_a = torch.empty_like(b), torch.empty_like(a)
    with one_thread():
        for first in range(0, len(b), size):
            batch = slice(first, first + size)
            best_b[batch], best_a[batch] = _refine_batch(b[batch], a[batch], quantizer)
            on_batch(len(b[batch]))
    return best_b, best_a


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(x, y)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """numerator / denominator as a column, 0 where a component is all zero."""
    return torch.where(denominator > 0, numerator / denominator, 0.0).unsqueeze(-1)


def _refine_batch(b: torch.Tensor, a: torch.Tensor, quantizer: Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
    moving_b, moving_a = b.clone(), a.clone()
    best_b, best_a = b.clone(), a.clone()
    best_error = torch.full((len(b),), torch.inf, dtype=torch.float64, device=b.device)
    stale = 0
    for step in range(STEPS):
        p, q = quantizer.simulate(moving_b), quantizer.simulate(moving_a)
        error = outer_error(b, a, p, q)
        better = error < best_error
        if better.any():
            stale = 0
            best_error = torch.where(better, error, best_error)
            best_b[better], best_a[better] = moving_b[better], moving_a[better]
        else:
            stale += 1
            if stale == PATIENCE:
                break
        size = STEP_SIZE * (1 - step / STEPS)
        # The error is |q|^2 |p - b (a.q)/|q|^2|^2 plus what p cannot change; its gradient at p over 2 |q|^2 is below.
        gradient_p = torch.addcmul(p, b, _ratio(_dot(a, q), _dot(q, q)), value=-1)
        gradient_q = torch.addcmul(q, a, _ratio(_dot(b, p), _dot(p, p)), value=-1)
        moving_b.sub_(quantizer.straight_through(moving_b, p, gradient_p), alpha=size)
        moving_a.sub_(quantizer.straight_through(moving_a, q, gradient_q), alpha=size)
    return best_b, best_a
