"""Exact assigner: the multiple-choice knapsack through its linear relaxation, with a certificate.

Each channel's (bits, error) points have a lower convex hull of at most two steps. All steps of all channels, sorted by
error saved per bit, are taken while the budget lasts: that prefix with a part of the next step is the optimum of the
linear relaxation (Sinha and Zoltners 1979). Dropping the fraction leaves a feasible choice whose error exceeds the
relaxed optimum by less than that one step, so by less than one channel's error; the rest of the budget is then spent
on later steps that still fit. One sort over all channels, whatever their sizes.
"""

import time

import numpy as np

from .problem import PRECISIONS, Assignment, Problem, measure


def assign_exact(problem: Problem) -> Assignment:
    """The assignment with error <= relaxed optimum + one channel, in time of one sort."""
    start = time.perf_counter()
    choice, bound = solve_relaxation(problem)
    error, bits = measure(problem, choice)
    seconds = time.perf_counter() - start
    return Assignment(PRECISIONS[choice], error, min(bound, error), bits, problem.budget, seconds, "exact knapsack")


def solve_relaxation(problem: Problem) -> tuple[np.ndarray, float]:
    """A feasible choice as column numbers [C], and the optimum of the linear relaxation."""
    columns = problem.columns
    channels = len(problem.sizes)
    base = np.full(channels, columns[0])
    channel, target, saving, cost = _hull_steps(problem.errors, problem.costs, columns)
    # Stable, so that of two equal slopes of one channel the step listed first is taken first.
    with np.errstate(divide="ignore", invalid="ignore"):
        order = np.argsort(-(saving / cost), kind="stable")
    channel, target, saving, cost = channel[order], target[order], saving[order], cost[order]

    base_error = float(problem.errors[:, columns[0]].sum())
    free = problem.budget - int(problem.costs[:, columns[0]].sum())
    spent = np.cumsum(cost)
    taken = int(np.searchsorted(spent, free, side="right"))
    bound = base_error - float(saving[:taken].sum())
    choice = base
    choice[channel[:taken]] = target[:taken]  # a later step of the same channel overwrites the earlier one
    if taken == len(cost):
        return choice, bound
    free -= int(spent[taken - 1]) if taken else 0
    bound -= float(saving[taken]) * free / float(cost[taken])
    _fill(choice, problem, columns, free)
    return choice, bound


def _hull_steps(
    errors: np.ndarray, costs: np.ndarray, columns: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps along every channel's lower convex hull: channel, column reached, error saved, bits paid; steeper first."""
    channels = np.arange(len(errors))
    steps = []
    if len(columns) == 3:
        low, middle, high = columns
        to_middle, to_high = errors[:, low] - errors[:, middle], errors[:, low] - errors[:, high]
        middle_cost, high_cost = costs[:, middle] - costs[:, low], costs[:, high] - costs[:, low]
        # The middle precision is on the hull where its slope is at least that of the straight way to the top.
        on_hull = to_middle * high_cost >= to_high * middle_cost
        steps.append((channels[on_hull], middle, to_middle[on_hull], middle_cost[on_hull]))
        last_saving = np.where(on_hull, to_high - to_middle, to_high)
        last_cost = np.where(on_hull, high_cost - middle_cost, high_cost)
        steps.append((channels, high, last_saving, last_cost))
    elif len(columns) == 2:
        low, high = columns
        steps.append((channels, high, errors[:, low] - errors[:, high], costs[:, high] - costs[:, low]))
    if not steps:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, np.zeros(0), empty
    channel = np.concatenate([step[0] for step in steps])
    target = np.concatenate([np.full(len(step[0]), step[1]) for step in steps])
    saving = np.concatenate([step[2] for step in steps])
    cost = np.concatenate([step[3] for step in steps])
    useful = saving > 0
    return channel[useful], target[useful], saving[useful], cost[useful]


def _fill(choice: np.ndarray, problem: Problem, columns: list[int], free: int) -> None:
    """Spends what is left, less than one step's cost, on the single upgrades that save most and still fit."""
    rows = np.arange(len(choice))
    while free > 0:
        best = None
        for column in columns[1:]:
            cost = problem.costs[:, column] - problem.costs[rows, choice]
            saving = problem.errors[rows, choice] - problem.errors[:, column]
            fits = (cost > 0) & (cost <= free) & (saving > 0)
            if fits.any():
                place = int(np.argmax(np.where(fits, saving, -1.0)))
                if best is None or saving[place] > best[0]:
                    best = (saving[place], place, column, int(cost[place]))
        if best is None:
            return
        _, place, column, cost = best
        choice[place] = column
        free -= cost
