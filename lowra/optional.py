"""Packages that only some work needs: which extra of lowra brings one, said before the work begins."""

import importlib.util

_EXTRAS = {
    "matplotlib": "pictures",
    "datasets": "hub",
    "rouge_score": "rouge",
    "pulp": "paper",
    "highspy": "paper",
    "sklearn": "paper",
    "liger_kernel": "liger",
}


class MissingPackage(ImportError, ValueError):
    """A package that something asked for needs, and that is not installed."""


def installed(name: str) -> bool:
    """Whether a package can be imported, by the name under which it is."""
    return importlib.util.find_spec(name) is not None


def require(what: str, *names: str) -> None:
    """
    Args:
        what: needs them, as the beginning of a sentence.
        names: of modules.

    Raises:
        MissingPackage: one is not installed, with the command that installs it.
    """
    missing = [name for name in names if not installed(name)]
    if missing:
        raise MissingPackage(f"{what} needs {' and '.join(missing)}: {how_to_install(missing[0])}.")


def how_to_install(name: str) -> str:
    """The command that brings a package with what belongs to it."""
    return f'pip install "lowra[{_EXTRAS[name]}]"'
