"""Places to write to, checked before the work whose outcome goes there: what is known at the start fails at the start.

    place = new_folder(output)      # a checkpoint, an adapter: nothing or an empty folder is there; links are followed
    output = usable_folder(output)  # a run that may be resumed, a grid, a demo: a folder with or without content
    path = usable_file(path)        # a picture

All take paths as people write them, with `~`. Whether a place can be written is tried, not read off permission bits,
which say little on network and read-only file systems.
"""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

WORK_SUFFIX = ".partial"  # of the folder beside an output, in which it is made
_BESIDE_BYTES = 20  # that and a process's number
_NAME_BYTES = 255  # of a file's name on the file systems of today
_PATH_BYTES = 4095
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes one slash of two
_LONGEST_INSIDE = 128  # what is written into a folder is not longer


def expanded(path: str | os.PathLike) -> pathlib.Path:
    """A path with `~` and `~name` replaced.

    Raises:
        ValueError: not a path, or a user that does not exist.
    """
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise ValueError(f"{text!r} is no path.")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text} starts with a user's home that does not exist ({error}).") from None


def lasting_name(model: str | os.PathLike) -> str:
    """By which a model is found from whatever folder: the whole path of one that lies here, or its name on the hub."""
    return str(expanded(model).resolve()) if expanded(model).is_dir() else os.fspath(model)


def new_folder(output: str | os.PathLike) -> pathlib.Path:
    """The place, links followed, of a folder that another one, made beside it, will be renamed to.

    Raises:
        OSError, ValueError: something is there, or the folder could not be put there.
    """
    place = _followed(output)
    if _exists(place, output):
        if not place.is_dir():
            raise ValueError(f"{output} exists and is a file: give another output, or remove it first.")
        if any(place.iterdir()):
            raise ValueError(f"{output} exists and is not empty: give another --output, or remove it first.")
        # a finished folder takes the place of this one, so it has to be one that can go
        if os.path.ismount(place):
            raise ValueError(f"{output} is a mount point, which no folder can be renamed to: give a folder in it.")
        if place.samefile(os.curdir):
            raise ValueError(f"{output} is the folder you are in, which is to be replaced: give a new one's name.")
    _check_names(place, _BESIDE_BYTES)
    with _tried(output):
        _check_work(place)
        probe = tempfile.mkdtemp(prefix=".lowra-", dir=_nearest_folder(place.parent, output))
        try:
            if place.exists():
                os.rename(place, probe)  # there and back: in a folder of many users it may belong to another
                os.rename(probe, place)
        finally:
            if os.path.isdir(probe):
                os.rmdir(probe)
    return place


def usable_folder(output: str | os.PathLike) -> pathlib.Path:
    """The path of a folder that is made, if it is not there, and written into.

    Raises:
        OSError, ValueError: something else is there, or it could not be written.
    """
    place = _followed(output)
    if _exists(place, output) and not place.is_dir():
        raise ValueError(f"{output} exists and is a file: give another output, or remove it first.")
    _check_names(place, 0)
    with _tried(output):
        os.rmdir(tempfile.mkdtemp(prefix=".lowra-", dir=_nearest_folder(place, output)))
    return expanded(output)


def usable_file(path: str | os.PathLike) -> pathlib.Path:
    """The path of a file that is made, and its folder with it, or replaced.

    Raises:
        OSError, ValueError: a folder is there, or the file could not be written.
    """
    place = _followed(path)
    if _exists(place, path) and not place.is_file():
        raise ValueError(f"{path} is no file: give the name of one to write.")
    _check_names(place, 0)
    if place.exists() and not os.access(place, os.W_OK):
        raise PermissionError(f"{path} may not be written by this user: give another name.")
    with _tried(path):
        os.rmdir(tempfile.mkdtemp(prefix=".lowra-", dir=_nearest_folder(place.parent, path)))
    return expanded(path)


def _followed(path: str | os.PathLike) -> pathlib.Path:
    """The absolute path with all links followed, the last one too, even where it leads to nothing yet."""
    if _ADDRESS.match(os.fspath(path)):
        raise ValueError(f"{path} is an address, and what is written is written to folders: give one of this machine.")
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # bytes of the shell that are no UTF-8
        raise ValueError(f"{path!r} is no UTF-8, and safetensors files cannot be put there: give another.") from None
    try:
        return expanded(path).resolve()
    except (RuntimeError, OSError) as error:  # the former for a link to itself, before Python 3.13
        raise OSError(f"{path} cannot be followed ({error}).") from error


def _exists(place: pathlib.Path, given: str | os.PathLike) -> bool:
    with _tried(given):
        return place.exists()


def _check_names(place: pathlib.Path, more: int) -> None:
    """Raises ValueError where a name of the path, or of what is made beside or in it, would be too long."""
    for name in place.parts:
        size = len(os.fsencode(name)) + more
        if size > _NAME_BYTES:
            raise ValueError(f"{place.name:.40}… is too long a name: give one of {_NAME_BYTES - more} bytes.")
    if len(os.fsencode(place)) + more + _LONGEST_INSIDE > _PATH_BYTES:
        raise ValueError(f"{str(place):.40}… is too long a path: give a shorter one.")


def _check_work(place: pathlib.Path) -> None:
    """Raises ValueError where the folder beside `place`, from an earlier run, is none or lies on another disk."""
    work = place.with_name(place.name + WORK_SUFFIX)
    if not os.path.lexists(work):
        return
    if work.is_symlink() or not work.is_dir():
        raise ValueError(f"{work} is in the way of the folder in which {place.name} is to be made: remove it.")
    if work.stat().st_dev != place.parent.stat().st_dev:
        raise ValueError(f"{work} lies on another disk than {place.name}, and cannot be renamed to it: remove it.")
    if not os.access(work, os.W_OK | os.X_OK):
        raise PermissionError(f"{work}, in which {place.name} is to be made, may not be written by this user.")


def _nearest_folder(place: pathlib.Path, given: str | os.PathLike) -> pathlib.Path:
    """The folder itself, or that one above it which is there.

    Raises:
        NotADirectoryError: that is a file.
    """
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{given} cannot be made: {place} is a file.")
    return place


@contextlib.contextmanager
def _tried(given: str | os.PathLike) -> Iterator[None]:
    """Names the output in whatever the operating system says."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        where = f" in {os.path.dirname(error.filename)}" if error.filename else ""
        raise type(error)(f"{given} cannot be written ({error.strerror}{where}): give another output.") from error
