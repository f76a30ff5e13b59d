"""Loads bitsandbytes, which registers the ops of its lowra backend."""

import logging

# On some CPUs upstream warns at every import that a kernel for NF4 cannot be had, which concerns nothing here.
_warnings = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = _warnings.level
_warnings.setLevel(logging.ERROR)
try:
    import bitsandbytes  # noqa: F401
finally:
    _warnings.setLevel(_level)
