"""What a user gives as text: running text or rows of JSON, told apart here for every command, and the tokenizer for it.

A file holds rows if its name says so (.jsonl, .ndjson, .json …) or, whatever its name, if most of its first lines are
JSON objects: else a renamed file would be trained on as braces and quotes.

JSON lines are read with `json` and not with `datasets`, whose reader (5.2) names no line in its errors, keeps a null or
a number as it is, turns the text "2020-01-01T00:00:00" into a date, and takes 3.7 s for 100,000 rows where this takes
0.7.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .checkpoints.places import expanded

_ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonlines", ".jl")
_TABLE_SUFFIXES = (".csv", ".tsv")
_PROBED_LINES = 20
_CONVERSATION = {"messages", "conversations", "completion"}
_OF_CONVERSATIONS = (
    " Conversations are for `lowra finetune` with task=chat (the recipe 8gb-chat); elsewhere give what is said in them "
    "as plain text."
)
_MAGIC_NUMBERS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
}
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def read_text(path: str | pathlib.Path, column: str = "text") -> list[str]:
    """Rows of running text: the lines of a text file with their ends, as the rows of WikiText on the hub carry them, or
    the column of JSON lines.

    Raises:
        FileNotFoundError, ValueError: as `read_json_lines`.
    """
    path = expanded(path)
    text = _decoded(path)
    if _holds_rows(path, text):
        return [row[column] for row in _rows(path, text, functools.partial(_checked, [column]))]
    if path.suffix.lower() in _TABLE_SUFFIXES:
        raise ValueError(f"{path} is a table: give plain text, or JSON lines with a field {column!r}.")
    # as Python's text files read line ends
    return text.replace("\r\n", "\n").replace("\r", "\n").splitlines(keepends=True)


def holds_rows(path: str | pathlib.Path) -> bool:
    """Whether a file is JSON lines, whose columns have names, rather than running text.

    Raises:
        FileNotFoundError, ValueError: as `read_json_lines`.
    """
    path = expanded(path)
    return path.suffix.lower() in _ROW_SUFFIXES or _holds_rows(path, _decoded(path))


def read_json_lines(path: str | pathlib.Path, columns: list[str]) -> list[dict]:
    """Rows of a JSON-lines file, each with text in the columns.

    Raises:
        FileNotFoundError, ValueError: no such file, empty, not UTF-8, a line that is no JSON object or lacks text in a
            column; messages about lines name the line.
    """
    return read_rows(path, functools.partial(_checked, columns))


def read_rows(path: str | pathlib.Path, read: Callable[[Any, str], Any]) -> list:
    """What `read` makes of each row of a JSON-lines file.

    Args:
        read: takes the value of a line and the place of that line, with which its errors begin.

    Raises:
        FileNotFoundError, ValueError: as `read_json_lines`, and what `read` raises.
    """
    path = expanded(path)
    return _rows(path, _decoded(path), read)


def _checked(columns: list[str], row: Any, where: str) -> dict:
    check_row(row, columns, where)
    return row


def check_row(row: Any, columns: list[str], where: str) -> None:
    """
    Raises:
        ValueError: something other than an object with text in each of the columns; `where` begins the message.
    """
    check_object(row, where, f'"{columns[0]}": "…"')
    for column in columns:
        value = row.get(column)
        if column not in row:
            advice = _OF_CONVERSATIONS if _CONVERSATION & row.keys() else ""
            raise ValueError(f"{where} has no text in the field {column!r}; it has {', '.join(row)}.{advice}")
        if not isinstance(value, str):
            raise ValueError(f"{where} has no text in the field {column!r}: it is {_kind(value)}.")
        check_unrepeated(row, column, where)
        check_characters(value, f"{where} has {{!r}} in the field {column!r}")


def check_object(row: Any, where: str, example: str) -> None:
    """Raises ValueError where a row is something other than an object."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {_kind(row)}; expected a JSON object such as {{{example}}}.")


def check_unrepeated(row: dict, column: str, where: str) -> None:
    """Raises ValueError where a row of JSON names a field more than once."""
    if isinstance(row, _RepeatedKeys) and column in row.repeated:
        raise ValueError(f"{where} has the field {column!r} twice: which of them is meant?")


def check_characters(text: str, message: str) -> None:
    """
    Args:
        message: how an error begins, with a place for the character.

    Raises:
        ValueError: half of a surrogate pair, as in "\\ud800" of JSON or a byte of a command line that is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = message.format(text[error.start])
        raise ValueError(f"{found}, half of a surrogate pair, which is no character: remove it.") from None


def load_tokenizer(folder: str | pathlib.Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust half of tokenizers raises plain exceptions for a damaged file
        raise ValueError(f"{folder} has no tokenizer that can be read ({_one_line(error)}).") from error


def check_token_ids(ids: set[int], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, use: str) -> None:
    """
    Args:
        ids: tokens that a model is to be given.
        config: of the model.
        use: where they come from, such as "the training data".

    Raises:
        ValueError: the model has no embedding for one of them; on a GPU that would end in a failed assertion.
    """
    count = getattr(config.get_text_config(), "vocab_size", None)
    if count is not None and ids and max(ids) >= count:
        raise ValueError(
            f"The tokenizer has {tokenizer.convert_ids_to_tokens(max(ids))!r} as number {max(ids)} in {use}, but the "
            f"model has embeddings for {count} tokens: enlarge them (resize_token_embeddings) or use the model's own "
            "tokenizer."
        )


def _rows(path: pathlib.Path, text: str, read: Callable[[Any, str], Any]) -> list:
    rows: list = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            if not rows and _is_one_value(text):
                raise ValueError(
                    f"{where} begins a JSON value over several lines: expected JSON lines, an object on each line."
                ) from None
            raise ValueError(f"{where} is not JSON: {_one_line(error)}") from error
        rows.append(read(row, where))
    return rows


def _holds_rows(path: pathlib.Path, text: str) -> bool:
    """Whether a file is JSON lines, or meant as such, rather than running text."""
    if path.suffix.lower() in _ROW_SUFFIXES or _is_one_value(text):
        return True
    lines = [line for line in text[: 1 << 20].split("\n") if line.strip()][:_PROBED_LINES]
    return 2 * sum(_is_object(line) for line in lines) > len(lines)


def _is_one_value(text: str) -> bool:
    """Whether a whole text is one JSON object, or one list of them."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")) and not (text.startswith("[") and text.endswith("]")):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or bool(value) and all(isinstance(item, dict) for item in value)


def _is_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class _RepeatedKeys(dict):
    """An object that names a key more than once, of which `json` would keep the last in silence."""

    repeated: frozenset[str]


def _object(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    keys = [key for key, _ in pairs]
    repeating = _RepeatedKeys(row)
    repeating.repeated = frozenset(key for key in row if keys.count(key) > 1)
    return repeating


def _decoded(path: pathlib.Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark.

    Raises:
        FileNotFoundError, ValueError: no such file, not text, not UTF-8, or nothing but blanks in it.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a text file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}: it is not there, or it is not a text file.")
    try:
        content = path.read_bytes()
    except OSError as error:  # of a disk, which says no name
        raise OSError(f"{path} cannot be read: {error.strerror or error}.") from error
    for magic, name in _MAGIC_NUMBERS.items():
        if content.startswith(magic):
            raise ValueError(f"{path} is a {name} file: unpack it, expected UTF-8 text or JSON lines.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {_place_of(content, error)}. Convert it to UTF-8.") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path} is not text: there is a zero byte in line {line} (UTF-16? Convert it to UTF-8).")
    if not text.strip():
        raise ValueError(f"{path} is empty: there is nothing to train or evaluate on.")
    return text


def _place_of(content: bytes, error: UnicodeDecodeError) -> str:
    start = error.start + (len(content) - len(error.object))  # a byte-order mark is cut off before
    line = content.count(b"\n", 0, start) + 1
    return f"0x{content[start]:02x} in line {line}"


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
