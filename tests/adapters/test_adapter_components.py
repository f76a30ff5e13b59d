"""Decomposition and refinement: the product is kept, h follows the ratio, refinement never makes a component worse."""

import pytest
import torch

from lowra.adapters.codes import RoundToNearest, Sign
from lowra.adapters.decompose import explained_count, importance_order, svd_components
from lowra.adapters.straight_through import outer_error, refine


@pytest.mark.parametrize(("m", "r", "n"), [(64, 8, 200), (200, 16, 64), (5, 8, 30)])
def test_reparametrisation_keeps_the_product(m, r, n):
    b, a = torch.randn(3, m, r), torch.randn(3, r, n)
    columns, rows, singular = svd_components(b, a)
    product = b.double() @ a.double()
    assert columns.shape == (3, min(m, r, n), m) and rows.shape == (3, min(m, r, n), n)
    assert (columns.double().mT @ rows.double() - product).norm() < 1e-6 * product.norm()
    assert torch.allclose(singular, torch.linalg.svdvals(product)[:, : singular.shape[1]])


def test_components_share_the_singular_value_between_both_sides():
    columns, rows, singular = svd_components(torch.randn(1, 40, 4), torch.randn(1, 4, 30))
    for side in (columns, rows):
        gram = side[0].double() @ side[0].double().mT
        assert torch.allclose(gram, torch.diag(singular[0]), atol=1e-5)


def test_h_is_the_smallest_that_explains_the_ratio():
    singular = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squares 9, 4, 1 of 14
    ratios = [0.5, 9 / 14, 0.65, 13 / 14, 0.95, 1.0]
    assert [explained_count(singular, ratio) for ratio in ratios] == [1, 1, 2, 2, 3, 3]
    assert explained_count(torch.zeros(4), 0.9) == 0


def test_norm_split_ranks_by_the_norm_of_the_outer_product():
    columns, rows = torch.tensor([[1.0, 0], [0, 3], [2, 0]]), torch.tensor([[5.0], [1], [1]])
    assert importance_order(columns, rows, "norm", torch.Generator()).tolist() == [0, 1, 2]


def test_outer_error_is_the_squared_distance():
    b, a, p, q = torch.randn(3, 7), torch.randn(3, 9), torch.randn(3, 7), torch.randn(3, 9)
    direct = [(torch.outer(b[i], a[i]) - torch.outer(p[i], q[i])).square().sum() for i in range(3)]
    assert torch.allclose(outer_error(b, a, p, q).float(), torch.stack(direct), rtol=1e-5)


def start_and_end(quantizer, b, a):
    refined_b, refined_a = refine(b, a, quantizer)
    start = outer_error(b, a, quantizer.simulate(b), quantizer.simulate(a))
    end = outer_error(b, a, quantizer.simulate(refined_b), quantizer.simulate(refined_a))
    return start, end


@pytest.mark.parametrize("quantizer", [RoundToNearest(1), RoundToNearest(2), RoundToNearest(3), Sign()])
def test_refinement_is_never_worse_than_its_start(quantizer):
    scale = torch.logspace(-4, 1, 12)[:, None]
    start, end = start_and_end(quantizer, torch.randn(12, 200) * scale, torch.randn(12, 64) * scale)
    assert (end <= start).all()


def test_refinement_halves_the_error_at_two_bits():
    start, end = start_and_end(RoundToNearest(2), torch.randn(16, 512), torch.randn(16, 512))
    assert end.sum() < 0.55 * start.sum()


def test_sign_codes_start_at_their_optimum():
    start, end = start_and_end(Sign(), torch.randn(8, 256), torch.randn(8, 384))
    assert (end >= start * (1 - 1e-3)).all()


def test_components_do_not_depend_on_their_batch():
    b, a = torch.randn(5, 130), torch.randn(5, 70)
    together = refine(b, a, RoundToNearest(2))
    # Batches stop together, so one component alone may stop sooner; its error is what has to agree.
    for index in range(5):
        alone = refine(b[index : index + 1], a[index : index + 1], RoundToNearest(2))
        sim = RoundToNearest(2).simulate
        errors = [
            outer_error(b[index : index + 1], a[index : index + 1], sim(x), sim(y))
            for x, y in (alone, (together[0][index : index + 1], together[1][index : index + 1]))
        ]
        assert errors[1] <= errors[0] * (1 + 1e-6)


def test_zero_component_stays_finite():
    b, a = torch.zeros(2, 130), torch.zeros(2, 70)
    for quantizer in (RoundToNearest(2), Sign()):
        refined = refine(b, a, quantizer)
        assert all(torch.equal(side, torch.zeros_like(side)) for side in refined)
