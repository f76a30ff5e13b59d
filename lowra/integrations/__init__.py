"""lowra inside the Hugging Face stack. Importing this package registers everything."""

from . import peft, transformers

__all__ = ["peft", "transformers"]
