"""lowra: LoRA fine-tuning of large language models on base weights of 1 to 2 bits.

Importing it registers the quantisation method "lowra" with Transformers and PEFT:

    import lowra
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, load_in_lowra=True, lowra_bits=1.5)
"""

__version__ = "0.1.0"

from . import (
    backend,  # noqa: F401 - first: defines the ops
    integrations,
)
from .calibration import Calibration, calibrate
from .config import LowRAConfig
from .initial_adapter import AdapterRecipe
from .integrations.peft import merge_into_dense, prepare_for_training
from .linear import LowRALinear
from .pipeline import quantize_checkpoint

__all__ = [
    "AdapterRecipe",
    "Calibration",
    "LowRAConfig",
    "LowRALinear",
    "calibrate",
    "integrations",
    "merge_into_dense",
    "prepare_for_training",
    "quantize_checkpoint",
]
