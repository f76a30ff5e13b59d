"""Text to token sequences for the four tasks. Hub data sets by name; local files of the same fields in their place."""

import copy
import dataclasses
import logging
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoints.dense import read_config
from ..checkpoints.guarded import one_line
from ..checkpoints.hub import offline_without_connection, resolve_folder
from ..corpus import check_row, check_token_ids, holds_rows, load_tokenizer, read_json_lines, read_rows, read_text
from ..optional import require
from . import conversations
from .conversations import IGNORED
from .packing import collate_packed, pack
from .recipe import Recipe

logger = logging.getLogger(__name__)

ROWS_PER_CONCATENATION = 1000  # as run_clm.py of Transformers does, and with it the paper


@dataclasses.dataclass
class TaskData:
    """Tokenised data of one task.

    Attributes:
        train, validation: examples, each a dictionary of lists of token ids (`input_ids`, `labels`).
        tokenizer: of the model.
        collate: examples to a batch of padded tensors [B, T].
        references: texts of the validation targets, for ROUGE; None for other tasks.
    """

    train: list[dict]
    validation: list[dict]
    tokenizer: PreTrainedTokenizerBase
    collate: Callable[[list[dict]], dict[str, torch.Tensor]]
    references: list[str] | None = None


def load_data(recipe: Recipe, progress: bool = True) -> TaskData:
    """Reads and tokenises training and validation data.

    Rows that would leave nothing to read or to predict, as an empty text does, are left out with a warning: a batch of
    nothing but such rows has no loss, and one NaN would end up in every weight.

    Raises:
        FileNotFoundError, ValueError: data or tokenizer that cannot be used, tokens the model does not know, or too
            little text for one example.
    """
    folder = resolve_folder(recipe.model)
    config = read_config(folder, recipe.trust_remote_code)
    check_length(config, recipe)
    tokenizer = load_tokenizer(folder, recipe.trust_remote_code)
    collate = Collator(tokenizer)
    train, validation = _rows(recipe)
    if recipe.task == "language_modeling":
        train = text_blocks(train, tokenizer, recipe.block_size, progress, "The training text")
        validation = text_blocks(validation, tokenizer, recipe.block_size, progress, "The validation text")
        train, validation = train[: recipe.max_train_samples], validation[: recipe.max_eval_samples]
        data = TaskData(train, validation, tokenizer, collate)
    elif recipe.task == "chat":
        conversations.use_template(tokenizer, recipe.chat_template, recipe.model)
        check_token_ids({collate.pad}, config, tokenizer, "the padding of batches")
        train, validation = train[: recipe.max_train_samples], validation[: recipe.max_eval_samples]
        train, _ = _encoded(train, tokenizer, recipe, "training")
        validation, _ = _encoded(validation, tokenizer, recipe, "validation")
        if not conversations.learns_to_stop(train, tokenizer):
            logger.warning(
                "No turn of the assistant holds a special token such as %s: the model will not learn to stop. Let the "
                "chat template end turns with it.",
                tokenizer.eos_token,
            )
        data = TaskData(pack(train, recipe.block_size) if recipe.packing else train, validation, tokenizer, collate)
    else:
        check_token_ids({collate.pad}, config, tokenizer, "the padding of batches")
        train, validation = train[: recipe.max_train_samples], validation[: recipe.max_eval_samples]
        train, _ = _encoded(train, tokenizer, recipe, "training")
        validation, rows = _encoded(validation, tokenizer, recipe, "validation")
        references = [row[recipe.target_column] for row in rows] if recipe.task == "summarization" else None
        data = TaskData(train, validation, tokenizer, collate, references)
    for examples, use in ((data.train, "the training data"), (data.validation, "the validation data")):
        ids = {max(example[key], default=0) for example in examples for key in ("input_ids", "labels")}
        check_token_ids(ids, config, tokenizer, use)
    return data


def check_length(config: PreTrainedConfig, recipe: Recipe) -> None:
    """
    Raises:
        ValueError: sequences longer than the model has positions for.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = {
        "language_modeling": {"block_size": recipe.block_size},
        "chat": {"block_size": recipe.block_size},
        "instruction": {"source_length + target_length": recipe.source_length + recipe.target_length},
        "summarization": {"source_length": recipe.source_length, "target_length": recipe.target_length},
    }
    for name, length in lengths[recipe.task].items():
        if limit is not None and length > limit:
            raise ValueError(f"{name} is {length} tokens, but {recipe.model} has {limit} positions: give at most that.")


def text_blocks(
    rows: list[str],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    progress: bool = True,
    name: str = "The text",
) -> list[dict]:
    """Running text in blocks of `block_size` tokens: 1,000 rows are concatenated at a time, the remainder dropped.

    Args:
        name: what the message calls the text.

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
        where = f" in any {ROWS_PER_CONCATENATION} rows" if len(rows) > ROWS_PER_CONCATENATION else ""
        raise ValueError(
            f"{name} has {longest} tokens{where}, less than one block of {block_size}: give more text or a smaller "
            "block_size (--block-size of `lowra evaluate`)."
        )
    return blocks


class Collator(DataCollatorForSeq2Seq):
    """Pads to the longest sequence of the batch, on the right: inputs with the pad token, labels with -100.

    Attributes:
        pad: id of the pad token; the end of a text, or else token 0, where the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)  # that of the caller may pad on the left, to generate
        tokenizer.padding_side = "right"
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        super().__init__(tokenizer, label_pad_token_id=IGNORED)
        self.pad = tokenizer.pad_token_id

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        if "position_ids" in features[0]:
            return collate_packed(features, self.pad)
        return super().__call__(features, return_tensors)


def _encoded(rows: list, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, use: str) -> tuple[list[dict], list[dict]]:
    """Examples, and the rows they come from; without those that have nothing to read or to predict.

    Raises:
        ValueError: no row is left.
    """
    encoders: dict[str, Callable] = {"instruction": _instruction, "chat": _conversation}
    encode = encoders.get(recipe.task, _summarization)
    first = 0 if recipe.task == "summarization" else 1  # a language model does not predict its first token
    pairs = [(encode(row, tokenizer, recipe), row) for row in rows]
    pairs = [(e, row) for e, row in pairs if e["input_ids"] and any(label != IGNORED for label in e["labels"][first:])]
    if not pairs:
        why = "all are empty."
        if recipe.task == "chat":
            why = f"the assistant says nothing within block_size={recipe.block_size}; a larger one may reach its turns."
        raise ValueError(f"None of the {len(rows)} {use} rows has text to train on: {why}")
    if len(pairs) < len(rows):
        why = "say nothing within block_size" if recipe.task == "chat" else "are empty"
        logger.warning("%d of %d %s rows %s and are left out.", len(rows) - len(pairs), len(rows), use, why)
    return [example for example, _ in pairs], [row for _, row in pairs]


def _instruction(row: dict, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict:
    """Source (BOS and the source column, if any) without loss, target and EOS with it; QLoRA's layout."""
    source = (tokenizer.bos_token or "") + (row[recipe.source_column] if recipe.source_column else "")
    target = row[recipe.target_column or recipe.text_column] + (tokenizer.eos_token or "")
    source = tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"][: recipe.source_length]
    target = tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"][: recipe.target_length]
    return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target}


def _conversation(row: conversations.Conversation, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict:
    return conversations.encode(row, tokenizer, recipe.block_size)


def _summarization(row: dict, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict:
    # Padding every source to its full length, as the paper's script does, changes the time but not the loss.
    source = tokenizer(row[recipe.source_column], truncation=True, max_length=recipe.source_length)
    target = tokenizer(text_target=row[recipe.target_column], truncation=True, max_length=recipe.target_length)
    return {"input_ids": source["input_ids"], "labels": target["input_ids"]}


def _rows(recipe: Recipe) -> tuple[list, list]:
    """Rows of training and validation, text or dictionaries by task; validation carved out where there is none.

    Raises:
        ValueError: a column that was given and plain text; no rows for validation.
    """
    files = [path for path in (recipe.train_file, recipe.validation_file) if path]
    if "text_column" in recipe.given and recipe.train_file and recipe.task == "language_modeling":
        if not any(map(holds_rows, files)):
            raise ValueError(
                f"text_column={recipe.text_column} has no effect: {' and '.join(files)} is plain text, which has no "
                "columns. Leave it out."
            )
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
    if recipe.task == "language_modeling":
        return read_text(path, recipe.text_column)
    if recipe.task == "chat":
        return read_rows(path, conversations.read_row)
    return read_json_lines(path, _columns(recipe))


def _hub_rows(recipe: Recipe, split: str) -> list:
    require(f"dataset={recipe.dataset}", "datasets")
    import datasets  # slow to import, and of no use to runs on local files

    try:
        with offline_without_connection():  # or it would ask six times over half a minute
            rows = datasets.load_dataset(recipe.dataset, recipe.dataset_config, split=split)
    except Exception as error:
        raise FileNotFoundError(
            f"The data set {recipe.dataset} ({recipe.dataset_config}, {split}) could not be had from the hub: "
            f"{one_line(error).rstrip('.')}. Give train_file=FILE and validation_file=FILE to use local files in its "
            "place."
        ) from error
    columns = _columns(recipe)
    if not len(rows):
        raise ValueError(f"The {split} split of {recipe.dataset} is empty.")
    rows = list(rows)
    places = [f"{recipe.dataset}, {split}, row {number}" for number in range(1, len(rows) + 1)]
    if recipe.task == "chat":
        return [conversations.read_row(row, place) for row, place in zip(rows, places, strict=True)]
    for row, place in zip(rows, places, strict=True):
        check_row(row, columns, place)
    return [row[recipe.text_column] for row in rows] if recipe.task == "language_modeling" else rows
