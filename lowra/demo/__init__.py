"""The demo's embedded default: a small language model trained on the spot on text that ships with Python."""

from .base_model import train_base
from .text import write_texts

__all__ = ["train_base", "write_texts"]
