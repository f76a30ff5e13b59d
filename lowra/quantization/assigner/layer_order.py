"""Assignment by layer order, as LoftQ and QLoRA below 4 bits do it: the first layers get more bits, the rest fewer."""

import time

import numpy as np

from .exact import solve_relaxation
from .problem import PRECISIONS, Assignment, Problem, measure


def assign_layer_order(problem: Problem) -> Assignment:
    """The two precisions of the menu around the budget; channels in model order get the higher one until it is spent.

    Raises:
        ValueError: the budget lies above the highest precision of the menu.
    """
    start = time.perf_counter()
    columns = problem.columns
    costs = problem.costs[:, columns].sum(axis=0)
    low = max(i for i in range(len(columns)) if costs[i] <= problem.budget)
    high = min(low + 1, len(columns) - 1)
    extra = problem.costs[:, columns[high]] - problem.costs[:, columns[low]]
    upgraded = np.cumsum(extra) <= problem.budget - int(costs[low])
    choice = np.where(upgraded, columns[high], columns[low])
    error, bits = measure(problem, choice)
    _, bound = solve_relaxation(problem)
    seconds = time.perf_counter() - start
    return Assignment(PRECISIONS[choice], error, bound, bits, problem.budget, seconds, "layer order")
