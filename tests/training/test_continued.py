"""A run that goes on goes on with its own recipe."""

import dataclasses
import importlib
import json

import pytest

from lowra.training import continued
from lowra.training.continued import check_continued, of_the_run
from lowra.training.recipe import Recipe
from lowra.training.settled import settle

runs = importlib.import_module("lowra.training.finetune")  # not the function of this name


@pytest.fixture
def recipe(tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text("a line of words\n" * 100)
    (tmp_path / "other.txt").write_text("another line of words\n" * 100)
    return Recipe(
        model=str(tiny_llama),
        train_file=str(tmp_path / "text.txt"),
        output=str(tmp_path / "run"),
        rank=4,
        block_size=16,
        batch_size=2,
        accumulation=1,
        carve_validation=10,
        max_steps=1,
        save_steps=1,
    )


@pytest.fixture
def begun(recipe, tmp_path, monkeypatch):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "recipe.json").write_text(json.dumps(of_the_run(settle(recipe))))
    monkeypatch.setattr(continued, "newest_whole", lambda *args, **kwargs: checkpoint)
    return dataclasses.replace(recipe, resume=True)


CHANGES = [
    {"learning_rate": 1e-5},
    {"bits": 1.5},
    {"rank": 8},
    {"seed": 5},
    {"block_size": 32},
    {"optimizer": "sgd"},
    {"scheduler": "linear"},
    {"tables": "levels"},
    {"method": "lora16"},
    {"carve_validation": 20},
    {"quantization": {"refine": 1}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_recipe_does_not_go_on(begun, tmp_path, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"goes on with the recipe of .*{name}="):
        check_continued(settle(dataclasses.replace(begun, **change)), tmp_path / "run")


def test_nor_does_one_whose_rows_came_in_another_order(begun, tmp_path):
    run = dataclasses.replace(begun, group_by_length=True)
    file = tmp_path / "run" / "checkpoints" / "checkpoint-1" / "recipe.json"
    content = of_the_run(settle(run))
    file.write_text(json.dumps(content))
    check_continued(settle(run), tmp_path / "run")
    file.write_text(json.dumps({name: value for name, value in content.items() if name != "row_order"}))
    with pytest.raises(ValueError, match="begun by a version of lowra that put rows of one length in another order"):
        check_continued(settle(run), tmp_path / "run")


def test_nor_other_data_or_another_model(begun, packed_another, tmp_path):
    for change in ({"train_file": str(tmp_path / "other.txt")}, {"model": str(packed_another)}):
        (name,) = change
        with pytest.raises(ValueError, match=f"{name}="):
            check_continued(settle(dataclasses.replace(begun, **change)), tmp_path / "run")


@pytest.fixture
def packed_another(tiny_llama, tmp_path):
    """Another model of the same shape."""
    folder = tmp_path / "another"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    "change", [{"max_steps": 9}, {"save_steps": 5}, {"batch_size": 1, "accumulation": 2}, {"bf16": False}], ids=str
)
def test_length_and_what_is_computed_at_a_time_may_change(begun, tmp_path, change):
    check_continued(settle(dataclasses.replace(begun, **change)), tmp_path / "run")


def test_the_same_by_another_path_goes_on(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_continued(settle(dataclasses.replace(begun, train_file="text.txt")), tmp_path / "run")


def test_a_whole_run_refuses_before_any_work(recipe, tmp_path, monkeypatch):
    runs.finetune(recipe, progress=False)
    kept = tmp_path / "run" / "checkpoints" / "checkpoint-1" / "recipe.json"
    assert json.loads(kept.read_text())["rank"] == 4
    monkeypatch.setattr(runs, "prepare_base", lambda *args, **kwargs: pytest.fail("the base was touched"))
    with pytest.raises(ValueError, match=r"learning_rate=1e-05 \(was 0.0003\)"):
        runs.finetune(dataclasses.replace(recipe, resume=True, max_steps=2, learning_rate=1e-5), progress=False)


def test_a_base_that_was_packed_from_another_model_is_not_taken(recipe, packed_another, tmp_path):
    """Killed before its first checkpoint, a run leaves its base alone."""
    runs.finetune(dataclasses.replace(recipe, save_steps=None), progress=False)
    with pytest.raises(ValueError, match="was made with model=.*another"):
        runs.finetune(dataclasses.replace(recipe, resume=True, model=str(packed_another)), progress=False)
