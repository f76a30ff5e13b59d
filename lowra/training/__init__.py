"""Fine-tuning runs: a recipe from YAML, the methods of the paper as presets, data, metrics, one run, grids of runs."""

from .finetune import finetune
from .grid import run_grid
from .recipe import Recipe, load_recipe

__all__ = ["Recipe", "finetune", "load_recipe", "run_grid"]
