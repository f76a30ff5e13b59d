"""Precision assigner (P2): one precision per channel of the whole model, within a bit budget. Sees arrays, never models."""

from .exact import assign_exact
from .layer_order import assign_layer_order
from .problem import Assignment, Problem
from .two_level import assign_two_level

ASSIGNERS = {"exact": assign_exact, "two_level": assign_two_level, "layer_order": assign_layer_order}

__all__ = ["ASSIGNERS", "Assignment", "Problem", "assign_exact", "assign_layer_order", "assign_two_level"]
