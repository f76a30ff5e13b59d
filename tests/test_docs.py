"""What README and guide tell people to type exists: commands, options, fields of recipes, Python that compiles."""

import pathlib
import re
import shlex

import pytest

from lowra.training.recipe import load_recipe
from lowra_command import build_parser
from lowra_command.recipe_files import find_recipe

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _commands(page):
    for block in _blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["lowra"] and "..." not in line:
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in _commands(page):
        args = build_parser().parse_args(words)
        if words[0] == "finetune" and not args.config.isupper():
            load_recipe(find_recipe(args.config), args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_pages_compiles(page):
    for block in _blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists() or "reference/" in link, link
