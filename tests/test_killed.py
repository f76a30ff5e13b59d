"""Runs killed at any operation on the disk and started again: a checkpoint of one recipe, whatever lay there."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lowra import AdapterRecipe, LowRAConfig, quantize_checkpoint
from lowra.checkpoints import atomic
from lowra.commands import main
from lowra.quantization import work
from lowra.quantization.calibration import Calibration
from lowra.quantization.work import ADAPTER, LEARNED, PIECES, WorkFolder


class Killed(BaseException):
    """No error that any code would catch, as a kill is none."""


class Killer:
    """Lets the n-th operation that changes the disk, and all after it, not happen.

    Attributes:
        error: what it ends in.
        once: whether those after it happen all the same.
    """

    FUNCTIONS = ((os, ("replace", "rename", "unlink", "rmdir", "mkdir", "open")), (atomic, ("save_file",)))

    def __init__(self, monkeypatch, error=Killed, once=False):
        self.left, self.error, self.once = None, error, once
        for module, names in self.FUNCTIONS:
            for name in names if isinstance(error, OSError) or error is Killed else {"save_file"} & set(names):
                monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, function):
        def counted(*args, **kwargs):
            if self.left is not None:
                self.left -= 1
                if self.left == -1 or (self.left < 0 and not self.once):
                    raise self.error
            return function(*args, **kwargs)

        return counted

    def run(self, left, action):
        """Whether the action came to its end before it was killed."""
        self.left = left
        try:
            action()
            return True
        except Killed:
            return False
        finally:
            self.left = None


def folder_of(tmp_path):
    return WorkFolder(tmp_path / "out")


def fill(folder, recipe, count):
    with atomic.locked(folder.folder):
        folder.begin({"recipe": recipe})
        for number in range(count):
            for kind in (LEARNED, ADAPTER, PIECES):
                if not folder.has(kind, str(number)):
                    folder.save(kind, str(number), {"recipe": torch.tensor([recipe])})


def test_two_recipes_never_come_together(tmp_path, monkeypatch):
    """A run of one recipe half done, one of another killed while it clears, and any of the two or a third again."""
    killer = Killer(monkeypatch)
    fill(folder_of(tmp_path), 1, 3)
    shutil.copytree(tmp_path, tmp_path.with_name("begun"))
    ended, left = False, 0
    while not ended:
        for last in (1, 2, 3):
            shutil.rmtree(tmp_path)
            shutil.copytree(tmp_path.with_name("begun"), tmp_path)
            ended = killer.run(left, lambda: fill(folder_of(tmp_path), 2, 3))
            folder = folder_of(tmp_path)
            fill(folder, last, 3)
            for number in range(3):
                for kind in (LEARNED, ADAPTER, PIECES):
                    assert folder.has(kind, str(number))
                    assert load_file(folder.path(kind, str(number)))["recipe"].item() == last, (left, last)
        left += 1
    assert left > 40, "fewer operations than there are files: the test kills nowhere"


@pytest.mark.parametrize("last", ["first", "second"])
def test_a_checkpoint_has_one_recipe_wherever_the_second_was_killed(tiny_llama, tmp_path, monkeypatch, last):
    """The same with real pieces, killed in the middle of clearing and just after."""
    recipes = {
        "first": (LowRAConfig(bits=1.5), AdapterRecipe(4)),
        "second": (LowRAConfig(bits=2, menu=(2,)), AdapterRecipe(8)),
    }

    def run(name, output):
        quantize_checkpoint(str(tiny_llama), output, *recipes[name], device="cpu", progress=False)
        return {path.name: path.read_bytes() for path in sorted(output.rglob("*.safetensors"))}

    whole = run(last, tmp_path / "whole")
    real_remove, real_save = work._remove, work.save_json
    for kills_at in ("assemble", "adapter", "pieces", "recipe.json", "final"):
        output = tmp_path / f"killed at {kills_at}"
        with monkeypatch.context() as patch:
            patch.setattr("lowra.quantization.pipeline.assemble", lambda *args: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                run("first", output)
            if kills_at != "assemble":

                def remove(folder, kills_at=kills_at):
                    if folder.name == kills_at:
                        for path in list(folder.glob("*"))[::2]:  # half of it is gone
                            path.unlink()
                        raise Killed
                    real_remove(folder)

                def save(content, path, kills_at=kills_at):
                    if path.name == kills_at:
                        raise Killed
                    real_save(content, path)

                patch.setattr(work, "_remove", remove)
                patch.setattr(work, "save_json", save)
            with pytest.raises(Killed):
                run("second", output)
        assert run(last, output) == whole


def test_pieces_of_an_earlier_version_are_not_taken(tiny_llama, tmp_path):
    """They carry no digest. Nor is anything taken where the record of the recipe is damaged."""
    folder = folder_of(tmp_path)
    fill(folder, 1, 2)
    atomic.save_tensors({"recipe": torch.tensor([0])}, folder.path(PIECES, "0"))
    assert not folder.has(PIECES, "0") and folder.has(PIECES, "1")
    for text in ("", "{", "[]", "null", '{"recipe": 2}', "\x00"):
        fill(folder, 1, 2)
        (folder.folder / "recipe.json").write_text(text)
        with atomic.locked(folder.folder):
            folder.begin({"recipe": 1})
        assert not folder.path(PIECES, "1").exists()


@pytest.mark.parametrize("size", [0, 7, 40, -8])
def test_a_piece_that_lost_its_end_is_made_again(tmp_path, size):
    """As a disk may do it when the power fails."""
    folder = folder_of(tmp_path)
    fill(folder, 1, 1)
    path = folder.path(PIECES, "0")
    path.write_bytes(path.read_bytes()[:size])
    assert not folder.has(PIECES, "0")
    fill(folder, 1, 1)
    assert folder.has(PIECES, "0")


def test_files_of_others_are_not_cleared_away(tiny_llama, tmp_path):
    for name in ("notes.txt", "checkpoint", ".hidden"):
        (tmp_path / "out.partial").mkdir(exist_ok=True)
        (tmp_path / "out.partial" / name).touch()
        with pytest.raises(ValueError, match=f"holds {name}, which is not lowra's"):
            quantize_checkpoint(str(tiny_llama), tmp_path / "out", LowRAConfig(), device="cpu", progress=False)
        assert (tmp_path / "out.partial" / name).exists()
        (tmp_path / "out.partial" / name).unlink()


def calibration(change=lambda parts: None):
    generator = torch.Generator().manual_seed(0)
    parts = {
        "inputs": {"a": torch.rand(4, generator=generator), "b": torch.rand(4, generator=generator)},
        "gradients": {"a": torch.rand(2, generator=generator), "b": torch.rand(2, generator=generator)},
        "moments": {"a": torch.rand(4, 4, generator=generator)},
        "factors": {"b": torch.rand(4, 2, generator=generator).half()},
    }
    change(parts)
    return Calibration(**parts)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["inputs"]["a"].mul_(1.5),
        lambda parts: parts["gradients"]["b"].mul_(1.5),
        lambda parts: parts["moments"]["a"].mul_(1.5),
        lambda parts: parts["moments"].clear(),
        lambda parts: parts["factors"]["b"].mul_(1.5),
        lambda parts: parts["factors"].update(a=parts["moments"].pop("a")),
        lambda parts: parts["inputs"].update(a=parts["inputs"]["b"], b=parts["inputs"]["a"]),
        lambda parts: parts["inputs"].update(c=parts["inputs"].pop("b")),
    ],
)
def test_another_calibration_is_another_recipe(change):
    digests = [
        (found.digest(), found.digest_of_moments()) for found in (calibration(), calibration(), calibration(change))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_locks(tmp_path, monkeypatch):
    """One process at a time; on a disk that knows no locks, a warning."""
    with (
        atomic.locked(tmp_path / "folder"),
        pytest.raises(ValueError, match="Another process is writing"),
        atomic.locked(tmp_path / "folder"),
    ):
        pass
    with atomic.locked(tmp_path / "folder"):
        shutil.rmtree(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    monkeypatch.setattr("fcntl.flock", lambda *args: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with atomic.locked(tmp_path / "folder"):
        pathlib.Path(tmp_path / "folder" / "file").write_text(json.dumps(1))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        atomic.SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_operations_that_fail_end_in_one_sentence(tiny_llama, tmp_path, monkeypatch, capsys, error):
    """Whichever it is of those that `quantize` makes; and the same command goes on from there."""
    command = ["quantize", str(tiny_llama), "--bits", "1.5", "--rank", "4", "--device", "cpu", "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*.safetensors")}
    capsys.readouterr()
    killer = Killer(monkeypatch, error, once=True)
    statuses, left = [], 0
    for left in [*range(0, 16, 2), *range(16, 400, 53)]:
        status = []
        killer.run(left, lambda: status.append(main([*command, str(tmp_path / "out")])))  # noqa: B023
        statuses += status
        printed = capsys.readouterr().err
        assert status[0] in (0, 2)
        if status[0] == 2:
            assert printed.splitlines()[-1].startswith("lowra: ") and "Traceback" not in printed
            assert main([*command, str(tmp_path / "out")]) == 0
        made = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
        assert made == whole
        for folder in (tmp_path / "out", tmp_path / "out.partial"):  # the latter where it could not be removed
            shutil.rmtree(folder, ignore_errors=True)
    assert statuses.count(2) > 5


def test_a_limit_of_the_operating_system(tiny_llama, tmp_path):
    """No stand-in: files that may not grow any more, as on a full disk, while safetensors writes them."""
    script = (
        "import resource, sys; from lowra.commands import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
        "sys.exit(main(['quantize', sys.argv[2], '--output', sys.argv[3], '--device', 'cpu']))"
    )
    arguments = [sys.executable, "-c", script, "20000", str(tiny_llama), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "cannot be written: " in done.stderr and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
