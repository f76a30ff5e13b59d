"""A model by its name: a local folder, or what the hub has of it, which is not waited for where it does not answer."""

import contextlib
import pathlib
from collections.abc import Iterator

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session

from .companions import NOT_WANTED
from .guarded import one_line
from .places import expanded


def local_folder(model: str) -> pathlib.Path | None:
    """A local folder as it is; None for what can only be a name on the hub.

    Raises:
        FileNotFoundError: a path at which there is no folder.
    """
    folder = expanded(model)
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        hint = f": it is a file; give its folder, {folder.parent}" if folder.is_file() else ""
        raise FileNotFoundError(f"{model} is not a folder with a model in it{hint}.")
    return None


def resolve_folder(model: str) -> pathlib.Path:
    """A local folder as it is, or the snapshot of a hub name.

    Raises:
        FileNotFoundError: neither a folder nor a name the hub knows.
    """
    if (folder := local_folder(model)) is not None:
        return folder
    with told_of_hub(model, "it"):
        return pathlib.Path(snapshot_download(str(model), ignore_patterns=NOT_WANTED))


@contextlib.contextmanager
def told_of_hub(model: str, what: str) -> Iterator[None]:
    """Within, whatever the hub answers for a model that is no local folder is told in one sentence.

    Args:
        what: is asked for, "it" or a part of it.

    Raises:
        FileNotFoundError: in the place of any error.
    """
    try:
        yield
    except Exception as error:
        raise FileNotFoundError(
            f"{model} is neither a local folder nor could {what} be had from the hub: {reason_of_hub(error)}."
        ) from error


@contextlib.contextmanager
def offline_without_connection() -> Iterator[None]:
    """Within, the hub is not asked where it does not answer: what has been downloaded counts."""
    former = constants.HF_HUB_OFFLINE
    try:
        if not former:
            try:
                get_session().head(constants.ENDPOINT, timeout=5)
            except Exception:  # of whichever HTTP library it uses
                constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = former


def reason_of_hub(error: Exception) -> str:
    """Why something could not be had from the hub, in a few words."""
    for kinds, reason in (
        (GatedRepoError, "its owner has to grant access first, and you have to log in (hf auth login)"),
        (RepositoryNotFoundError, "it has no model of this name, or none that you may see (hf auth login)"),
        (HFValidationError, "this is no name that it could have; they are OWNER/MODEL"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and it has not been downloaded yet"),
        (
            LocalEntryNotFoundError,
            "HF_HUB_OFFLINE is set, and it has not been downloaded yet"
            if constants.HF_HUB_OFFLINE
            else "there is no connection to it, and it has not been downloaded yet",
        ),
    ):
        if isinstance(error, kinds):
            return reason
    return one_line(error).rstrip(".")
