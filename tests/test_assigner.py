"""The precision assigner: budget, optimality with its certificate, and the paper's program against the exact one."""

import itertools

import numpy as np
import pulp
import pytest
import torch

from lowra import LowRAConfig
from lowra.checkpoints.dense import DenseCheckpoint, empty_model, safetensors_files
from lowra.checkpoints.targets import find_targets
from lowra.quantization.assigner import Problem, assign, assign_exact, assign_layer_order
from lowra.quantization.assigner import two_level as two_level_module
from lowra.quantization.assigner.two_level import assign_two_level
from lowra.quantization.planning import Planner, learn

MENU = (1, 2, 4)
ASSIGNERS = ("exact", "two_level", "layer_order")


def make_problem(bits, channels=(60, 40), sizes=(64, 176), menu=MENU, seed=0) -> Problem:
    """Channels of two fan-ins whose errors fall with the bits and differ by orders of magnitude."""
    generator = np.random.default_rng(seed)
    size = np.repeat(np.array(sizes, dtype=np.int64), channels)
    one_bit = size * np.exp(generator.normal(0, 2, len(size)))
    two_bit = one_bit * generator.uniform(0.2, 0.6, len(size))
    four_bit = two_bit * generator.uniform(0.01, 0.2, len(size))
    errors = np.stack([four_bit, two_bit, one_bit], axis=1)
    costs = size[:, None] * np.array([4, 2, 1])
    return Problem(errors, costs, size, int(bits * size.sum() + 1e-6), menu)


def brute_force(problem: Problem) -> float:
    best = np.inf
    rows = np.arange(len(problem.sizes))
    for choice in itertools.product(problem.columns, repeat=len(rows)):
        if problem.costs[rows, choice].sum() <= problem.budget:
            best = min(best, problem.errors[rows, choice].sum())
    return best


@pytest.fixture(scope="module")
def trained(base_30m):
    """Errors of base-30m's 43,008 channels, as a function of budget and sensitivity."""
    skeleton = empty_model(base_30m)
    planner = Planner(LowRAConfig(bits=1.5))
    targets = find_targets(skeleton, None)
    learn(planner, DenseCheckpoint(safetensors_files(base_30m), skeleton), targets, torch.device("cpu"), False)

    def problem(bits, sensitivity):
        planner.config = LowRAConfig(bits=bits, sensitivity=sensitivity)
        return planner._problem()

    return problem


@pytest.mark.parametrize("name", ASSIGNERS)
@pytest.mark.parametrize("bits", [1.0, 1.03, 1.15, 1.5, 2.0, 2.5, 3.3, 4.0])
def test_budget_is_never_exceeded_and_the_report_is_true(name, bits):
    problem = make_problem(bits)
    result = assign(problem, name)
    column = {4: 0, 2: 1, 1: 2}
    choice = [column[int(b)] for b in result.row_bits]
    rows = np.arange(len(choice))
    assert set(result.row_bits.tolist()) <= set(MENU)
    assert problem.costs[rows, choice].sum() == result.bits_used <= problem.budget == result.budget
    assert result.error == pytest.approx(problem.errors[rows, choice].sum())
    assert result.bound <= result.error * (1 + 1e-12)
    assert result.gap >= 0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("menu", [MENU, (2, 4), (1, 4), (1, 2)])
def test_exact_on_tiny_problems_is_between_bound_and_one_channel(seed, menu):
    problem = make_problem(
        np.random.default_rng(seed).uniform(menu[0], menu[-1]), channels=(5, 3), menu=menu, seed=seed
    )
    result, best = assign_exact(problem), brute_force(problem)
    lowest = problem.columns[0]
    assert result.bound <= best * (1 + 1e-12)
    assert best <= result.error * (1 + 1e-12)
    assert result.error - result.bound <= problem.errors[:, lowest].max()  # the certificate


def test_exact_finds_the_optimum_of_most_tiny_problems():
    hits = 0
    for seed in range(40):
        problem = make_problem(1.5 + seed / 40, channels=(8, 0), seed=seed)
        hits += assign_exact(problem).error <= brute_force(problem) * (1 + 1e-9)
    assert hits >= 30


def test_middle_precision_off_the_hull_is_skipped():
    # 2 bits save almost nothing here, 4 bits nearly everything: no relaxed optimum uses the middle
    errors = np.tile([0.0, 0.99, 1.0], (10, 1))
    sizes = np.full(10, 8)
    problem = Problem(errors, sizes[:, None] * np.array([4, 2, 1]), sizes, 8 * (4 * 5 + 5), MENU)
    result = assign_exact(problem)
    assert (result.row_bits == 4).sum() == 5
    assert result.gap == 0


@pytest.mark.parametrize(("bits", "expected"), [(1.0, 1), (4.0, 4)])
@pytest.mark.parametrize("name", ASSIGNERS)
def test_ends_of_the_menu(name, bits, expected):
    assert set(assign(make_problem(bits), name).row_bits.tolist()) == {expected}


def test_budget_below_the_menu_is_refused_and_above_is_clipped():
    with pytest.raises(ValueError, match="below the smallest precision"):
        make_problem(1.9, menu=(2, 4))
    problem = make_problem(9.0)
    assert assign_exact(problem).bits_used == problem.budget == 4 * problem.sizes.sum()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_errors_are_refused(bad):
    problem = make_problem(2.0)
    problem.errors[3, 1] = bad
    with pytest.raises(ValueError, match="finite and not negative"):
        Problem(problem.errors, problem.costs, problem.sizes, problem.budget, MENU)


def test_channels_without_error_cost_nothing_beyond_the_least():
    problem = make_problem(2.0)
    problem.errors[:10] = 0.0
    assert (assign_exact(problem).row_bits[:10] == 1).all()


def test_layer_order_gives_the_first_channels_more():
    bits = assign_layer_order(make_problem(3.0)).row_bits.astype(int)
    assert set(bits.tolist()) == {2, 4}
    assert (np.diff(bits) <= 0).all()


@pytest.mark.parametrize("name", ["HiGHS", "PULP_CBC_CMD"])
def test_two_level_with_both_solvers(name, monkeypatch):
    if not pulp.getSolver(name, msg=False).available():
        pytest.skip(f"{name} is not installed")
    monkeypatch.setattr(two_level_module, "_SOLVERS", (name,))
    problem = make_problem(1.6, channels=(300, 100))
    result = assign_two_level(problem)
    assert name in result.solver or name.split("_")[1] in result.solver
    assert result.bits_used <= problem.budget
    assert result.gap < 0.05  # 100 channels of a size: clusters of one or two, the budget split in proportion


def test_without_a_solver_two_level_says_what_to_install(monkeypatch):
    monkeypatch.setattr(two_level_module, "_SOLVERS", ())
    with pytest.raises(RuntimeError, match="pip install"):
        assign_two_level(make_problem(1.5))


@pytest.mark.parametrize("sensitivity", ["layer", "none"])
@pytest.mark.parametrize("bits", [1.05, 1.15, 1.5, 2.0, 3.0])
def test_exact_on_a_trained_model_is_within_a_ten_thousandth_of_the_bound(trained, bits, sensitivity):
    result = assign_exact(trained(bits, sensitivity))
    assert result.gap <= 1e-4
    assert result.bits_used <= result.budget
    assert result.seconds < 1


@pytest.mark.parametrize("sensitivity", ["layer", "none"])
def test_two_level_on_a_trained_model_is_within_half_a_percent_of_exact_per_size(trained, sensitivity):
    # Against the optimum under the paper's own split of the budget over the sizes: what the split costs is no fault of
    # the solver (base-30m, "layer": 0.5 % at 1.5 bits, 3 % at 1.15; "none": 0.1 %; see docs/lab/accuracy.md).
    problem = trained(1.5, sensitivity)
    best = 0.0
    for size in np.unique(problem.sizes):
        inside = problem.sizes == size
        share = int(1.5 * problem.sizes[inside].sum())
        best += assign_exact(
            Problem(problem.errors[inside], problem.costs[inside], problem.sizes[inside], share, MENU)
        ).error
    assert assign_two_level(problem).error <= best * 1.005
