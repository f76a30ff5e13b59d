"""Whatever lies where a file should be: one sentence that names it, and never a hang."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from lowra.checkpoints.dense import safetensors_files
from lowra.checkpoints.guarded import check_file, open_tensors, read_json, read_tensors, read_text
from lowra.checkpoints.reading import stored_tensors


def header(text: bytes):
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


def linked(target):
    return lambda path: path.symlink_to(target)


NO_FILE = {
    "nothing": (lambda path: None, FileNotFoundError, "does not exist"),
    "a folder": (lambda path: path.mkdir(), OSError, "is a folder"),
    "a named pipe": (os.mkfifo, OSError, "is a named pipe"),
    "a device": (linked("/dev/zero"), OSError, "is a device"),
    "a link to nothing": (linked("gone"), FileNotFoundError, r"does not exist \(it is a link to nothing"),
    "a link to itself": (linked("file"), OSError, "cannot be had"),
}


@pytest.mark.parametrize("case", NO_FILE)
@pytest.mark.parametrize("reader", [read_json, read_text, read_tensors, check_file])
def test_what_is_no_file_is_named(tmp_path, case, reader):
    make, kind, message = NO_FILE[case]
    make(tmp_path / "file")
    with pytest.raises(kind, match=f"{tmp_path / 'file'} {message}.*; expected a cake"):
        reader(tmp_path / "file", "a cake")


def test_a_file_in_a_file_and_a_name_too_long(tmp_path):
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "file" / "inside", tmp_path / ("n" * 300)):
        with pytest.raises(OSError, match="cannot be had|does not exist"):
            read_json(path, "a cake")


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("{}")
    monkeypatch.setattr(os, "access", lambda *args: False)  # tests may run as root, who may read anything
    with pytest.raises(PermissionError, match="may not be read"):
        read_json(tmp_path / "file", "a cake")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ("\ufeff{}".encode(), "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "JSON list"),
        (b"null", "JSON NoneType"),
        (b'"text"', "JSON str"),
        (b"true", "JSON bool"),
        (b"NaN", "JSON float"),
        (b'{"bits": 1, "bits": 2}', "'bits' twice"),
        (b'{"a": {"b": [], "b": {}}}', "'b' twice"),
    ],
)
def test_damaged_json_is_named(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"file is damaged .*{message}.*expected a cake"):
        read_json(tmp_path / "file", "a cake")


def test_a_key_given_twice_with_one_value_does_no_harm(tmp_path):
    (tmp_path / "file").write_text('{"a": [1], "a": [1]}')
    assert read_json(tmp_path / "file", "a cake") == {"a": [1]}


DAMAGED = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"1234567"),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "nested header": header(b'{"a":' * 100_000),
    "list": header(b"[]"),
    "another type": header(b'{"a":{"dtype":"F33","shape":[16],"data_offsets":[0,64]}}'),
    "beyond the end": header(b'{"a":{"dtype":"F32","shape":[17],"data_offsets":[0,68]}}'),
    "negative": header(b'{"a":{"dtype":"F32","shape":[-16],"data_offsets":[0,64]}}'),
    "overflow": header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,64]}}'),
    "header beyond the end": lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("reader", [read_tensors, lambda path, what: stored_tensors(path)])
def test_damaged_safetensors_are_named(tmp_path, case, reader):
    DAMAGED[case](tmp_path / "file")
    with pytest.raises(ValueError, match=f"{tmp_path / 'file'} cannot be read as safetensors .* cut short or damaged"):
        reader(tmp_path / "file", "a cake")


def test_tensors_are_checked_when_they_are_taken_too(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "file")
    with (
        pytest.raises(ValueError, match="cannot be read as safetensors"),
        open_tensors(tmp_path / "file", "a cake") as content,
    ):
        content.get_tensor("b")


SHARDS = [
    {},
    None,
    [],
    "model.safetensors",
    {"a": None},
    {"a": 1},
    {"a": ["model-1.safetensors"]},
    {"a": {"b": "model-1.safetensors"}},
    {"a": "../model-1.safetensors"},
    {"a": "sub/../../model-1.safetensors"},
    {"a": "/model-1.safetensors"},
    {"a": ""},
    {"a": "."},
    {"a": "model\x00.safetensors"},
    {"a": "pytorch_model.bin"},
    {"a": "model-1.safetensors", "b": None},
]


@pytest.mark.parametrize("shards", SHARDS, ids=[re.sub(r"\W+", " ", str(shards)) for shards in SHARDS])
def test_indexes_that_name_no_files_beside_them(tmp_path, shards):
    (tmp_path / "model").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "model" / "model-1.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match="model.safetensors.index.json is damaged .*weight_map"):
        safetensors_files(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
@pytest.mark.parametrize(("make", "message"), [(os.mkfifo, "named pipe"), (os.mkdir, "a folder")])
def test_weights_that_are_no_files(tmp_path, name, make, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    make(tmp_path / name)
    with pytest.raises(OSError, match=message):
        safetensors_files(tmp_path)
