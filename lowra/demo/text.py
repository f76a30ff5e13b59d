"""Text that every Python installation carries: the language reference (for the base) and docstrings (for the task)."""

import ast
import pathlib
import sysconfig
from pydoc_data.topics import topics

from ..checkpoints.atomic import save_text

_MIN_DOCSTRING = 200  # characters; shorter ones are one-liners
_DOCSTRING_CHARACTERS = 700_000
_HELD_OUT = 10  # every tenth document


def write_texts(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes the texts, a paragraph a line, and returns their paths.

    `base`: the topics of the language reference, on which the base model is trained. `train` and `validation`:
    docstrings of the standard library, which it has never seen and is then fine-tuned on.
    """
    docstrings = _docstrings()
    texts = {
        "base": [topics[name] for name in sorted(topics)],
        "train": [text for number, text in enumerate(docstrings) if number % _HELD_OUT],
        "validation": docstrings[::_HELD_OUT],
    }
    paths = {name: folder / f"{name}.txt" for name in texts}
    for name, documents in texts.items():
        save_text("\n".join(_one_line_per_paragraph(document) for document in documents), paths[name])
    return paths


def _docstrings() -> list[str]:
    """Docstrings of the standard library's modules in the order of their paths, up to the limit."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    found, size = [], 0
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "idlelib" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # files that are there to be broken
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) >= _MIN_DOCSTRING:
                    found.append(docstring)
                    size += len(docstring)
        if size > _DOCSTRING_CHARACTERS:
            break
    return found


def _one_line_per_paragraph(document: str) -> str:
    paragraphs = (" ".join(part.split()) for part in document.split("\n\n"))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)
