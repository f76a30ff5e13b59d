"""Runs killed at any point go on from the newest whole checkpoint and end as a run that was left alone."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import sys

import pytest
from safetensors.torch import load_file

from lowra.checkpoints.atomic import locked
from lowra.training import finetune
from lowra.training.whole_checkpoints import newest_whole

_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}
_action = None  # what the audit hook below calls with the number of calls so far; None while no test watches
_folder = ""
_calls = 0

# The runs to be killed are children of a process that has imported everything and computed nothing: a fork of this
# one would be without the threads that PyTorch's pools have started here.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["lowra.training"])


def _hook(event, args):
    """Hooks cannot be taken out again; this one does nothing while `_action` is None."""
    global _calls
    if _action is None or event not in _EVENTS or not str(args[0]).startswith(_folder):
        return
    if "base" in str(args[0])[len(_folder) :]:  # quantising has tests of its own
        return
    if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
        return
    _calls += 1
    _action(_calls)


sys.addaudithook(_hook)


@pytest.fixture
def watch():
    """Has a function called before each call that changes something in a folder."""

    def start(folder, action):
        global _action, _folder, _calls
        _action, _folder, _calls = action, str(folder), 0

    yield start
    start("", None)


@pytest.fixture
def saving(recipe):
    """Checkpoints after every second of six steps, tables and dropout included."""
    return dataclasses.replace(recipe, save_steps=2, dropout=0.1, tables="levels_and_scales")


def test_every_state_on_the_way_has_whole_checkpoints_only(saving, tmp_path, watch):
    checkpoints = pathlib.Path(saving.output) / "checkpoints"
    found = []

    def look(number):
        watch("", None)
        present = sorted(path.name for path in checkpoints.glob("checkpoint-*"))
        shutil.rmtree(tmp_path / "seen", ignore_errors=True)
        for name in present:  # alone, so that it is this one which is whole
            shutil.copytree(checkpoints / name, tmp_path / "seen" / name)
            assert newest_whole(tmp_path / "seen") == tmp_path / "seen" / name
            shutil.rmtree(tmp_path / "seen")
        found.append(present)
        watch(checkpoints, look)

    watch(checkpoints, look)
    finetune(saving, progress=False)
    watch("", None)
    assert len(found) > 30
    whole = [found[0]] + [now for before, now in zip(found, found[1:], strict=False) if now != before]
    assert whole[:3] == [[], ["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert all(len(state) >= 2 for state in whole[3:])  # the last but one goes after the new one has come
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 96))
def test_a_run_killed_at_any_call_ends_as_one_left_alone(saving, tmp_path, watch, at):
    _killed_and_resumed(saving, tmp_path, watch, at)


@pytest.mark.parametrize("at", [12, 24, 37, 51, 66, 82])
def test_a_killed_run_ends_as_one_left_alone(saving, tmp_path, watch, at):
    _killed_and_resumed(saving, tmp_path, watch, at)


def _run_until(saving, at):
    """A run that ends, without another word, before its call number `at` that changes its output."""
    global _action, _folder
    _action, _folder = lambda number: os._exit(9) if number == at else None, str(saving.output)
    finetune(saving, progress=False)


def _killed_and_resumed(saving, tmp_path, watch, at):
    alone = finetune(dataclasses.replace(saving, output=str(tmp_path / "alone")), progress=False)
    output = pathlib.Path(saving.output)
    child = _processes.Process(target=_run_until, args=(saving, at))
    child.start()
    child.join()
    status = child.exitcode
    assert status == (0 if (output / "metrics.json").exists() else 9)
    resumed = finetune(dataclasses.replace(saving, resume=True), progress=False)
    assert resumed["tuned"] == pytest.approx(alone["tuned"], rel=1e-6)
    assert resumed["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-6)
    losses = [[entry["loss"] for entry in run["curve"]] for run in (alone, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name in ("adapter_model.safetensors", "tables.safetensors"):
        ours, theirs = (load_file(folder / "adapter" / name) for folder in (output, tmp_path / "alone"))
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    # a run that is killed while it tries whether it may write there leaves an empty folder
    left = [path for path in output.glob(".lowra-*") if not any(path.iterdir())]
    kept = sorted(path.name for path in output.glob("*") if path.name != "base" and path not in left)
    assert kept == ["adapter", "checkpoints", "curve.json", "curve.png", "metrics.json"]
    assert len(list((output / "checkpoints").iterdir())) == 2


def test_two_runs_do_not_write_to_the_same_place(saving):
    """A run resumed while it still ran: each would take the folder in which the other was writing a checkpoint."""
    finetune(saving, progress=False)
    output = pathlib.Path(saving.output)

    def written():
        return {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}

    before = written()
    with (
        locked(output / "checkpoints"),
        pytest.raises(ValueError, match="Another process is writing to .*checkpoints: wait for it"),
    ):
        finetune(dataclasses.replace(saving, resume=True), progress=False)
    assert written() == before


def test_damaged_checkpoints_are_left_out(saving, tmp_path, caplog):
    finetune(saving, progress=False)
    checkpoints = pathlib.Path(saving.output) / "checkpoints"
    newest, before = checkpoints / "checkpoint-6", checkpoints / "checkpoint-4"
    assert newest_whole(checkpoints) == newest
    names = sorted(path.name for path in newest.iterdir())
    assert {"table_changes.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "whole.json"} < set(names)
    for name in names:
        content = (newest / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        changes = [None, b"", content[: len(content) // 2], content[:-1] if name != "trainer_state.json" else b"{}"]
        if name != "trainer_state.json":
            changes.append(bytes(flipped))
        for change in changes:
            (newest / name).unlink(missing_ok=True)
            if change is not None:
                (newest / name).write_bytes(change)
            caplog.clear()
            whole = newest_whole(checkpoints)
            if name == "whole.json" and change == content[:-1]:  # the end of its last line
                assert whole == newest
                continue
            assert whole == before, (name, change and len(change))
            assert f"{newest} is not whole" in caplog.text
        (newest / name).write_bytes(content)
    assert newest_whole(checkpoints) == newest


def test_a_damaged_checkpoint_is_replaced_and_the_run_saves_as_it_is_told_now(saving, caplog):
    finetune(saving, progress=False)
    checkpoints = pathlib.Path(saving.output) / "checkpoints"
    (checkpoints / "checkpoint-6" / "optimizer.pt").unlink()
    with caplog.at_level("WARNING", logger="lowra"):
        finetune(dataclasses.replace(saving, save_steps=5, resume=True), progress=False)
    assert "optimizer.pt is missing" in caplog.text and "Going on from" in caplog.text
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-5", "checkpoint-6"]  # and at the end
    assert newest_whole(checkpoints) == checkpoints / "checkpoint-6"


@pytest.mark.parametrize("length", [dict(max_steps=6), dict(max_steps=None, epochs=0.05)])
def test_a_finished_run_is_not_trained_further(saving, length):
    """The Trainer takes one more step from a checkpoint of the last."""
    saving = dataclasses.replace(saving, **length)
    first = finetune(saving, progress=False)
    again = finetune(dataclasses.replace(saving, resume=True), progress=False)
    assert again["steps_before"] == again["steps"]
    for name in ("tuned", "curve", "steps", "train_loss"):
        assert again[name] == first[name]
    with pytest.raises(ValueError, match="steps behind it and the recipe asks for 2"):
        finetune(dataclasses.replace(saving, resume=True, max_steps=2), progress=False)
    longer = finetune(dataclasses.replace(saving, resume=True, max_steps=7), progress=False)
    assert longer["steps"] == 7
    assert longer["tuned"] != first["tuned"]  # at the end of its schedule the run of before had a rate of 0


def test_without_a_whole_checkpoint_the_run_starts_anew(saving, caplog):
    whole = finetune(saving, progress=False)
    for path in (pathlib.Path(saving.output) / "checkpoints").glob("*/trainer_state.json"):
        path.write_text(path.read_text()[:-30])
    with caplog.at_level("WARNING", logger="lowra"):
        again = finetune(dataclasses.replace(saving, resume=True), progress=False)
    assert "there is no whole checkpoint" in caplog.text
    assert json.dumps(again["curve"][-1]["loss"]) == json.dumps(whole["curve"][-1]["loss"])


@pytest.mark.parametrize("group_by_length", [True, False])
def test_a_run_resumed_in_a_later_epoch_sees_the_rows_that_are_left(saving, group_by_length):
    """Four steps an epoch: the second is drawn anew, and its rest is what had not come yet."""
    run = dataclasses.replace(
        saving, max_steps=8, max_train_samples=16, group_by_length=group_by_length, tables="frozen", dropout=0.0
    )
    alone = finetune(run, progress=False)
    output = pathlib.Path(run.output)
    shutil.rmtree(output / "checkpoints" / "checkpoint-8")
    (output / "metrics.json").unlink()
    resumed = finetune(dataclasses.replace(run, resume=True), progress=False)
    assert [e["loss"] for e in resumed["curve"]] == pytest.approx([e["loss"] for e in alone["curve"]], rel=1e-6)
