"""`lowra recipes`: the recipes that come with lowra."""

import argparse

from .recipe_files import find_recipe, first_line, shipped_recipes


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "recipes",
        help="list the recipes that `lowra finetune` finds by name, or print one",
        description="Lists the recipes that come with lowra, a line each. With a name it prints that recipe, to "
        "read it or to start one of your own: lowra recipes 8gb-chat > mine.yaml",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="the recipe to print")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError: no recipe of this name.
    """
    if args.name is not None:
        path = find_recipe(args.name)
        text = path.read_text(encoding="utf-8")
        print(text, end="")
        return {"name": path.stem, "text": text}
    recipes = {name: first_line(path) for name, path in shipped_recipes().items()}
    width = max(map(len, recipes))
    for name, line in recipes.items():
        print(f"{name:<{width}}  {line}")
    print("\nlowra recipes NAME prints one; lowra finetune NAME [KEY=VALUE ...] runs it.")
    return {"recipes": recipes}
