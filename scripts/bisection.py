"""The longest of something that fits, in few trials."""

from collections.abc import Callable

UNIT = 512  # tokens
STRIDE = 0.04


def search(step: Callable[[int], dict | None], guess: int, most: int, fits: int = 0, fails: int = 0) -> list[dict]:
    """The steps of a bisection: from a guess up or down, by 4 % and ever more, until one fits and one does not.

    Args:
        step: tries a length; None where there is no time for it.
        guess: tokens.
        most: steps.
        fits, fails: tokens of which that is known; 0 for none.
    """
    found: list[dict] = []
    tokens, stride = rounded(guess), STRIDE
    while len(found) < most and tokens not in (fits, fails):
        result = step(tokens)
        if result is None:
            break
        found.append(result)
        if result["fits"]:
            fits = tokens
        else:
            fails = tokens
        if fits and fails:
            tokens = rounded((fits + fails) / 2)
        else:
            tokens = (
                max(fits + UNIT, rounded(fits * (1 + stride))) if fits else max(UNIT, rounded(fails / (1 + stride)))
            )
            stride *= 2
    return found


def rounded(tokens: float) -> int:
    return int(tokens // UNIT) * UNIT
