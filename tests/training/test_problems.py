"""What is wrong with a run is said all at once, before anything is read, fetched or written."""

import dataclasses
import json

import pytest

from lowra.commands import main
from lowra.training.recipe import Recipe

ALL = {
    "learning_rat=3": "no key 'learning_rat'. Did you mean 'learning_rate'?",
    "rank=0": "rank must be positive",
    "alpha=1e30": "alpha must be positive and at most 1e+06",
    "batch_size=many": "batch_size must be of type int",
    "task=talk": "task must be one of",
    "model=": "names no model",
}
STARTING = {
    "model=./nowhere": "./nowhere is not a folder",
    "train_file=no.jsonl": "There is no data file no.jsonl (train_file)",
    "chat_template=no.jinja": "There is no chat template no.jinja (chat_template)",
    "optimizer=adam_fo": "optimizer=adam_fo is none of",
    "num_beams=3": "num_beams=3 has no effect",
    "output=taken": "taken exists and is a file",
}


@pytest.mark.parametrize("mistakes", [ALL, STARTING], ids=["recipe", "start"])
def test_all_problems_come_at_once(tmp_path, monkeypatch, capsys, mistakes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    assert main(["finetune", "8gb-chat", *mistakes]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"has {len(mistakes)} problems: (1) " in said[0]
    for problem in mistakes.values():
        assert problem in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("mistake", ALL)
def test_one_problem_is_said_as_it_is(mistake):
    content = {"model": "some/model", "train_file": "x"} | dict([mistake.split("=")])
    with pytest.raises(ValueError, match="^(?!.*problems)"):
        Recipe.from_dict({key: value or None for key, value in content.items()})


def test_several_contradictions_come_at_once():
    with pytest.raises(ValueError, match=r"has 2 problems: \(1\) The recipe names no data.*\(2\) target_modules"):
        Recipe(model="some/model", target_modules=[])


def test_what_an_override_takes_the_place_of_goes_without_a_word(tmp_path, caplog, tiny_llama):
    from lowra.training.recipe import load_recipe
    from lowra.training.settled import without_idle_fields
    from lowra_command.recipe_files import find_recipe

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "words"}))
    recipe = load_recipe(find_recipe("8gb-chat"), [f"train_file={rows}", f"model={tiny_llama}", "max_steps=1"])
    without_idle_fields(recipe)
    assert "no effect" not in caplog.text


def test_nothing_is_promised_before_the_data_are_known(tmp_path, capsys, tiny_llama):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": null}\n', encoding="utf-8")
    data = [f"{name}_file={tmp_path / 'rows.jsonl'}" for name in ("train", "validation")]
    command = ["finetune", "wikitext2", f"model={tiny_llama}", *data, f"output={tmp_path / 'run'}", "save_steps=5"]
    assert main([*command, "block_size=64", "bf16=false"]) == 2
    shown = capsys.readouterr()
    assert "line 2 has no text" in shown.err and "checkpoint" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("every", "steps", "promised"),
    [
        (25, 10, "A checkpoint after the last step, 10, and none before it (save_steps=25), in "),
        (10, 10, "A checkpoint after the last step, 10, and none before it (save_steps=10), in "),
        (4, 10, "A checkpoint every 4 steps and after step 10, the last, in "),
        (3, 6, "A checkpoint every 3 steps, in "),
        (1, 1, "A checkpoint after the last step, 1, and none before it (save_steps=1), in "),
    ],
)
def test_what_is_promised_is_what_the_trainer_writes(tmp_path, capsys, monkeypatch, tiny_llama, every, steps, promised):
    def run(recipe, progress, at_start):
        at_start(steps)
        raise ValueError("enough")

    monkeypatch.setattr("lowra.commands.finetune.finetune", run)
    (tmp_path / "rows.jsonl").write_text('{"text": "words"}\n', encoding="utf-8")
    data = [f"{name}_file={tmp_path / 'rows.jsonl'}" for name in ("train", "validation")]
    main(["finetune", "wikitext2", f"model={tiny_llama}", *data, f"output={tmp_path / 'run'}", f"save_steps={every}"])
    assert promised in capsys.readouterr().out


def test_the_steps_promised_are_those_that_are_trained(recipe):
    from lowra.training.finetune import finetune

    promised = []
    run = dataclasses.replace(recipe, max_steps=None, epochs=0.5, accumulation=4, save_steps=3)
    assert finetune(run, False, promised.append)["steps"] == promised[0]
