"""Precision assigner (P2): one precision per channel of the whole model within a bit budget. Sees arrays, no models."""

from .exact import assign_exact
from .layer_order import assign_layer_order
from .problem import Assignment, Problem


def assign(problem: Problem, assigner: str) -> Assignment:
    """Solves a problem with "exact", "two_level" or "layer_order"."""
    if assigner == "two_level":
        # scikit-learn and PuLP take longer to import than the rest of lowra, and nothing else needs them
        from .two_level import assign_two_level

        return assign_two_level(problem)
    return {"exact": assign_exact, "layer_order": assign_layer_order}[assigner](problem)


__all__ = ["Assignment", "Problem", "assign", "assign_exact", "assign_layer_order"]
