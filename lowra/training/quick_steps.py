"""What a recipe has done so that a step takes a GPU, and the host, less time: nothing of it changes what is learned."""

import logging
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from ..integrations.layer_graphs import capture_layers, layers_to_capture
from ..optional import require
from .recipe import Recipe

logger = logging.getLogger(__name__)

# The loss is computed by parts already (`head_by_parts`), whatever the architecture.
_LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_quick_steps(recipe: Recipe, arguments: TrainingArguments) -> None:
    """
    Raises:
        MissingPackage, ValueError: the recipe asks for what is not installed, or for a GPU where there is none.
    """
    if arguments.device.type != "cuda":
        asked = [name for name in ("layer_graphs", "liger") if getattr(recipe, name)]
        if asked:
            raise ValueError(f"{asked[0]}=true is for NVIDIA GPUs, and this runs on {arguments.device}: leave it out.")
    if recipe.liger:
        require("liger=true", "liger_kernel")


def quicken_steps(model: PeftModel, recipe: Recipe, arguments: TrainingArguments) -> None:
    """Liger's kernels where the recipe asks for them, and CUDA graphs unless it says no.

    Graphs have not been run by several processes at once, so there they have to be asked for.
    """
    bare: Any = model.get_base_model()
    if recipe.liger:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(bare, _LIGER)
    wanted = recipe.layer_graphs
    if wanted is None:
        wanted = arguments.device.type == "cuda" and arguments.world_size == 1 and bool(layers_to_capture(bare))
    if wanted and recipe.gradient_checkpointing:
        capture_layers(model)
