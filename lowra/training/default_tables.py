"""`tables=auto`: which tables of a base a run trains where its recipe does not say.

On a calibrated base trained tables have brought more than the adapter alone at every rate that was tried
(docs/lab/accuracy.md), and "shared" ones cost next to no time. Where they cannot be trained nobody has asked for them,
so that nothing is refused.
"""

import dataclasses
import pathlib

from ..checkpoints.dense import empty_model
from ..checkpoints.targets import find_targets
from ..config import LowRAConfig
from ..integrations.fsdp import is_sharded_run
from .kinds import Tables
from .recipe import Recipe


def with_tables_chosen(recipe: Recipe, source: pathlib.Path, packed: dict | None) -> Recipe:
    """The recipe with "shared" or "frozen" in place of `tables=auto`.

    Args:
        recipe: what is asked for.
        source: folder of the base.
        packed: its quantization_config; None for one that is not packed yet, which is done without calibration.
    """
    if recipe.tables != "auto":
        return recipe
    config = None if packed is None else LowRAConfig.from_dict(packed)
    tables = chosen_tables(recipe, config)
    if config is not None and tables != "frozen":
        targets = find_targets(empty_model(source, recipe.trust_remote_code), config.modules_to_not_convert)
        if all(target.experts for target in targets.values()):  # whose tables cannot be trained
            tables = "frozen"
    return dataclasses.replace(recipe, tables=tables)


def chosen_tables(recipe: Recipe, packed: LowRAConfig | None) -> Tables:
    """What `tables` of a recipe comes to on a base: itself unless it is "auto"."""
    if recipe.tables != "auto":
        return recipe.tables
    possible = not recipe.dora and not is_sharded_run()
    return "shared" if possible and pays_to_train(packed) else "frozen"


def pays_to_train(packed: LowRAConfig | None) -> bool:
    """Whether tables of this base are trained unless a recipe says otherwise: learned ones, that were calibrated.

    Those of NormalFloat are the baselines', which leave them as they are.
    """
    return packed is not None and packed.calibration is not None and packed.codebook == "learned"
