"""Text to token sequences for the three tasks. Hub data sets by name; local files of the same fields in their place."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoints.dense import read_config, resolve_folder
from .recipe import Recipe

IGNORED = -100  # label that the losses of Transformers leave out
ROWS_PER_CONCATENATION = 1000  # as run_clm.py of Transformers does, and with it the paper


@dataclasses.dataclass
class TaskData:
    """Tokenised data of one task.

    Attributes:
        train, validation: examples, each a dictionary of lists of token ids (`input_ids`, `labels`).
        tokenizer: of the model.
        collate: examples to a batch of padded tensors [B, T].
        references: texts of the validation targets, for ROUGE; None for language models.
    """

    train: list[dict]
    validation: list[dict]
    tokenizer: PreTrainedTokenizerBase
    collate: Callable[[list[dict]], dict[str, torch.Tensor]]
    references: list[str] | None = None


def load_data(recipe: Recipe, progress: bool = True) -> TaskData:
    """Reads and tokenises training and validation data.

    Raises:
        FileNotFoundError, ValueError: data or tokenizer that cannot be used, or too little text for one example.
    """
    folder = resolve_folder(recipe.model)
    check_length(folder, recipe)
    tokenizer = load_tokenizer(folder, recipe.trust_remote_code)
    train, validation = _rows(recipe)
    if recipe.task == "language_modeling":
        train = text_blocks(train, tokenizer, recipe.block_size, progress)
        validation = text_blocks(validation, tokenizer, recipe.block_size, progress)
        train, validation = train[: recipe.max_train_samples], validation[: recipe.max_eval_samples]
        return TaskData(train, validation, tokenizer, Collator(tokenizer))
    train, validation = train[: recipe.max_train_samples], validation[: recipe.max_eval_samples]
    encode = _instruction if recipe.task == "instruction" else _summarization
    encoded = [[encode(row, tokenizer, recipe) for row in rows] for rows in (train, validation)]
    references = [row[recipe.target_column] for row in validation] if recipe.task == "summarization" else None
    return TaskData(*encoded, tokenizer, Collator(tokenizer), references)


def load_tokenizer(folder: pathlib.Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no tokenizer that can be read ({error}).") from error


def check_length(folder: pathlib.Path, recipe: Recipe) -> None:
    """
    Raises:
        ValueError: sequences longer than the model has positions for.
    """
    limit = getattr(read_config(folder, recipe.trust_remote_code), "max_position_embeddings", None)
    lengths = {
        "language_modeling": {"block_size": recipe.block_size},
        "instruction": {"source_length + target_length": recipe.source_length + recipe.target_length},
        "summarization": {"source_length": recipe.source_length, "target_length": recipe.target_length},
    }
    for name, length in lengths[recipe.task].items():
        if limit is not None and length > limit:
            raise ValueError(f"{name} is {length} tokens, but {folder} has {limit} positions: give at most that.")


def read_text(path: str | pathlib.Path) -> list[str]:
    """Lines of a UTF-8 text file with their ends, as the rows of WikiText on the hub carry them.

    Raises:
        FileNotFoundError, ValueError: no such file, not UTF-8, or nothing but blanks in it.
    """
    text = _read(pathlib.Path(path))
    return text.splitlines(keepends=True)


def read_json_lines(path: str | pathlib.Path, columns: list[str]) -> list[dict]:
    """Rows of a JSON-lines file, each with text in the columns.

    Raises:
        FileNotFoundError, ValueError: no such file, empty, a line that is not JSON or lacks a column.
    """
    rows = []
    for number, line in enumerate(_read(pathlib.Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        _check_columns(row, columns, f"{path}, line {number}")
        rows.append(row)
    return rows


def text_blocks(
    rows: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int, progress: bool = True
) -> list[dict]:
    """Running text in blocks of `block_size` tokens: 1,000 rows are concatenated at a time, the remainder dropped.

    Raises:
        ValueError: not enough text for one block.
    """
    blocks, longest = [], 0
    for start in tqdm(range(0, len(rows), ROWS_PER_CONCATENATION), desc="tokenising", disable=not progress):
        batch = tokenizer(rows[start : start + ROWS_PER_CONCATENATION], verbose=False)["input_ids"]
        tokens = [token for row in batch for token in row]
        longest = max(longest, len(tokens))
        for begin in range(0, len(tokens) - block_size + 1, block_size):
            block = tokens[begin : begin + block_size]
            blocks.append({"input_ids": block, "labels": list(block)})
    if not blocks:
        raise ValueError(
            f"The text has {longest} tokens per {ROWS_PER_CONCATENATION} rows, less than one block of {block_size}: "
            "give more text or a smaller block_size."
        )
    return blocks


class Collator:
    """Pads to the longest sequence of the batch, on the right: inputs with the pad token, labels with -100."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(token for token in ids if token is not None)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        inputs = [example["input_ids"] for example in examples]
        return {
            "input_ids": _padded(inputs, self.pad),
            "attention_mask": _padded([[1] * len(tokens) for tokens in inputs], 0),
            "labels": _padded([example["labels"] for example in examples], IGNORED),
        }


def _padded(sequences: list[list[int]], value: int) -> torch.Tensor:
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([sequence + [value] * (longest - len(sequence)) for sequence in sequences])


def _instruction(row: dict, tokenizer, recipe: Recipe) -> dict:
    """Source (BOS and the source column, if any) without loss, target and EOS with it; QLoRA's layout."""
    source = (tokenizer.bos_token or "") + (row[recipe.source_column] if recipe.source_column else "")
    target = row[recipe.target_column or recipe.text_column] + (tokenizer.eos_token or "")
    source = tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"][: recipe.source_length]
    target = tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"][: recipe.target_length]
    return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target}


def _summarization(row: dict, tokenizer, recipe: Recipe) -> dict:
    # Padding every source to its full length, as the paper's script does, changes the time but not the loss.
    source = tokenizer(row[recipe.source_column], truncation=True, max_length=recipe.source_length)
    target = tokenizer(text_target=row[recipe.target_column], truncation=True, max_length=recipe.target_length)
    return {"input_ids": source["input_ids"], "labels": target["input_ids"]}


def _rows(recipe: Recipe) -> tuple[list, list]:
    """Rows of training and validation, text or dictionaries by task; validation carved out where there is none."""
    if recipe.train_file:
        train = _local_rows(recipe.train_file, recipe)
        validation = _local_rows(recipe.validation_file, recipe) if recipe.validation_file else None
    else:
        train = _hub_rows(recipe, recipe.train_split)
        if recipe.validation_file:
            validation = _local_rows(recipe.validation_file, recipe)
        else:
            validation = _hub_rows(recipe, recipe.validation_split) if recipe.validation_split else None
    if validation is not None:
        return train, validation
    if recipe.carve_validation >= len(train):
        raise ValueError(
            f"The data has {len(train)} rows and no validation part, and carve_validation asks for "
            f"{recipe.carve_validation} of them: give validation_file=FILE or a smaller carve_validation."
        )
    # the permutation of datasets' train_test_split, with which QLoRA's script carves: the same rows for the same seed
    order = np.random.default_rng(recipe.data_seed).permutation(len(train))
    held_out, kept = order[: recipe.carve_validation], order[recipe.carve_validation :]
    return [train[i] for i in kept], [train[i] for i in held_out]


def _columns(recipe: Recipe) -> list[str]:
    if recipe.task == "language_modeling":
        return [recipe.text_column]
    return [c for c in (recipe.source_column, recipe.target_column or recipe.text_column) if c]


def _local_rows(path: str, recipe: Recipe) -> list:
    if recipe.task == "language_modeling" and not str(path).endswith((".json", ".jsonl")):
        return read_text(path)
    rows = read_json_lines(path, _columns(recipe))
    return [row[recipe.text_column] for row in rows] if recipe.task == "language_modeling" else rows


def _hub_rows(recipe: Recipe, split: str) -> list:
    import datasets  # slow to import, and of no use to runs on local files

    try:
        rows = datasets.load_dataset(recipe.dataset, recipe.dataset_config, split=split)
    except Exception as error:
        raise FileNotFoundError(
            f"The data set {recipe.dataset} ({recipe.dataset_config}, {split}) could not be had from the hub: {error} "
            "Give train_file=FILE and validation_file=FILE to use local files in its place."
        ) from error
    columns = _columns(recipe)
    if not len(rows):
        raise ValueError(f"The {split} split of {recipe.dataset} is empty.")
    _check_columns(rows[0], columns, f"{recipe.dataset}, {split}")
    return list(rows[recipe.text_column]) if recipe.task == "language_modeling" else list(rows)


def _check_columns(row, columns: list[str], where: str) -> None:
    for column in columns:
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{where} has no text in the field {column!r}; it has {fields}.")


def _read(path: pathlib.Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty: there is nothing to train or evaluate on.")
    return text
