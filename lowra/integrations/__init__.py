"""lowra inside the Hugging Face stack. Importing this package registers everything."""

from . import patches, peft, transformers

patches.apply_patches()

__all__ = ["patches", "peft", "transformers"]
