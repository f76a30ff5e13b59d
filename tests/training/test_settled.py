"""Overrides either have an effect or are refused, and the record says what was used."""

import dataclasses
import json
import re
import typing

import pytest
import yaml

from lowra.commands import main
from lowra.training import Recipe, finetune, load_recipe
from lowra.training.grid import plan_grid
from lowra.training.settled import settle, used


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    """2 bits, rank 8, alpha 16, LoftQ."""
    output = tmp_path_factory.mktemp("settled") / "packed"
    assert main(["quantize", str(tiny_llama), "--rank", "8", "--alpha", "16", "--output", str(output)]) == 0
    return output


@pytest.fixture
def config(recipe, packed, tmp_path):
    """A recipe for dense models, with a model that is packed."""
    content = {**recipe.to_dict(), "model": str(packed), "rank": 64, "alpha": None, "bits": 1.5, "max_steps": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "overrides",
    [
        ["rank=32", "bits=4"],
        ["rank=4"],
        ["bits=1.5"],
        ["alpha=8"],
        ["init_steps=5"],
        ["method=loftq"],
        ["method=qlora"],
        ["method=lora16"],
        ["quantization.sensitivity=none"],
        ["quantization.menu=[2,4]"],
        ["quantization={refine: 2}"],
        ["quantization.group_size=32"],
        ["tables_learning_rate=1e-3"],
        ["source_length=5"],
        ["num_beams=4"],
        ["dataset=wikitext"],
        ["validation_split=test"],
        ["carve_validation=5"],
        ["data_seed=3"],
        ["epochs=3"],
        ["scheduler=constant", "warmup_ratio=0.1"],
        ["eval_steps=1", "eval_epochs=true"],
    ],
)
def test_an_override_without_effect_is_refused_before_anything_is_written(config, recipe, capsys, overrides):
    import pathlib

    assert main(["finetune", config, *overrides]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lowra: ")
    assert any(part in message for entry in overrides for part in re.findall(r"[a-z_]+", entry))
    assert "effect" in message
    assert not pathlib.Path(recipe.output).exists()


def test_what_agrees_is_taken_and_the_record_says_what_was_used(config, recipe, packed):
    overrides = ["rank=8", "bits=2", "alpha=16", "method=lowra", "quantization.sensitivity=layer", "dropout=0.1"]
    result = finetune(load_recipe(config, overrides), progress=False)
    recorded = result["recipe"]
    assert (recorded["bits"], recorded["rank"], recorded["alpha"], recorded["method"]) == (2, 8, 16, "lowra")
    assert (result["bits"], result["rank"], result["nominal_bits"]) == (2, 8, pytest.approx(2, rel=1e-3))
    assert recorded["dropout"] == 0.1
    assert not {"epochs", "source_length", "dataset", "tables_learning_rate"} & set(recorded)
    again = settle(Recipe.from_dict(recorded))
    assert used(again) == recorded


def test_a_file_gives_way_to_the_base_and_the_record_shows_it(config, caplog):
    with caplog.at_level("WARNING", logger="lowra"):
        result = finetune(load_recipe(config), progress=False)
    assert (result["recipe"]["bits"], result["recipe"]["rank"], result["recipe"]["alpha"]) == (2, 8, 16)
    assert (result["bits"], result["rank"]) == (2, 8)
    assert "has 2 bits; the recipe's 1.5 bits are not used" in caplog.text
    assert "has rank 8; the recipe's rank of 64 is not used" in caplog.text


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ([], "lowra"),
        (["--codebook", "normal_float", "--assigner", "layer_order"], "loftq"),
        (["--codebook", "normal_float", "--assigner", "layer_order", "--init", "lora"], "qlora"),
        (["--codebook", "normal_float", "--assigner", "layer_order", "--init", "pissa"], "pissa"),
        (["--codebook", "normal_float"], "assigner_only"),
    ],
)
def test_the_method_recorded_is_that_of_the_base(recipe, tiny_llama, tmp_path, options, method):
    packed = tmp_path / "packed"
    assert main(["quantize", str(tiny_llama), "--rank", "4", *options, "--output", str(packed)]) == 0
    assert settle(dataclasses.replace(recipe, model=str(packed))).method == method
    given = dataclasses.replace(recipe, model=str(packed), method=method, given=frozenset({"method"}))
    assert settle(given).method == method


def test_a_packed_base_without_adapter_takes_the_rank(recipe, tiny_llama, tmp_path):
    packed = tmp_path / "packed"
    assert main(["quantize", str(tiny_llama), "--output", str(packed)]) == 0
    recipe = dataclasses.replace(recipe, model=str(packed), rank=3, alpha=6.0, given=frozenset({"rank", "alpha"}))
    settled = settle(recipe)
    assert (settled.rank, settled.alpha) == (3, 6)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        (dict(method="qlora", init_steps=2), "init_steps"),
        (dict(method="lora16", bits=2.0), "bits"),
        (dict(method="hqq", init_steps=2), "init_steps"),
        (dict(task="instruction", block_size=64), "block_size"),
        (dict(task="instruction", target_column="a", text_column="b"), "text_column"),
    ],
)
def test_dense_bases_have_idle_fields_too(recipe, changes, given):
    with pytest.raises(ValueError, match=f"{given}=.* has no effect"):
        settle(dataclasses.replace(recipe, **changes, given=frozenset({given})))
    assert settle(dataclasses.replace(recipe, **changes))


@pytest.mark.parametrize(
    ("overrides", "methods", "message"),
    [
        (["bits=4"], ["lowra"], "bits has no effect in a grid"),
        (["output=x"], ["lowra"], "output has no effect in a grid"),
        (["epochs=2"], ["lowra"], "epochs=2.0 has no effect"),
        ([], ["lowra:block_size=16"], "block_size is the same for all of a grid"),
        ([], ["lowra:train_file=x.txt"], "train_file is the same"),
        ([], ["lowra:bits=1.5"], "bits is given twice"),
        ([], ["qlora:init_steps=3"], "init_steps=3 has no effect"),
    ],
)
def test_grids(recipe, overrides, methods, message):
    with pytest.raises(ValueError, match=message):
        plan_grid(recipe.changed(overrides), methods, [2], [0])


def test_a_grid_over_a_packed_base_has_its_method_and_bits_only(recipe, packed):
    recipe = dataclasses.replace(recipe, model=str(packed))
    cells = plan_grid(recipe, ["lowra"], [2], [0, 1])
    assert [cell.recipe.rank for cell in cells] == [8, 8]
    for methods, bits in ((["lowra"], [1.5]), (["loftq"], [2]), (["lora16"], [])):
        with pytest.raises(ValueError, match="packed already"):
            plan_grid(recipe, methods, bits, [0])
    assert plan_grid(recipe.changed(["init_steps=3"]), ["lowra"], [2], [0])


def test_a_folder_at_home_is_one_place(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    finetune(dataclasses.replace(recipe, output="~/runs", max_steps=1), progress=False)
    assert {path.name for path in (tmp_path / "runs").iterdir()} > {"base", "adapter", "metrics.json"}
    assert not (tmp_path / "~").exists()
    assert json.loads((tmp_path / "runs" / "metrics.json").read_text())["recipe"]["output"] == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=*best", "is not readable as YAML: found undefined alias"),
        ("output=!!python/name:os.system", "is not readable as YAML"),
        ("output={a: 1, a: 2}", "the key 'a' stands twice"),
        ("output=" + "[" * 4000, "nested too deeply"),
        ("output=2026-13-45", "month must be in"),
        ("output=\t-", "is not readable as YAML"),
        ("output=", "output must be of type str; got None"),
        ("output=''", "output must be a name or left out"),
        ("output=~nobody-here/x", "a user's home that does not exist"),
        ("output=2026-01-01", "output must be of type str"),
        ("output=no", "output must be of type str; got False"),
        ("bits=.nan", "bits must be a finite number"),
        ("alpha=.inf", "alpha must be a finite number"),
        ("learning_rate=nan", "learning_rate must be a finite number"),
        ("rank=true", "rank must be of type int; got True"),
        ("bf16=1", "bf16 must be of type bool"),
        ("seed=-1", r"seed must be in \[0, 4294967296\)"),
        ("carve_validation=-5", "carve_validation must be positive"),
        ("weight_decay=-0.1", "weight_decay must be positive or 0"),
        ("beta2=1", r"beta2 must be in \[0, 1\)"),
        ("workers=-1", "workers must be positive or 0"),
        ("block_size=1", "block_size must be at least 2"),
        ("quantization=3", "quantization must be of type dict"),
        ("quantization=[1]", "quantization must be of type dict"),
        ("quantization.menu=&x [*x]", "cannot hold"),
        ("quantization.base=2026-01-01", "cannot hold"),
        ("given=rank", "The recipe has no key 'given'"),
        ("task=[instruction]", "task must be one of"),
    ],
)
def test_odd_values(override, message, recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    with pytest.raises(ValueError, match=message) as raised:
        load_recipe(tmp_path / "recipe.yaml", [override])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 900


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rank: 8\nrank: 16\n", "the key 'rank' stands twice"),
        (b"rank: \xe9\n", "is not UTF-8"),
        (b"rank: 8\0", "is not readable as YAML"),
        (b"---\nrank: 8\n---\nrank: 9\n", "is not readable as YAML"),
        (b"- rank\n", "holds no keys"),
        (b"quantization: [a]\n", "quantization must be of type dict"),
        (b"rank: 8\n1: 2\n", "has no key 1"),
    ],
)
def test_odd_files(content, message, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(raised.value)


def test_steps_of_a_file_are_not_recorded_on_a_packed_base(config, packed, caplog):
    recipe = dataclasses.replace(load_recipe(config), init_steps=3)
    with caplog.at_level("WARNING", logger="lowra"):
        settled = settle(recipe)
    assert "init_steps=3 are not taken" in caplog.text and "init_steps" not in used(settled)


def test_options_of_a_file_are_told_where_the_base_was_packed_otherwise(config, packed, caplog):
    recipe = dataclasses.replace(load_recipe(config), quantization={"budget": "true", "sensitivity": "layer"})
    with caplog.at_level("WARNING", logger="lowra"):
        settled = settle(recipe)
    assert "was packed with budget=nominal; the recipe's true is not used" in caplog.text
    assert settled.quantization == {"sensitivity": "layer"}


def test_what_a_file_says_in_vain_is_told(recipe, caplog):
    recipe = dataclasses.replace(recipe, max_steps=2, epochs=3.0, num_beams=4)
    with caplog.at_level("WARNING", logger="lowra"):
        settled = settle(recipe)
    assert "epochs=3.0 beside max_steps=2" in caplog.text and "num_beams=4 with task=" in caplog.text
    assert (settled.epochs, settled.num_beams) == (1.0, None)


def test_a_column_of_plain_text_is_refused(recipe, capsys):
    with pytest.raises(ValueError, match="text_column=body has no effect: .* is plain text"):
        finetune(recipe.changed(["text_column=body"]), progress=False)


@pytest.mark.parametrize("value", ["-1", "0", "1000000000000", "-1e30", "1e400", "9" * 400])
def test_counts_that_cannot_be_meant_are_refused(recipe, value):
    """Every whole number of a recipe; 0 where it means something."""
    counts = [name for name, kind in typing.get_type_hints(Recipe).items() if kind in (int, int | None)]
    assert {"rank", "workers", "max_steps", "seed", "num_beams"} <= set(counts)
    for name in counts:
        if value == "0" and name in ("workers", "seed", "data_seed"):
            continue
        with pytest.raises(ValueError, match=f"{name} must be") as raised:
            recipe.changed([f"{name}={value}"])
        assert len(str(raised.value)) < 400
