"""Which numbers an option takes."""

import argparse
import math

MOST_SEEDS = 2**32 - 1  # what NumPy's generators take


def check_range(args: argparse.Namespace, name: str, least: float, most: float = math.inf) -> None:
    """
    Raises:
        ValueError: the option of this name is given and not finite, or not within the limits.
    """
    value = getattr(args, name)
    if value is None or math.isfinite(value) and least <= value <= most:
        return
    option = "--" + name.replace("_", "-")
    limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:.15g}"
    raise ValueError(f"{option} must be {limits}; got {value}.")
