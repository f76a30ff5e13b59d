"""What a recipe has done so that a step takes less time, or less memory: nothing of it changes what is learned."""

import logging
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from ..integrations.checkpointed_layers import checkpointed_layers
from ..integrations.layer_graphs import capture_layers
from ..integrations.offloading import offload_activations
from ..integrations.tiled_mlp import tile_mlps
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
        asked = [name for name in ("layer_graphs", "liger", "offload_activations") if getattr(recipe, name)]
        if asked:
            raise ValueError(f"{asked[0]}=true is for NVIDIA GPUs, and this runs on {arguments.device}: leave it out.")
    if recipe.liger:
        require("liger=true", "liger_kernel")


def quicken_steps(model: PeftModel, recipe: Recipe, arguments: TrainingArguments) -> None:
    """Liger's kernels and what makes long contexts fit, where the recipe asks for them; CUDA graphs unless it says no.

    Graphs have not been run by several processes at once, so there they have to be asked for. They have memory of their
    own, and nothing to gain where a GPU is busy with a long context.

    Raises:
        ValueError: the model has no layers, or no MLP, for what the recipe asks for.
    """
    bare: Any = model.get_base_model()
    if recipe.liger:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(bare, _LIGER)
    if recipe.tiled_mlp:
        tile_mlps(model)
    if recipe.offload_activations:
        offload_activations(model)
    long_context = recipe.offload_activations or recipe.tiled_mlp
    wanted = recipe.layer_graphs
    if wanted is None:
        on_one_gpu = arguments.device.type == "cuda" and arguments.world_size == 1
        wanted = on_one_gpu and not long_context and bool(checkpointed_layers(bare))
    if wanted and recipe.gradient_checkpointing:
        capture_layers(model)
