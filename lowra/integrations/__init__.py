"""lowra inside the Hugging Face stack. Importing this package registers everything."""

import sys

from . import patches, peft, transformers

if "lowra_autoload" in sys.modules:  # before the patches, which would wrap what it has wrapped
    sys.modules["lowra_autoload"].leave()
patches.apply_patches()

__all__ = ["patches", "peft", "transformers"]
