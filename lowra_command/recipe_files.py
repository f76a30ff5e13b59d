"""The recipes that come with lowra: `configs/` of the repository, installed beside this file."""

import difflib
import os
import pathlib
import re

_INSTALLED = pathlib.Path(__file__).parent / "configs"
_IN_REPOSITORY = pathlib.Path(__file__).parent.parent / "configs"


def shipped_recipes() -> dict[str, pathlib.Path]:
    """Their files by name, such as "8gb-chat"."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _IN_REPOSITORY
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=_by_number)}


def find_recipe(given: str) -> pathlib.Path:
    """The file that is meant: one with this path, or else the recipe of this name, with or without .yaml.

    Raises:
        FileNotFoundError: neither.
    """
    path = pathlib.Path(os.path.expanduser(given))
    if path.is_file():
        return path
    recipes = shipped_recipes()
    name = given.removesuffix(".yaml")
    if name in recipes:
        return recipes[name]
    nearest = difflib.get_close_matches(pathlib.Path(name).name, recipes, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise FileNotFoundError(
        f"There is no recipe {given}: no such file, and none that comes with lowra ({', '.join(recipes)}).{hint}"
    )


def first_line(path: pathlib.Path) -> str:
    """What a recipe is for: the beginning of its first comment."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# "))
    return re.split(r"[.:] ", " ".join(comment), maxsplit=1)[0]


def _by_number(path: pathlib.Path) -> tuple[int, str]:
    """8gb before 24gb, names without a number behind them."""
    digits = path.stem.partition("gb-")[0]
    return (int(digits) if digits.isdigit() else 10**6, path.stem)
