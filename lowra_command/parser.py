"""The parser of all commands: names are taken as they are written, and help says what is left out."""

import argparse
import dataclasses
import difflib
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

OVERRIDES = "overrides"
GOES_ON = "; finished parts are kept, the same command goes on from there"  # said where a command is interrupted


class CommandParser(argparse.ArgumentParser):
    """Knows no abbreviations, under which a misspelt option would pass for another, and names the nearest instead."""

    def __init__(self, *, formatter_class: type[argparse.HelpFormatter] | None = None, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=formatter_class or HelpWithDefaults, **kwargs)

    def parse_known_args(  # type: ignore[override] # overloads of argparse by the kind of namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        if any(action.dest == OVERRIDES for action in self._actions):  # argparse takes those before options alone
            later = [word for word in unknown if "=" in word and not word.startswith("-")]
            setattr(namespace, OVERRIDES, [*getattr(namespace, OVERRIDES), *later])
            unknown = [word for word in unknown if word not in later]
        if unknown:
            options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            nearest = difflib.get_close_matches(options[0], self._option_string_actions, n=1) if options else []
            hint = f"; did you mean {nearest[0]}?" if nearest else f" ({self.prog} --help lists all)"
            self.error(f"there is no {(options or unknown)[0]}{hint}")
        return namespace, unknown


class HelpWithDefaults(argparse.HelpFormatter):
    """Adds its default to an option's help, unless there is none or the help says it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        unsaid = action.default not in (None, False, argparse.SUPPRESS) and "default" not in text
        return f"{text} (default: %(default)s)" if action.option_strings and unsaid else text


def place(text: str) -> pathlib.Path:
    """The type of options that name a file or a folder.

    Raises:
        argparse.ArgumentTypeError: nothing, of which pathlib would make the folder that one is in.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty, as an unset variable of the shell is; give a path")
    return pathlib.Path(text)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`key=value` after a recipe, before or after options."""
    parser.add_argument(
        OVERRIDES, metavar="KEY=VALUE", nargs="*", default=[], help="fields of the recipe set otherwise"
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option that every command has which reads a model."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the model brings, where its architecture is not one of Transformers'",
    )


def add_memory_check(parser: argparse.ArgumentParser) -> None:
    """The option of commands that refuse what the memory does not suffice for."""
    parser.add_argument(
        "--no-memory-check",
        action="store_true",
        help="begin even where the memory will not suffice by what `lowra plan` knows",
    )


@dataclasses.dataclass(frozen=True)
class Later:
    """The function "module:name" of a command, imported when it runs: PyTorch and Transformers take seconds."""

    function: str

    def __call__(self, args: argparse.Namespace) -> dict:
        """What the function finds, as JSON can hold it."""
        module, _, name = self.function.partition(":")
        found = getattr(importlib.import_module(module), name)(args)
        return importlib.import_module("lowra.checkpoints.atomic").finite(found)
