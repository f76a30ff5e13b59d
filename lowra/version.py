"""The version of this package, from its installed metadata; pyproject.toml is where it stands."""

import importlib.metadata

__version__ = importlib.metadata.version("lowra")
