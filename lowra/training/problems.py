"""All that is wrong with what a user gave, said at once and in one line."""

import contextlib
from collections.abc import Iterator


class Problems:
    """Collects what is wrong, to say it all at once, in one line.

    Attributes:
        found: one sentence each.
    """

    def __init__(self, what: str):
        self.what = what
        self.found: list[str] = []
        self._kind: type[Exception] = ValueError

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Goes on after a ValueError or OSError of the block."""
        try:
            yield
        except _Several as error:
            self.found += error.found
        except (ValueError, OSError) as error:
            self._kind = type(error) if not self.found else ValueError
            self.found.append(str(error))

    def report(self) -> None:
        """
        Raises:
            ValueError, OSError: something was found.
        """
        if len(self.found) == 1:
            raise self._kind(self.found[0])
        if self.found:
            raise _Several(self.what, self.found)


class _Several(ValueError):
    def __init__(self, what: str, found: list[str]):
        numbered = " ".join(f"({number}) {sentence}" for number, sentence in enumerate(found, 1))
        super().__init__(f"{what} has {len(found)} problems: {numbered}")
        self.found = found
