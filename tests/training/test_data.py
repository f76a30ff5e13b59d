"""Blocks, instruction rows and summarisation rows; refusals of data that cannot be used."""

import dataclasses

import pytest
import torch

from lowra.training.data import IGNORED, Collator, load_data, load_tokenizer, read_json_lines, read_text, text_blocks


def test_blocks_are_the_running_text_of_a_thousand_rows_without_its_remainder(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    rows = [f"row number {i}\n" for i in range(1500)]
    blocks = text_blocks(rows, tokenizer, 64, progress=False)
    halves = ["".join(rows[:1000]), "".join(rows[1000:])]  # one token a byte
    assert len(blocks) == sum(len(half) // 64 for half in halves)
    assert tokenizer.decode(blocks[0]["input_ids"]) == halves[0][:64]
    assert tokenizer.decode(blocks[len(halves[0]) // 64]["input_ids"]) == halves[1][:64]
    assert blocks[0]["labels"] == blocks[0]["input_ids"]


def test_instruction_rows_have_loss_on_the_target_alone(recipe, json_files):
    recipe = dataclasses.replace(
        recipe,
        task="instruction",
        train_file=str(json_files / "train.jsonl"),
        validation_file=None,
        carve_validation=5,
        source_column="document",
        target_column="summary",
        source_length=4,
        target_length=6,
        max_eval_samples=None,
    )
    data = load_data(recipe, progress=False)
    assert (len(data.train), len(data.validation)) == (19, 5)
    example = data.train[0]
    assert len(example["input_ids"]) == 10  # both parts are cut
    assert example["labels"][:4] == [IGNORED] * 4
    assert example["labels"][4:] == example["input_ids"][4:]
    again = load_data(recipe, progress=False)
    assert again.validation == data.validation  # the carved rows depend on data_seed alone
    assert load_data(dataclasses.replace(recipe, data_seed=1), progress=False).validation != data.validation


def test_validation_is_carved_as_datasets_carves_it(recipe, json_files):
    from datasets import Dataset

    path = str(json_files / "train.jsonl")
    rows = read_json_lines(path, ["text"])
    split = Dataset.from_list(rows).train_test_split(test_size=5, shuffle=True, seed=42)
    carved = dataclasses.replace(recipe, task="instruction", train_file=path, validation_file=None, carve_validation=5)
    data = load_data(dataclasses.replace(carved, max_eval_samples=None), progress=False)
    tokenizer = data.tokenizer
    for examples, expected in ((data.train, split["train"]), (data.validation, split["test"])):
        texts = [tokenizer.decode(example["input_ids"]) for example in examples]
        assert [text[:40] for text in texts] == [row["text"][:40] for row in expected]


def test_batches_are_padded_on_the_right(tiny_llama):
    collate = Collator(load_tokenizer(tiny_llama))
    batch = collate([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[5, 6, 7], [8, IGNORED, IGNORED]]))
    assert batch["input_ids"][1, 1:].eq(collate.pad).all()


@pytest.mark.parametrize("lacks", [(), ("pad_token",), ("pad_token", "eos_token")])
def test_batches_do_not_depend_on_how_the_tokenizer_pads(tiny_llama, lacks):
    tokenizer = load_tokenizer(tiny_llama)
    examples = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    expected = Collator(tokenizer)(examples)
    tokenizer.padding_side, tokenizer.model_input_names = "left", ["input_ids", "token_type_ids"]
    for name in lacks:
        setattr(tokenizer, name, None)
    collate = Collator(tokenizer)
    batch = collate(examples)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    for key in ("attention_mask", "labels"):
        assert torch.equal(batch[key], expected[key])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, collate.pad, collate.pad]]
    assert (collate.pad, tokenizer.padding_side) == (1 if lacks == ("pad_token",) else 0, "left")


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(ValueError, match="empty.txt is empty"):
        read_text(tmp_path / "empty.txt")


def test_refused_data(recipe, tmp_path, json_files):
    bad = tmp_path / "bad.jsonl"
    cases = [
        ("{", "bad.jsonl, line 1 is not JSON"),
        ('{"document": "a"}', "has no text in the field 'text'; it has document"),
        ('{"text": 3}', "has no text in the field 'text'"),
    ]
    for content, message in cases:
        bad.write_text(content + "\n")
        with pytest.raises(ValueError, match=message):
            load_data(dataclasses.replace(recipe, task="instruction", train_file=str(bad)), progress=False)
    with pytest.raises(FileNotFoundError, match="There is no data file"):
        load_data(dataclasses.replace(recipe, train_file="nowhere.txt"), progress=False)
    with pytest.raises(ValueError, match="block_size is 4096 tokens, but .* has 128 positions"):
        load_data(dataclasses.replace(recipe, block_size=4096), progress=False)
    with pytest.raises(IsADirectoryError, match="is a folder: give a text file"):
        load_data(dataclasses.replace(recipe, train_file=str(tmp_path)), progress=False)
    short = tmp_path / "short.txt"
    short.write_text("few words\n")
    with pytest.raises(ValueError, match="The validation text has 10 tokens, less than one block of 32"):
        load_data(dataclasses.replace(recipe, validation_file=str(short)), progress=False)
    rows = str(json_files / "train.jsonl")
    with pytest.raises(ValueError, match="carve_validation asks for 1024"):
        load_data(
            dataclasses.replace(recipe, task="instruction", train_file=rows, validation_file=None), progress=False
        )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_text(tmp_path / "latin.txt")
