"""lowra: LoRA fine-tuning of large language models on base weights of 1 to 2 bits.

Importing it registers the quantisation method "lowra" with Transformers and PEFT:

    import lowra
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, load_in_lowra=True, lowra_bits=1.5)
"""

from . import backend  # noqa: F401, I001 - first: defines the ops
from . import integrations
from .config import LowRAConfig
from .generation.fast import fast_decoding
from .integrations.layer_graphs import capture_layers
from .integrations.offloading import offload_activations
from .integrations.peft import merge_into_dense, prepare_for_training
from .integrations.tiled_mlp import tile_mlps
from .nn.linear import LowRALinear
from .quantization.calibration import Calibration, calibrate
from .quantization.initial_adapter import AdapterRecipe
from .quantization.pipeline import quantize_checkpoint
from .version import __version__  # noqa: F401

__all__ = [
    "AdapterRecipe",
    "Calibration",
    "LowRAConfig",
    "LowRALinear",
    "calibrate",
    "capture_layers",
    "fast_decoding",
    "integrations",
    "merge_into_dense",
    "offload_activations",
    "prepare_for_training",
    "quantize_checkpoint",
    "tile_mlps",
]
