"""Recipes that come with lowra: found by name, read whole, listed with a line each."""

import pytest

from lowra.commands import main
from lowra.training.recipe import load_recipe
from lowra_command.recipe_files import find_recipe, first_line, shipped_recipes


def test_every_recipe_is_found_and_can_be_read():
    recipes = shipped_recipes()
    assert list(recipes)[:2] == ["8gb-chat", "24gb-chat"]
    assert {"wikitext2", "openassistant", "xsum", "cnn_dailymail"} < set(recipes)
    for name, path in recipes.items():
        assert find_recipe(name) == find_recipe(f"{name}.yaml") == path
        assert 20 < len(first_line(path)) < 110
        assert load_recipe(path).save_steps is not None  # a crash costs minutes, not the run


def test_a_file_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xsum.yaml").write_text("model: mine\n", encoding="utf-8")
    assert find_recipe("xsum.yaml").resolve() == tmp_path / "xsum.yaml"
    assert find_recipe("xsum") == shipped_recipes()["xsum"]
    with pytest.raises(FileNotFoundError, match=r"wikitext2, xsum\). Did you mean xsum\?"):
        find_recipe("xsun")


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped_recipes()) and "lowra finetune NAME" in listed
    assert main(["recipes", "8gb-chat"]) == 0
    assert capsys.readouterr().out == shipped_recipes()["8gb-chat"].read_text(encoding="utf-8")
    assert main(["recipes", "nothing"]) == 2
    assert "8gb-chat" in capsys.readouterr().err
