"""How other libraries are patched: what a row of the table of patches says, its guard, and what a failed guard means.

A guard that fails warns at import and leaves the library as it was, so that dense models go on working; packed models
are then refused by `require_patches`, because what the patch would have checked or mended goes wrong without a word.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any


class LibraryChanged(ImportError):
    """Another library no longer has what a patch rests on."""


@dataclasses.dataclass(frozen=True)
class Patch:
    """One place where another library does something else for packed models.

    Attributes:
        target: what is patched, "package.module:Class.attribute".
        why: what goes wrong on packed models without it.
        door: the public way that would replace it, and what it lacks.
        since: the version of the library whose door would do; "none" where no version has one.
        rests_on: names of parameters that the target must take.
        also: other targets that must exist, and the parameters that they must take.
        optional: other versions have no such target, and nothing to patch.
        wrap: makes the replacement of the original; None for what is patched on single models, where they are made.
    """

    target: str
    why: str
    door: str
    since: str
    rests_on: tuple[str, ...] = ()
    also: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    optional: bool = False
    wrap: Callable | None = None

    @property
    def library(self) -> str:
        return self.target.partition(".")[0].partition(":")[0]

    def check(self) -> None:
        """The guard.

        Raises:
            LibraryChanged: the target, or what else this rests on, is gone or takes other parameters.
        """
        for target, names in {self.target: self.rests_on, **self.also}.items():
            if self.optional and not exists(target):
                continue
            if fault := _fault(target, names):
                raise LibraryChanged(
                    f"{self.library} {_version(self.library)} has changed {target} ({fault}), and lowra rests on it: "
                    f"{self.why} Install {_requirement(self.library)} as listed in docs/versions.md, or a newer lowra."
                )

    def install(self) -> None:
        """Checks, and puts the replacement in the place of the original.

        Raises:
            LibraryChanged: see `check`.
        """
        self.check()
        if self.wrap is None or (self.optional and not exists(self.target)):
            return
        owner, name = _owner(self.target)
        original = inspect.getattr_static(owner, name)
        replacement: Any
        if isinstance(original, classmethod):
            replacement = classmethod(self.wrap(original.__func__))
        else:
            replacement = self.wrap(original)
        setattr(owner, name, replacement)


_failed: list[str] = []


def install_patches(patches: Iterable[Patch]) -> None:
    """Installs every patch that replaces something; a failed guard is a RuntimeWarning."""
    for patch in (patch for patch in patches if patch.wrap is not None):
        try:
            patch.install()
        except LibraryChanged as change:
            _failed.append(str(change))
            warnings.warn(f"Packed models are refused: {change}", RuntimeWarning, stacklevel=2)


def require_patches() -> None:
    """
    Raises:
        LibraryChanged: a guard failed at import.
    """
    if _failed:
        raise LibraryChanged("\n".join(_failed))


def _owner(target: str) -> tuple[object, str]:
    module, _, path = target.partition(":")
    *above, name = path.split(".")
    owner = importlib.import_module(module)
    for part in above:
        owner = getattr(owner, part)
    return owner, name


def exists(target: str) -> bool:
    """Whether the library has it."""
    try:
        owner, name = _owner(target)
    except (ImportError, AttributeError):
        return False
    return hasattr(owner, name)


def _fault(target: str, names: tuple[str, ...]) -> str | None:
    """What is wrong with a target; None where it is as expected."""
    if not exists(target):
        return "it is gone"
    if not names:
        return None
    owner, name = _owner(target)
    found = getattr(owner, name)
    if not callable(found):
        return "it cannot be called any more"
    taken = inspect.signature(found).parameters
    missing = [name for name in names if name not in taken]
    return f"it takes no {', '.join(missing)} any more" if missing else None


def _version(library: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(library)
    return "(of unknown version)"


def _requirement(library: str) -> str:
    """What lowra asks for of a library, as pip is told it: "peft<0.22,>=0.18.1"."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("lowra") or ():
            if requirement.startswith(library):
                return requirement
    return library
