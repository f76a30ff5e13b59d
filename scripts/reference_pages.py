"""A hook of mkdocs: pages made from the code, with every option of the commands and every field of a recipe."""

import argparse
import dataclasses
import json
import re
import textwrap
import typing

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lowra.training.recipe import Recipe
from lowra_command import build_parser


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for uri, content in (("reference/cli.md", commands_page()), ("reference/recipes.md", recipes_page())):
        files.append(File.generated(config, uri, content=content))
    return files


def commands_page() -> str:
    """Every subcommand with its options, as its --help prints them."""
    parts = [
        "# Which commands are there, and what do they take?\n",
        "`lowra COMMAND --help` prints the same. Every command takes `--json`, which prints one machine-readable "
        "object as the last line, and ends with status 2 and one sentence where its input cannot be used.\n",
    ]
    for name, parser in _subcommands(build_parser()):
        parts += [f"## lowra {name}\n", f"{_plain(parser.description or '')}\n", f"```text\n{_usage(parser)}\n```\n"]
        arguments = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
        if arguments:
            parts += ["| argument | what it is | default |\n|---|---|---|"]
            parts += [
                f"| {_names(action)} | {_plain(action.help or '')} | {_default(action)} |" for action in arguments
            ]
            parts += [""]
    return "\n".join(parts)


def recipes_page() -> str:
    """Every field of a recipe, in the words of `Recipe`'s docstring, with type and default."""
    told: dict[str, str] = {}
    attributes = textwrap.dedent((Recipe.__doc__ or "").split("Attributes:\n")[1])
    for names, text in re.findall(r"^([a-z][\w, ]*): (.*(?:\n {4}.*)*)", attributes, flags=re.MULTILINE):
        for name in names.split(", "):
            told[name] = " ".join(text.split())
    hints = typing.get_type_hints(Recipe)
    rows = []
    for field in dataclasses.fields(Recipe):
        if field.name == "given":
            continue
        default = "required"
        if field.default_factory is not dataclasses.MISSING:
            default = f"`{field.default_factory()}`"
        elif field.default is not dataclasses.MISSING:
            default = "`" + json.dumps(field.default).strip('"') + "`"
        rows.append(f"| `{field.name}` | {_kind(hints[field.name])} | {default} | {_plain(told[field.name])} |")
    head = (
        "# What can stand in a recipe?\n\n`lowra finetune RECIPE.yaml [key=value ...]` reads a flat YAML file; each "
        "field can be set on the command line as well. A field that is not in this table is refused with the nearest "
        "name, before anything runs.\n\n| field | type | default | what it is |\n|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def _subcommands(parser: argparse.ArgumentParser, prefix: str = "") -> list[tuple[str, argparse.ArgumentParser]]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                deeper = _subcommands(sub, f"{prefix}{name} ")
                found += deeper or [(f"{prefix}{name}", sub)]
    return found


def _usage(parser: argparse.ArgumentParser) -> str:
    return " ".join(parser.format_usage().removeprefix("usage: ").split())


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    return ", ".join(f"`{option}`" for option in action.option_strings)


def _default(action: argparse.Action) -> str:
    if action.default in (None, False, argparse.SUPPRESS) or not action.option_strings:
        return ""
    return f"`{action.default}`"


def _plain(text: str) -> str:
    """One line of text that is safe in a cell of a table."""
    return " ".join(text.replace("%%", "%").replace("|", "\\|").split())


def _kind(hint: object) -> str:
    """A type as a user of YAML would say it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if type(None) in arguments:
        return " or ".join([_kind(one) for one in arguments if one is not type(None)] + ["null"])
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "mapping", list: "list"}
    return names.get(hint if isinstance(hint, type) else typing.get_origin(hint), str(hint))
