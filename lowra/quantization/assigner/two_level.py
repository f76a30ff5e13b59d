"""The paper's two-level integer program: K-means clusters, then a program per level (LowRA, section 6, algorithm 1).

Channels are split by size and the budget in proportion to their parameters; K-means on the three errors makes up to 128
clusters of each size; a cluster-level program decides how many channels of each cluster get each precision, and a
program per cluster hands them out. Bounds are 0 <= y <= S_c: the strict form printed in the paper leaves no choice in
clusters of one or two channels.
"""

import time
from collections.abc import Callable

import numpy as np
import pulp
from sklearn.cluster import KMeans

from .exact import solve_relaxation
from .problem import PRECISIONS, Assignment, Problem, measure

CLUSTERS = 128
_SOLVERS = ("HiGHS", "PULP_CBC_CMD", "COIN_CMD")


def assign_two_level(problem: Problem, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Assignment:
    """The assignment of the paper's algorithm 1.

    Args:
        problem: channels, costs and budget.
        seed: of the K-means start.
        progress: called with (done, total) clusters.

    Raises:
        RuntimeError: no integer-programming solver is installed, or it found no solution.
    """
    start = time.perf_counter()
    solver = _solver()
    choice = np.zeros(len(problem.sizes), dtype=np.int64)
    parameters = int(problem.sizes.sum())
    sizes = np.unique(problem.sizes)
    done = 0
    for size in sizes:
        members = np.flatnonzero(problem.sizes == size)
        # floor, so that the shares never add up to more than the budget
        budget = problem.budget * int(size) * len(members) // parameters
        labels = _clusters(problem.errors[members], seed)
        counts = _cluster_program(problem, members, labels, budget, solver)
        for cluster, numbers in enumerate(counts):
            inside = members[labels == cluster]
            choice[inside] = _channel_program(problem.errors[inside], problem.columns, numbers, solver)
            done += 1
            if progress:
                progress(done, len(sizes) * len(counts))
    error, bits = measure(problem, choice)
    _, bound = solve_relaxation(problem)
    seconds = time.perf_counter() - start
    return Assignment(
        PRECISIONS[choice], error, bound, bits, problem.budget, seconds, f"two-level program, {solver.name}"
    )


def _solver() -> pulp.LpSolver:
    for name in _SOLVERS:
        solver = pulp.getSolver(name, msg=False)
        if solver.available():
            return solver
    raise RuntimeError(f"No integer-programming solver is installed: `pip install highspy`, or one of {_SOLVERS}.")


def _clusters(errors: np.ndarray, seed: int) -> np.ndarray:
    count = min(CLUSTERS, len(np.unique(errors, axis=0)))
    # The three errors differ by orders of magnitude; K-means sees them in units of their mean.
    scaled = errors / np.maximum(errors.mean(axis=0), np.finfo(float).tiny)
    return KMeans(n_clusters=count, n_init=1, random_state=seed).fit_predict(scaled)


def _cluster_program(
    problem: Problem, members: np.ndarray, labels: np.ndarray, budget: int, solver: pulp.LpSolver
) -> list[dict[int, int]]:
    """How many channels of each cluster get each column."""
    columns = problem.columns
    clusters = [members[labels == cluster] for cluster in range(labels.max() + 1)]
    program = pulp.LpProblem("clusters", pulp.LpMinimize)
    y = {
        (c, p): program.add_variable(f"y_{c}_{p}", lowBound=0, upBound=len(inside), cat="Integer")
        for c, inside in enumerate(clusters)
        for p in columns
    }
    mean = {(c, p): float(problem.errors[inside, p].mean()) for c, inside in enumerate(clusters) for p in columns}
    scale = max(mean.values()) or 1.0
    program += pulp.lpSum(mean[key] / scale * y[key] for key in y)
    for c, inside in enumerate(clusters):
        program += pulp.lpSum(y[c, p] for p in columns) == len(inside)
    cost = problem.costs[members[0]]  # channels of one size cost the same
    program += pulp.lpSum(int(cost[p]) * y[c, p] for c, p in y) <= budget
    _solve(program, solver, f"the cluster program of the {int(problem.sizes[members[0]])}-parameter channels")
    return [{p: round(y[c, p].value()) for p in columns} for c in range(len(clusters))]


def _channel_program(
    errors: np.ndarray, columns: list[int], numbers: dict[int, int], solver: pulp.LpSolver
) -> np.ndarray:
    """Column of each channel of one cluster, `numbers[p]` of them at column p, with the least error."""
    given = [p for p in columns if numbers[p] > 0]
    if len(given) == 1:
        return np.full(len(errors), given[0])
    program = pulp.LpProblem("channels", pulp.LpMinimize)
    scale = float(errors.max()) or 1.0
    x = {(i, p): program.add_variable(f"x_{i}_{p}", cat="Binary") for i in range(len(errors)) for p in given}
    program += pulp.lpSum(float(errors[i, p]) / scale * x[i, p] for i, p in x)
    for i in range(len(errors)):
        program += pulp.lpSum(x[i, p] for p in given) == 1
    for p in given:
        program += pulp.lpSum(x[i, p] for i in range(len(errors))) == numbers[p]
    _solve(program, solver, "a channel program")
    return np.array([next(p for p in given if x[i, p].value() > 0.5) for i in range(len(errors))])


def _solve(program: pulp.LpProblem, solver: pulp.LpSolver, what: str) -> None:
    program.solve(solver)
    if pulp.LpStatus[program.status] != "Optimal":
        raise RuntimeError(f"{solver.name} answered {pulp.LpStatus[program.status]!r} for {what}.")
