"""The model that comes with lowra."""

import pathlib

BASE = pathlib.Path(__file__).parent / "base-6m"  # its README.md says what it is and where its text came from
