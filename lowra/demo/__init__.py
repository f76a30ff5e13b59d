"""The demo's embedded default: a small, really trained base, text it has never seen, and the runs to compare on it."""

from .base import BASE
from .comparison import comparison_table, demo_cells, order_problems
from .text import write_texts

__all__ = ["BASE", "comparison_table", "demo_cells", "order_problems", "write_texts"]
