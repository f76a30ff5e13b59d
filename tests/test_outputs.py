"""Places to write to: what is known of them at the start is said at the start, before any work and any trace."""

import errno
import os
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lowra import AdapterRecipe, LowRAConfig, quantize_checkpoint
from lowra.checkpoints import atomic, places
from lowra.checkpoints.atomic import save_json, save_tensors, save_text, written_beside
from lowra.checkpoints.places import new_folder, usable_file, usable_folder
from lowra.commands import main
from lowra.quantization import pipeline


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test where anything is learned."""
    monkeypatch.setattr(pipeline, "learn", lambda *args: pytest.fail("the work began"))


def quantize(model, output, bits=2):
    return quantize_checkpoint(str(model), output, LowRAConfig(bits=bits, menu=(2,)), device="cpu", progress=False)


def a_file(path):
    path.write_text("mine")


def filled(path):
    path.mkdir()
    (path / "mine").touch()


def linked(make):
    def link(path):
        make(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")

    return link


REFUSED = {
    "a file": (a_file, "out", "is a file"),
    "a folder with something in it": (filled, "out", "not empty"),
    "a link to a file": (linked(a_file), "out", "is a file"),
    "a link to a full folder": (linked(filled), "out", "not empty"),
    "a link to itself": (lambda path: path.symlink_to("out"), "out", "cannot be followed"),
    "below a file": (a_file, "out/deeper/still", "a file"),
    "a named pipe": (os.mkfifo, "out", "is a file"),
    "a name too long": (lambda path: None, "n" * 250, "too long"),
    "a name too long on the way": (lambda path: None, "n" * 300 + "/out", "too long"),
    "a path too long": (lambda path: None, "/".join(["n" * 200] * 25), "too long"),
    "a zero byte": (lambda path: None, "o\0ut", "no path"),
    "no such user": (lambda path: None, "~nobody-of-that-name/out", "home"),
    "work in the way": (lambda path: a_file(path.with_name("out.partial")), "out", "in the way"),
    "work elsewhere": (linked(lambda path: path.mkdir()), "linked", "in the way"),
    "work of others": (lambda path: filled(path.with_name("out.partial")), "out", "holds mine, which is not lowra's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_outputs_are_refused_first(tiny_llama, tmp_path, no_work, case, capsys):
    make, name, message = REFUSED[case]
    make(tmp_path / "out")
    if case == "work elsewhere":
        (tmp_path / "out").rename(tmp_path / "linked.partial")
    before = sorted(tmp_path.rglob("*"))
    output = name if name.startswith("~") else f"{tmp_path}/{name}"
    with pytest.raises((ValueError, OSError), match=message):
        quantize(tiny_llama, output)
    if "\0" not in name:  # no shell passes that on
        assert main(["quantize", str(tiny_llama), "--output", output]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("output", ["s3://bucket/out", "https://host/out", "hf://datasets/me/out"])
def test_addresses_are_no_folders(tiny_llama, tmp_path, no_work, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    for given in (output, pathlib.Path(output)):
        with pytest.raises(ValueError, match="is an address"):
            quantize(tiny_llama, given)
    assert main(["finetune", "wikitext2", f"model={tiny_llama}", f"output={output}"]) == 2
    assert "is an address" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["a\udcff", "\udce9/b", " ", "\t\n", "a\0b"])
def test_names_that_no_file_can_have_or_nobody_means(tiny_llama, tmp_path, no_work, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is no UTF-8|is no path"):
        quantize(tiny_llama, output)
    assert main(["finetune", "wikitext2", f"model={tiny_llama}", "train_file=x", f"output={output}"]) == 2
    assert "Traceback" not in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["empty", "full"])
def test_the_folder_one_is_in(tiny_llama, tmp_path, no_work, monkeypatch, where):
    if where == "full":
        (tmp_path / "mine").touch()
    monkeypatch.chdir(tmp_path)
    for output in (".", "", "../" + tmp_path.name, tmp_path):
        with pytest.raises(ValueError, match="not empty|you are in|is no path"):
            quantize(tiny_llama, output)


def test_the_model_itself_and_the_root(tiny_llama, no_work):
    for output in (tiny_llama, tiny_llama / ".", "/"):
        with pytest.raises(ValueError, match="not empty"):
            quantize(tiny_llama, output)


def test_mount_points(tiny_llama, tmp_path, no_work, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: pathlib.Path(path) == tmp_path / "out")
    with pytest.raises(ValueError, match="mount point.*give a folder in it"):
        quantize(tiny_llama, tmp_path / "out")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EPERM])
def test_folders_that_cannot_be_written(tiny_llama, tmp_path, no_work, monkeypatch, number):
    """Tried, not read off: tests may run as root, whom permission bits do not stop."""

    def refuse(prefix, dir):
        raise OSError(number, os.strerror(number), f"{dir}/{prefix}0")

    monkeypatch.setattr(places.tempfile, "mkdtemp", refuse)
    for check in (lambda output: quantize(tiny_llama, output), usable_folder, usable_file):
        with pytest.raises(OSError, match=f"out cannot be written .{os.strerror(number)} in {tmp_path}"):
            check(tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_that_may_not_be_replaced(tiny_llama, tmp_path, no_work, monkeypatch):
    """In a folder of many users, such as /tmp, it may belong to another."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "rename", lambda *args: (_ for _ in ()).throw(PermissionError(errno.EPERM, "sticky")))
    with pytest.raises(PermissionError, match="out cannot be written"):
        quantize(tiny_llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


POSSIBLE = {
    "nothing": lambda path: None,
    "an empty folder": lambda path: path.mkdir(mode=0o700),
    "a link to an empty folder": linked(lambda path: path.mkdir()),
    "a link to nothing": lambda path: path.symlink_to("elsewhere"),
}


@pytest.mark.parametrize("case", POSSIBLE)
def test_possible_outputs(tiny_llama, tmp_path, case):
    output = tmp_path / "out"
    POSSIBLE[case](output)
    was_link, mode = output.is_symlink(), output.stat().st_mode if output.is_dir() else None
    quantize(tiny_llama, output)
    assert (output / "model.safetensors").is_file() and output.is_symlink() == was_link
    assert mode is None or output.stat().st_mode == mode
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".lowra*"))


def test_home_is_what_a_tilde_stands_for(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    quantize(tiny_llama, "~/runs/packed")
    assert main(["quantize", str(tiny_llama), "--output=~/runs/again", "--device", "cpu"]) == 0
    assert sorted(path.name for path in (tmp_path / "home" / "runs").iterdir()) == ["again", "packed"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_what_came_to_be_there_meanwhile_stays(tiny_llama, tmp_path, monkeypatch):
    real = pipeline.assemble

    def meanwhile(*args):
        filled(tmp_path / "out")
        return real(*args)

    monkeypatch.setattr(pipeline, "assemble", meanwhile)
    with pytest.raises(OSError, match=r"finished and lies in .*out\.partial.final"):
        quantize(tiny_llama, tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()
    assert (tmp_path / "out.partial" / "final" / "model.safetensors").exists()


def test_failed_input_leaves_no_folders_above(tiny_llama, tmp_path):
    def calibration():
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        quantize_checkpoint(str(tiny_llama), tmp_path / "a" / "b", LowRAConfig(), calibration=calibration)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("check", [usable_folder, usable_file])
def test_places_that_are_used_as_they_are(tmp_path, check):
    filled(tmp_path / "full")
    a_file(tmp_path / "file")
    right, wrong = ("full", "file") if check is usable_folder else ("file", "full")
    for name in (right, "new", "new/deeper"):
        assert check(tmp_path / name) == tmp_path / name
    for name in (wrong, "file/deeper", "n" * 256):
        with pytest.raises((ValueError, OSError)):
            check(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


WRITERS = {
    "tensors": lambda path: save_tensors({"a": torch.ones(4)}, path),
    "text": lambda path: save_text("text", path),
    "JSON": lambda path: save_json({"a": 1}, path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_that_cannot_be_written_are_named(tmp_path, kind, monkeypatch):
    a_file(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="file/new cannot be written"):
        WRITERS[kind](tmp_path / "file" / "new")
    with pytest.raises(OSError, match="folder cannot be written"):
        WRITERS[kind](tmp_path / "folder")
    for function in ("replace",):
        for number in (errno.ENOSPC, errno.EACCES, errno.EINTR, errno.EROFS):

            def refuse(*args, number=number):
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(os, function, refuse)
            with pytest.raises(OSError, match=f"whole cannot be written: {os.strerror(number)}"):
                WRITERS[kind](tmp_path / "whole")
        monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_is_said_by_name(tmp_path, monkeypatch):
    """safetensors says it in an error of its own, which is no OSError."""

    def full(content, path, metadata):
        raise atomic.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(atomic, "save_file", full)
    with pytest.raises(OSError, match="model.safetensors cannot be written: .*No space left"):
        save_tensors({"a": torch.ones(4)}, tmp_path / "model.safetensors")


@pytest.mark.parametrize("case", [case for case in REFUSED if not case.startswith("work")])
def test_other_commands_look_at_their_outputs_first(tmp_path, capsys, case, monkeypatch):
    """The adapter, the recipe, the model they are given do not exist: were they looked at first, that would be said."""
    make, name, message = REFUSED[case]
    if "\0" in name:
        return
    make(tmp_path / "out")
    output = name if name.startswith("~") else f"{tmp_path}/{name}"
    assert main(["adapter", "quantize", str(tmp_path / "adapter"), "--output", output]) == 2
    assert message in capsys.readouterr().err.replace("cannot be made", "a file")
    if "full" in case or "something in it" in case or case == "a name too long":
        return  # as the folder of a grid or a demo that goes on, and nothing is made beside that
    words = {message, "too long", "is a file", "home", "followed"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tmp_path / 'model'}\ntrain_file: {tmp_path / 'text'}\n")
    for command in (["compare", str(recipe), "--methods", "lowra"], ["demo"]):
        assert main([*command, "--output", output]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and any(word in error for word in words)


def test_pictures(packed_folder, tmp_path, capsys):
    a_file(tmp_path / "file")
    (tmp_path / "folder.pdf").mkdir()
    for plot in ("file/inside", "file/inside.png", "folder.pdf/" + "n" * 300, "n" * 300 + ".pdf"):
        assert main(["inspect", str(packed_folder), "--plot", str(tmp_path / plot)]) == 2
        printed = capsys.readouterr()
        assert not printed.out and printed.err.count("\n") == 1


@pytest.fixture(scope="module")
def packed_folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "llama"
    quantize_checkpoint(
        str(tiny_llama), folder, LowRAConfig(bits=2, menu=(2,)), AdapterRecipe(4), device="cpu", progress=False
    )
    return folder


def test_a_folder_written_beside_gives_way_to_nothing(tmp_path):
    with pytest.raises(OSError, match="finished and lies in"), written_beside(tmp_path / "out") as folder:
        (folder / "file").touch()
        filled(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").symlink_to("there")
    with written_beside(tmp_path / "out") as folder:
        save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    assert (tmp_path / "there" / "a.safetensors").exists()
    assert new_folder(tmp_path / "other") == tmp_path / "other"
