"""Quantised adapters: LoraQuant and its baselines, packed files with labels, and libraries of adapters on one base.

One story, read off the names: source -> decompose -> refine -> codes -> formats -> storage -> labels -> library.
"""

from .labels import LabelError, base_fingerprint
from .library import AdapterLibrary, load_packed
from .loraquant import LoraQuantSettings, quantize_loraquant, simulate_loraquant
from .source import LoraAdapter, LoraFactors, read_adapter
from .storage import PackedAdapter, read_packed

__all__ = [
    "AdapterLibrary",
    "LabelError",
    "LoraAdapter",
    "LoraFactors",
    "LoraQuantSettings",
    "PackedAdapter",
    "base_fingerprint",
    "load_packed",
    "quantize_loraquant",
    "read_adapter",
    "read_packed",
    "simulate_loraquant",
]
