"""`tables=auto`: tables are trained where the base was calibrated, and nobody is refused who did not ask for them."""

import dataclasses
import json
import pathlib

import fsdp_on_cpu
import pytest
from transformers import MixtralConfig

import lowra
from lowra.commands import main
from lowra.training import Recipe, continued, finetune
from lowra.training.continued import as_begun
from lowra.training.default_tables import pays_to_train
from lowra.training.grid import plan_grid, run_grid
from lowra.training.settled import settle, used

RECIPE = "recipe.json"  # of a checkpoint


@pytest.fixture
def on_calibrated(recipe, calibrated):
    return dataclasses.replace(recipe, model=str(calibrated))


@pytest.fixture(scope="module")
def data_free(tiny_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("data_free") / "packed"
    lowra.quantize_checkpoint(str(tiny_llama), output, lowra.LowRAConfig(), None, "cpu", False)
    return output


def test_a_calibrated_base_has_its_tables_trained(on_calibrated):
    assert on_calibrated.tables == "auto"
    settled = settle(on_calibrated.changed(["tables_learning_rate=1e-3"]))
    assert (settled.tables, settled.tables_learning_rate) == ("shared", 1e-3)
    recorded = used(settled)
    assert recorded["tables"] == "shared" and used(settle(Recipe.from_dict(recorded))) == recorded
    for tables in ("frozen", "levels", "levels_and_scales"):
        assert settle(dataclasses.replace(on_calibrated, tables=tables)).tables == tables


@pytest.mark.parametrize("change", [{}, {"method": "lora16"}, {"method": "qlora"}, {"method": "hqq"}], ids=str)
def test_a_dense_base_has_none(recipe, change):
    assert settle(dataclasses.replace(recipe, **change)).tables == "frozen"


def test_nor_has_a_base_without_calibration(recipe, data_free):
    recipe = dataclasses.replace(recipe, model=str(data_free))
    assert used(settle(recipe))["tables"] == "frozen"
    assert settle(dataclasses.replace(recipe, tables="shared")).tables == "shared"
    with pytest.raises(ValueError, match=r"tables_learning_rate=0.001 has no effect with tables=frozen"):
        settle(recipe.changed(["tables_learning_rate=1e-3"]))


def test_nor_has_a_baseline():
    packed = lowra.LowRAConfig(bits=2, calibration="a digest")
    assert pays_to_train(packed) and not pays_to_train(None) and not pays_to_train(lowra.LowRAConfig())
    assert not pays_to_train(dataclasses.replace(packed, codebook="normal_float"))


def test_nor_has_a_base_of_experts_alone(recipe, tmp_path):
    config = MixtralConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2)
    config.architectures, config.dtype = ["MixtralForCausalLM"], "bfloat16"
    for dense, tables in ((None, "shared"), (["self_attn"], "frozen")):
        packed = lowra.LowRAConfig(modules_to_not_convert=dense, calibration="a digest", nominal_bits=2, true_bits=2.3)
        config.quantization_config = packed.to_dict()
        config.save_pretrained(tmp_path / tables)
        assert settle(dataclasses.replace(recipe, model=str(tmp_path / tables))).tables == tables


def test_what_cannot_be_beside_trained_tables_leaves_them(on_calibrated, monkeypatch):
    assert settle(dataclasses.replace(on_calibrated, dora=True)).tables == "frozen"
    for name, value in fsdp_on_cpu.environment().items():
        monkeypatch.setenv(name, value)
    assert settle(on_calibrated).tables == "frozen"


def test_a_run_says_why_and_records_it(on_calibrated, calibrated, caplog, capsys):
    result = finetune(on_calibrated, progress=False)
    assert "tables=shared: the base was calibrated" in caplog.text and "tables=frozen leaves them" in caplog.text
    output = pathlib.Path(on_calibrated.output)
    assert json.loads((output / "metrics.json").read_text())["recipe"]["tables"] == "shared"
    newest = max((output / "checkpoints").glob("checkpoint-*"))
    assert json.loads((newest / RECIPE).read_text())["tables"] == "shared"
    assert (output / "adapter" / "tables.safetensors").exists()
    card = (output / "adapter" / "README.md").read_text()
    assert "| trained tables | `tables.safetensors`: levels and scales, by changes" in card
    assert result["tuned"]["perplexity"] < result["untuned"]["perplexity"]
    text = on_calibrated.validation_file
    measured = ["evaluate", str(calibrated), "--adapter", str(output / "adapter"), "--data", text, "--block-size", "32"]
    assert main([*measured, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["perplexity"] < result["untuned"]["perplexity"]


def test_a_run_that_began_before_goes_on_as_it_began(on_calibrated, caplog):
    begun = dataclasses.replace(on_calibrated, tables="frozen", max_steps=2, save_steps=1)
    finetune(begun, progress=False)
    checkpoints = [*pathlib.Path(begun.output).glob("checkpoints/checkpoint-*")]
    assert {json.loads((checkpoint / RECIPE).read_text())["tables"] for checkpoint in checkpoints} == {"frozen"}
    goes_on = dataclasses.replace(on_calibrated, resume=True, max_steps=3)
    assert as_begun(goes_on).tables == "frozen"
    result = finetune(goes_on, progress=False)
    assert (result["recipe"]["tables"], result["steps_before"], result["steps"]) == ("frozen", 2, 3)
    assert "tables=" not in caplog.text
    with pytest.raises(ValueError, match=r"tables=shared \(was frozen\)"):
        finetune(goes_on.changed(["tables=auto"]), progress=False)


@pytest.mark.parametrize(
    ("recorded", "trained", "tables"),
    [({"tables": "levels"}, True, "levels"), ({}, False, "frozen"), (None, False, "frozen"), (None, True, "auto")],
)
def test_what_a_checkpoint_says_of_its_tables(on_calibrated, tmp_path, monkeypatch, recorded, trained, tables):
    """The first versions had no tables to record, and later ones no recipe in a checkpoint."""
    if recorded is not None:
        (tmp_path / RECIPE).write_text(json.dumps(recorded))
    if trained:
        (tmp_path / "table_changes.safetensors").touch()
    monkeypatch.setattr(continued, "newest_whole", lambda *args, **kwargs: tmp_path)
    goes_on = dataclasses.replace(on_calibrated, resume=True)
    assert as_begun(goes_on).tables == tables
    assert as_begun(on_calibrated).tables == as_begun(goes_on.changed(["tables=auto"])).tables == "auto"
    assert as_begun(dataclasses.replace(goes_on, tables="shared")).tables == "shared"
    monkeypatch.setattr(continued, "newest_whole", lambda *args, **kwargs: None)
    assert as_begun(goes_on).tables == "auto"


def test_a_grid_trains_none_unless_asked(on_calibrated):
    """One of its runs could have them and another, with DoRA, not."""
    cells = plan_grid(on_calibrated, ["lowra", "lowra:dora=true", "lowra:tables=levels"], [1.5], [0])
    assert [cell.recipe.tables for cell in cells] == ["frozen", "frozen", "levels"]
    cells = plan_grid(on_calibrated.changed(["tables=shared"]), ["lowra"], [1.5], [0])
    assert [cell.recipe.tables for cell in cells] == ["shared"]
    with pytest.raises(ValueError, match="tables_learning_rate=0.001 has no effect"):
        plan_grid(on_calibrated.changed(["tables_learning_rate=1e-3"]), ["lowra"], [1.5], [0])


def test_cells_of_before_are_kept(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, max_steps=1)
    cells = plan_grid(recipe, ["lora16"], [], [0])
    assert run_grid(recipe, cells, tmp_path, progress=False)["run"] == 1
    (file,) = (tmp_path / "cells").iterdir()
    content = json.loads(file.read_text())
    del content["recipe"]["tables"]  # of a version that trained none
    file.write_text(json.dumps(content))
    assert run_grid(recipe, cells, tmp_path, progress=False)["run"] == 0
