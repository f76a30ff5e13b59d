"""Quantised adapters: LoraQuant and its baselines, packed files with labels, and libraries of adapters on one base.

One story, read off the names: source -> decompose -> refine -> codes -> formats -> storage -> labels -> library.
"""

from lowra.adapters.labels import LabelError, base_fingerprint
from lowra.adapters.library import AdapterLibrary, load_packed
from lowra.adapters.loraquant import LoraQuantSettings, quantize_loraquant, simulate_loraquant
from lowra.adapters.source import LoraAdapter, LoraFactors, read_adapter
from lowra.adapters.storage import PackedAdapter, read_packed

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
