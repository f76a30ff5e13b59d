"""Where the files of an adapter are: a local folder, or a name on the hub, which is asked once."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from huggingface_hub import hf_hub_download
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils import cached_file

from ..checkpoints.hub import offline_without_connection, reason_of_hub
from ..checkpoints.reading import stored_tensors
from ..checkpoints.records import ADAPTER_CONFIG
from .adapter_configs import check_adapter_config

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")


@contextlib.contextmanager
def reached(adapter: str | os.PathLike, options: dict, needs_config: bool) -> Iterator[None]:
    """Within, PEFT finds the adapter, or what has been downloaded of it where the hub does not answer.

    Args:
        adapter: as it was given.
        options: as PEFT takes them, of which subfolder, revision, cache_dir, token and local_files_only count.
        needs_config: its settings are read from its file, and not given.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a name.
    """
    if os.path.isdir(adapter):
        folder = pathlib.Path(adapter) / (options.get("subfolder") or "")
        if needs_config and not (folder / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"{folder} is no adapter: there is no {ADAPTER_CONFIG} in it.")
        yield
        return
    name = os.fspath(adapter)
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        hint = "there is no such folder"
        if os.path.isfile(name):
            hint = f"it is a file; give its folder, {os.path.dirname(name) or '.'}"
        elif os.path.isdir(os.path.expanduser(name)):
            hint = f"PEFT does not know ~; give {os.path.expanduser(name)}"
        raise FileNotFoundError(f"{name} is no adapter: {hint}.")
    with contextlib.ExitStack() as stack:
        # or each file would be asked for six times over half a minute
        stack.enter_context(offline_without_connection())
        if needs_config:
            try:
                hf_hub_download(name, ADAPTER_CONFIG, subfolder=options.get("subfolder"), **_of_hub(options))
            except Exception as error:
                stack.close()  # the reason depends on what the user has set
                raise FileNotFoundError(
                    f"{name} is neither a local folder nor could its {ADAPTER_CONFIG} be had from the hub: "
                    f"{reason_of_hub(error)}."
                ) from error
        yield


def _of_hub(options: dict) -> dict:
    return {option: options[option] for option in _HUB_OPTIONS if options.get(option) is not None}


def file_of(adapter: str | pathlib.Path, name: str, options: dict) -> pathlib.Path | None:
    """A file of a local or hub adapter, or None. See `reached` for the arguments."""
    folder = pathlib.Path(adapter) / (options.get("subfolder") or "")
    if folder.is_dir():
        return folder / name if (folder / name).exists() else None
    path = None
    with contextlib.suppress(OSError):  # a hub that cannot be reached; PEFT says so better
        path = cached_file(
            str(adapter),
            name,
            subfolder=options.get("subfolder") or "",
            **_of_hub(options),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if path is None else pathlib.Path(path)


def check_settings(adapter: str | pathlib.Path, options: dict) -> None:
    """Raises OSError or ValueError where an adapter's adapter_config.json is none that PEFT can use."""
    path = file_of(adapter, ADAPTER_CONFIG, options)
    if path is not None:
        check_adapter_config(path)


def check_weights(adapter: str | pathlib.Path, subfolder: str | None) -> None:
    """
    Raises:
        FileNotFoundError: a local folder with an adapter's configuration and no weights.
        ValueError: weights that are cut short.
    """
    folder = pathlib.Path(adapter) / (subfolder or "")
    if not (folder / ADAPTER_CONFIG).is_file():
        return  # on the hub, or PEFT says what is missing
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if weights.is_file():
        stored_tensors(weights)
    elif not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{folder} has an {ADAPTER_CONFIG} and no {SAFETENSORS_WEIGHTS_NAME}.")
