"""Text and rows as users bring them: told apart by name and content, and refused with the line that is wrong."""

import dataclasses
import json
import shutil

import pytest
from transformers import AutoConfig, AutoTokenizer

from lowra.adapters.gptq import calibration_blocks
from lowra.commands import main
from lowra.corpus import check_token_ids, load_tokenizer, read_json_lines, read_text
from lowra.quantization.calibration import calibrate
from lowra.training import Recipe
from lowra.training.data import load_data

ROWS = [{"text": "the river\n", "n": 1}, {"text": ""}, {"text": "and \N{GREEK SMALL LETTER ALPHA} house"}]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.NdJson", "a.json", "a.jsonlines", "a.txt", "a"])
@pytest.mark.parametrize("content", [LINES, "\ufeff" + LINES, "\n\n" + LINES.replace("\n", "\r\n\r\n"), LINES.rstrip()])
def test_rows_are_known_by_name_and_by_content(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read_text(tmp_path / name) == [row["text"] for row in ROWS]
    assert read_json_lines(tmp_path / name, ["text"]) == ROWS


@pytest.mark.parametrize(
    "content",
    ["[Chapter 1]\nIt {began}.\n", "{\nint main() {}\n}\n", "[1]\n[2]\n", "0\n1\n", "{}\nand {}\nor {}\n"],
)
def test_running_text_stays_text(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert "".join(read_text(tmp_path / "a.txt")) == content


def test_rows_with_a_line_that_is_none_are_not_taken_for_text(tmp_path):
    (tmp_path / "a.txt").write_text("id\n" + LINES)
    with pytest.raises(ValueError, match="a.txt, line 1 is not JSON"):
        read_text(tmp_path / "a.txt")


def test_line_ends_and_mark_of_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "a.txt") == ["one\n", "two\n", "three\n"]


GOOD = b'{"text": "fine"}\n\n'
BAD = [
    (b'{"text": null}', "line 3 has no text in the field 'text': it is null"),
    (b'{"text": 3.5}', "line 3 has no text in the field 'text': it is a number"),
    (b'{"text": true}', "it is true or false"),
    (b'{"text": ["a"]}', "it is a list"),
    (b'{"text": {"text": "a"}}', "it is an object"),
    (b'{"words": "a", "n": 1}', "line 3 has no text in the field 'text'; it has words, n"),
    (b"{}", "line 3 has no text in the field 'text'"),
    (b'{"messages": []}', "it has messages. Conversations are for `lowra finetune` with task=chat"),
    (b'{"text": "a", "text": "b"}', "line 3 has the field 'text' twice"),
    (b'{"text": "a \\ud800 b"}', r"line 3 has '\\ud800' in the field 'text', half of a surrogate pair"),
    (b'{"text": "\\udfff"}', "half of a surrogate pair"),
    (b'["a", "b"]', "line 3 is a list; expected a JSON object"),
    (b'"a"', "line 3 is text; expected a JSON object"),
    (b"null", "line 3 is null; expected a JSON object"),
    (b'{"text": "a"', "line 3 is not JSON"),
    (b'{"text": "a"} {"text": "b"}', "line 3 is not JSON"),
    (b"{'text': 'a'}", "line 3 is not JSON"),
    (b'{"text": "\xe9"}', "is not UTF-8 text: byte 0xe9 in line 3"),
    (b'{"text": "\xed\xa0\x80"}', "is not UTF-8 text: byte 0xed in line 3"),
    (b'{"text": "a\0"}', "zero byte in line 3"),
    (b"[" * 100_000, "line 3 is not JSON"),
    (b'{"text": ' + b"9" * 10_000 + b"}", "line 3 is not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[str(line[:24]) for line, _ in BAD])
def test_a_bad_row_is_refused_with_its_line(tmp_path, line, message):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "rows.jsonl").write_bytes(mark + GOOD + line + b"\n" + GOOD)
        for read in (read_text, lambda path: read_json_lines(path, ["text"])):
            with pytest.raises(ValueError, match=message) as raised:
                read(tmp_path / "rows.jsonl")
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"}]', "line 1 is a list; expected a JSON object"),
        ("a.txt", b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n', "line 1 begins a JSON value over several lines"),
        ("a.json", b'{\n  "text": "a"\n}\n', "line 1 begins a JSON value over several lines"),
        ("a.csv", b"text,n\na,1\n", "is a table"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0rest", "is a gzip file: unpack it"),
        ("a.parquet", b"PAR1rest", "is a parquet file"),
        ("a.txt", "words".encode("utf-16"), "is not UTF-8"),
        ("a.txt", "words".encode("utf-16-le"), "zero byte in line 1"),
        ("a.txt", b"caf\xe9", "byte 0xe9 in line 1"),
        ("a.jsonl", b"\xef\xbb\xbf\n \n", "is empty"),
        ("a.jsonl", b"", "is empty"),
    ],
)
def test_files_that_are_neither(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / name)


def test_all_commands_read_the_same_rows(tiny_llama, tmp_path, capsys):
    """evaluate, finetune and both calibrations, on text and on the same text as rows of another name."""
    text = [f"the wind of year {i} went over the old stone house\n" for i in range(60)]
    (tmp_path / "a.txt").write_text("".join(text))
    (tmp_path / "b.ndjson").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    tokenizer = load_tokenizer(tiny_llama)
    seen = []
    for path in (tmp_path / "a.txt", tmp_path / "b.ndjson"):
        recipe = Recipe(str(tiny_llama), train_file=str(path), validation_file=str(path), block_size=32, bits=2)
        command = ["evaluate", str(tiny_llama), "--data", str(path), "--block-size", "64", "--json"]
        assert main(command) == 0
        metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
        seen.append(
            [
                {key: value for key, value in metrics.items() if key != "data"},
                load_data(recipe, progress=False).train,
                calibration_blocks(path, tokenizer).tolist(),
                calibrate(str(tiny_llama), path, 512, "cpu", progress=False).digest(),
            ]
        )
    assert seen[0] == seen[1]


def test_empty_rows_are_left_out_with_a_count(recipe, tmp_path, caplog):
    rows = [{"text": "the river"}, {"text": ""}, {"text": ""}, {"text": "a house"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "a.jsonl")
    recipe = dataclasses.replace(recipe, task="instruction", train_file=path, validation_file=path)
    with caplog.at_level("WARNING", logger="lowra"):
        data = load_data(recipe, progress=False)
    assert len(data.train) == len(data.validation) == 2
    assert "2 of 4 training rows are empty and are left out" in caplog.text
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="None of the 1 validation rows has text"):
        load_data(dataclasses.replace(recipe, validation_file=str(tmp_path / "none.jsonl")), progress=False)


def test_an_empty_summary_is_left_out_with_its_reference(recipe, tiny_bart, tmp_path):
    rows = [{"document": "a b", "summary": "a"}, {"document": "", "summary": "b"}, {"document": "c", "summary": "d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "a.jsonl")
    columns = dict(source_column="document", target_column="summary")
    recipe = dataclasses.replace(
        recipe, model=str(tiny_bart), task="summarization", train_file=path, validation_file=path, **columns
    )
    data = load_data(recipe, progress=False)
    assert data.references == ["a", "d"] and len(data.validation) == len(data.train) == 2


@pytest.mark.parametrize("task", ["language_modeling", "instruction"])
def test_tokens_beyond_the_embeddings_are_refused_before_anything_is_written(recipe, tiny_llama, tmp_path, task):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if task == "language_modeling":  # which pads nothing: an unused token of the tokenizer is no fault
        tokenizer.add_tokens(["river"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the river and the house by the river"}) + "\n")
    path = str(tmp_path / "a.jsonl")
    recipe = dataclasses.replace(
        recipe, model=str(folder), task=task, train_file=path, validation_file=path, block_size=8
    )
    message = "'<pad>' as number 256 in the padding" if task == "instruction" else "'river' as number 257"
    with pytest.raises(ValueError, match=message):
        load_data(recipe, progress=False)
    check_token_ids({255}, AutoConfig.from_pretrained(folder), tokenizer, "a prompt")


@pytest.mark.parametrize("damage", ["absent", "truncated", "null"])
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(tiny_llama, tmp_path, damage):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    if damage == "absent":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    else:
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text[:300] if damage == "truncated" else '{"model": null}')
    with pytest.raises(ValueError, match="has no tokenizer that can be read") as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)
