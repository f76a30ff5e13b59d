"""Which numbers an option takes, and options that others make meaningless."""

import argparse
import math
from collections.abc import Iterable

MOST_SEEDS = 2**32 - 1  # what NumPy's generators take


def check_range(args: argparse.Namespace, name: str, least: float, most: float = math.inf) -> None:
    """
    Raises:
        ValueError: the option of this name is given and not finite, or not within the limits.
    """
    value = getattr(args, name)
    if value is None or math.isfinite(value) and least <= value <= most:
        return
    option = _option(name)
    limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:.15g}"
    raise ValueError(f"{option} must be {limits}; got {value}.")


def refuse_idle(args: argparse.Namespace, idle: Iterable[tuple[bool, str, str]]) -> None:
    """
    Args:
        args: in which an option that was not given is None or False.
        idle: for each kind of option without effect whether that is so, names of options apart by spaces, and why, such
            as "without --rank".

    Raises:
        ValueError: one of them is given.
    """
    for is_idle, names, why in idle:
        for name in names.split():
            if is_idle and getattr(args, name) not in (None, False):
                raise ValueError(f"{_option(name)} has no effect {why}: leave it out, or change that.")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
