"""The precision assignment as arrays: what it is given, what it returns, and the bound solvers are held against."""

import dataclasses

import numpy as np

PRECISIONS = np.array([4, 2, 1], dtype=np.uint8)  # columns of errors and costs


@dataclasses.dataclass
class Problem:
    """Choose one precision per channel so that the summed error is least and the bits stay within the budget.

    Attributes:
        errors: float64 [C, 3], sensitivity x squared error of each channel at 4, 2 and 1 bits.
        costs: int64 [C, 3], bits of each channel at 4, 2 and 1 bits.
        sizes: int64 [C], parameters of each channel.
        budget: bits that may be used in all.
        menu: precisions that may be given.
    """

    errors: np.ndarray
    costs: np.ndarray
    sizes: np.ndarray
    budget: int
    menu: tuple[int, ...]

    def __post_init__(self) -> None:
        if not np.isfinite(self.errors).all() or (self.errors < 0).any():
            raise ValueError("The channels' errors must be finite and not negative.")
        columns = self.columns
        least, most = (int(self.costs[:, columns].min(axis=1).sum()), int(self.costs[:, columns].max(axis=1).sum()))
        parameters = int(self.sizes.sum())
        if self.budget < least:
            raise ValueError(
                f"A budget of {self.budget:,} bits for {parameters:,} weights is below the smallest precision: all "
                f"channels at {min(self.menu)} bit(s) take {least:,} bits."
            )
        self.budget = min(self.budget, most)

    @property
    def columns(self) -> list[int]:
        """Columns of the precisions on the menu, fewest bits first."""
        return [int(np.flatnonzero(PRECISIONS == bits)[0]) for bits in sorted(self.menu)]


@dataclasses.dataclass
class Assignment:
    """A feasible choice and how good it is.

    Attributes:
        row_bits: uint8 [C], precision of each channel.
        error: summed error of the choice.
        bound: optimum of the linear relaxation; no choice within the budget can be below it.
        bits_used, budget: bits, bits_used <= budget.
        seconds: time taken.
        solver: what solved it.
    """

    row_bits: np.ndarray
    error: float
    bound: float
    bits_used: int
    budget: int
    seconds: float
    solver: str

    @property
    def gap(self) -> float:
        """Error above the bound, relative to the bound; never negative (both are sums with rounding of their own)."""
        return max(0.0, (self.error - self.bound) / self.bound) if self.bound > 0 else 0.0


def measure(problem: Problem, choice: np.ndarray) -> tuple[float, int]:
    """Error and bits of a choice given as column numbers [C]."""
    rows = np.arange(len(choice))
    return float(problem.errors[rows, choice].sum()), int(problem.costs[rows, choice].sum())
