"""Text that every Python installation carries: docstrings of the standard library."""

import ast
import pathlib
import sysconfig
from collections.abc import Iterator

from ..checkpoints.atomic import save_text

_MIN_DOCSTRING = 200  # characters; shorter ones are one-liners
_CHARACTERS = 250_000  # the demo's 30 steps read about 50,000
_HELD_OUT = 10  # every tenth document


def write_texts(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes docstrings, a paragraph a line, and returns the paths of `train` and `validation`.

    Which docstrings there are depends on the version of Python, so numbers differ a little between versions.
    """
    docstrings = list(_docstrings())
    texts = {
        "train": [text for number, text in enumerate(docstrings) if number % _HELD_OUT],
        "validation": docstrings[::_HELD_OUT],
    }
    paths = {name: folder / f"{name}.txt" for name in texts}
    for name, documents in texts.items():
        save_text("\n".join(_one_line_per_paragraph(document) for document in documents), paths[name])
    return paths


def _docstrings() -> Iterator[str]:
    """Docstrings of the standard library's modules in the order of their paths, up to the limit."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    size = 0
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # files that are there to be broken
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) >= _MIN_DOCSTRING:
                    yield docstring
                    size += len(docstring)
        if size > _CHARACTERS:
            return


def _one_line_per_paragraph(document: str) -> str:
    paragraphs = (" ".join(part.split()) for part in document.split("\n\n"))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)
