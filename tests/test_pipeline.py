"""The main job: a dense checkpoint to packed weights and an adapter, whatever happens on the way."""

import dataclasses
import json
import os
import re
import stat

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowra import AdapterRecipe, LowRAConfig, LowRALinear, quantize_checkpoint
from lowra.checkpoints.atomic import locked
from lowra.quantization import pieces, pipeline
from lowra.quantization.card import model_card
from lowra.quantization.initial_adapter import ADAPTER_FOLDER


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed") / "llama"
    report = quantize_checkpoint(
        str(tiny_llama), output, LowRAConfig(bits=1.5), AdapterRecipe(4), device="cpu", progress=False
    )
    return output, report


def test_budget_is_met_and_everything_stored_is_counted(packed):
    output, report = packed
    assert 1.4 < report["nominal_bits"] <= 1.5
    tensors = load_file(output / "model.safetensors")
    names = ("weight", "row_bits", "scales", "scale_steps", "levels")
    modules = {key.rpartition(".")[0] for key in tensors if key.endswith(".row_bits")}
    stored = sum(tensors[f"{module}.{name}"].nbytes for module in modules for name in names)
    assert report["packed_bytes"] == stored
    assert report["true_bits"] == pytest.approx(8 * stored / report["quantised_parameters"], abs=1e-5)
    assert len(modules) == 14


def test_base_and_adapter_together_are_nearer_to_the_original(packed, tiny_llama):
    output, _ = packed
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(output), output / ADAPTER_FOLDER)
    for name, module in original.named_modules():
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            lora = model.base_model.model.get_submodule(name)
            low_rank = lora.lora_B["default"].weight @ lora.lora_A["default"].weight * lora.scaling["default"]
            left = module.weight.float() - lora.base_layer.dequantize()
            assert (left - low_rank).norm() < left.norm()


def test_reload_is_bit_exact(packed, tmp_path):
    output, _ = packed
    tokens = AutoTokenizer.from_pretrained(output)("The city was", return_tensors="pt")
    first = AutoModelForCausalLM.from_pretrained(output)
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(first(**tokens).logits, second(**tokens).logits)
    assert second.config.quantization_config.true_bits == first.config.quantization_config.true_bits


def test_quantising_while_loading_gives_the_same_weights(tiny_llama, tmp_path):
    output = tmp_path / "packed"
    report = quantize_checkpoint(str(tiny_llama), output, LowRAConfig(bits=1.5), device="cpu", progress=False)
    written = AutoModelForCausalLM.from_pretrained(output)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, load_in_lowra=True, lowra_bits=1.5)
    for name, parameter in written.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    config = loaded.config.quantization_config
    assert (config.true_bits, config.nominal_bits) == (report["true_bits"], report["nominal_bits"])
    assert config.fingerprint == written.config.quantization_config.fingerprint
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, LowRALinear)


def test_a_killed_run_goes_on_where_it_stopped(tiny_llama, packed, tmp_path, monkeypatch):
    output = tmp_path / "resumed"
    arguments = (str(tiny_llama), output, LowRAConfig(bits=1.5), AdapterRecipe(4), "cpu", False)
    calls = []
    original = pieces.quantize_matrix

    def dies(*args):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(pieces, "quantize_matrix", dies)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(*arguments)
    assert not output.exists()
    monkeypatch.setattr(pieces, "quantize_matrix", original)
    learned = []
    monkeypatch.setattr(pipeline.Planner, "add", lambda *args: learned.append(args))
    quantize_checkpoint(*arguments)
    assert not learned, "finished matrices were learned again"
    assert not output.with_name("resumed.partial").exists()
    for file in ("model.safetensors", f"{ADAPTER_FOLDER}/adapter_model.safetensors"):
        ours, theirs = load_file(output / file), load_file(packed[0] / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("scales", ["float32", "float16", "double_quant"])
@pytest.mark.parametrize("change", [{}, {"assigner": "two_level"}, {"budget": "true", "bits": 3.0}])
def test_recipes(tiny_llama, tmp_path, scales, change):
    config = LowRAConfig(**{"bits": 2.5, "scales": scales, **change})
    report = quantize_checkpoint(str(tiny_llama), tmp_path / "out", config, device="cpu", progress=False)
    reached = report["true_bits"] if config.budget == "true" else report["nominal_bits"]
    assert config.bits - 0.2 < reached <= config.bits
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def _copy(source, target, change):
    """Copies a checkpoint with its tensors changed."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


NAME = "model.layers.1.mlp.up_proj.weight"


def _poison(value):
    def change(tensors):
        tensors[NAME][3, 5] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_poison(float("nan")), f"Tensor {NAME} holds 1 NaN or Inf"),
        (_poison(float("inf")), f"Tensor {NAME} holds 1 NaN or Inf"),
        (lambda tensors: tensors.pop(NAME), f"lacks 1 tensor.*{NAME}"),
        (lambda tensors: tensors.update({NAME: tensors[NAME][:8].contiguous()}), f"Tensor {NAME} has shape"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(tiny_llama, tmp_path, change, message):
    damaged = _copy(tiny_llama, tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(str(damaged), tmp_path / "out", LowRAConfig(), device="cpu", progress=False)
    assert list(tmp_path.iterdir()) == [damaged]


def test_truncated_file_is_refused(tiny_llama, tmp_path):
    damaged = _copy(tiny_llama, tmp_path / "damaged", lambda tensors: None)
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut short or damaged"):
        quantize_checkpoint(str(damaged), tmp_path / "out", LowRAConfig(), device="cpu", progress=False)
    assert list(tmp_path.iterdir()) == [damaged]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0.9}, "from 1 to 4"),
        ({"bits": 4.5}, "from 1 to 4"),
        ({"bits": 1.5, "codebook": "normal_float"}, "learned for budgets below 2"),
        ({"bits": 2.0, "menu": (1, 3)}, "subset"),
        ({"bits": 2.0, "scales": "int8"}, "double_quant"),
        ({"format_version": 9}, "format 9"),
        ({"bits": "two"}, "bits must be a number; got 'two'"),
        ({"group_size": 64.0}, "group_size must be a whole number"),
        ({"quantize_head": "no"}, "quantize_head must be true or false"),
        ({"menu": 2}, r"menu must be a list of precisions, such as \[1, 2, 4\]; got 2"),
    ],
)
def test_impossible_recipes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LowRAConfig(**arguments)


def test_one_name_of_a_dense_module_may_stand_without_a_list(tiny_llama, tmp_path):
    config = LowRAConfig(modules_to_not_convert="down_proj")
    report = quantize_checkpoint(str(tiny_llama), tmp_path / "out", config, device="cpu", progress=False)
    assert report["quantised_parameters"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 176 * 64)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="group_sise.*Did you mean 'group_size'"):
        LowRAConfig.from_dict({"bits": 2, "group_sise": 64})


def test_true_budget_below_what_is_stored_is_refused(tiny_llama, tmp_path):
    def calibration():
        raise AssertionError("a calibration may take hours")

    def packed(bits, group_size):
        config = LowRAConfig(bits=bits, budget="true", group_size=group_size)
        return quantize_checkpoint(
            str(tiny_llama), tmp_path / "out", config, device="cpu", progress=False, calibration=calibration
        )

    with pytest.raises(ValueError, match="below the smallest that can be built") as refused:
        packed(1.1, 64)
    at64, at256 = map(float, re.search(r"take ([\d.]+)\..*groups of 256.*is ([\d.]+)\.$", str(refused.value)).groups())
    for bits, group_size in ((at64, 64), (at256, 256)):
        with pytest.raises(ValueError, match="below the smallest"):
            packed(bits - 1e-4, group_size)
        with pytest.raises(AssertionError, match="hours"):
            packed(bits, group_size)


def test_quantised_input_and_used_output_are_refused(packed, tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="quantised already"):
        quantize_checkpoint(str(packed[0]), tmp_path / "out", LowRAConfig(), device="cpu", progress=False)
    with pytest.raises(ValueError, match="not empty"):
        quantize_checkpoint(str(tiny_llama), packed[0], LowRAConfig(), device="cpu", progress=False)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        quantize_checkpoint(str(tmp_path / "no" / "model"), tmp_path / "out", LowRAConfig())
    with pytest.raises(ValueError, match="at most 32"):
        quantize_checkpoint(str(tiny_llama), tmp_path / "out", LowRAConfig(), AdapterRecipe(40), device="cpu")


def test_load_in_lowra_is_not_given_twice(tiny_llama):
    with pytest.raises(ValueError, match="not both"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, load_in_lowra=True, quantization_config=LowRAConfig())
    with pytest.raises(ValueError, match="no effect"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, lowra_bits=2.0)


def test_what_is_written_says_what_it_is(packed):
    output, report = packed
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "lowra" and config["format_version"] == 1
    assert len(config["fingerprint"]) == 64
    fields = {field.name for field in dataclasses.fields(LowRAConfig)}
    assert set(config) == fields
    card = (output / "README.md").read_text()
    assert "import lowra" in card and f"{report['true_bits']:.4f} per packed weight" in card
    assert "base_model:" not in card  # a folder is no name on the hub
    for asked in ("bits=1.5", "refine=0", "feedback=0", "assigner=exact", "modules_to_not_convert=None"):
        assert asked in card
    with safe_open(output / "model.safetensors", framework="pt") as content:
        assert content.metadata()["format"] == "pt"


def test_the_errors_reported_are_those_of_the_tensors(packed, tiny_llama):
    output, report = packed
    original, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_llama, output))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(output), output / ADAPTER_FOLDER)
    energy = lost = left = 0.0
    for name, module in base.named_modules():
        if isinstance(module, LowRALinear):
            weight = original.get_parameter(f"{name}.weight").float()
            lora = model.base_model.model.get_submodule(name)
            energy += weight.square().sum().item()
            rest = weight - module.dequantize()
            lost += rest.square().sum().item()
            left += (rest - lora.get_delta_weight("default")).square().sum().item()
    assert report["packed_error"] == pytest.approx(lost / energy, rel=1e-5)
    assert report["adapted_error"] == pytest.approx(left / energy, rel=1e-5)
    assert report["adapted_error"] < report["error"] < report["packed_error"]  # LoftQ packs the weight less its adapter


def test_every_saved_checkpoint_has_a_card(packed, tiny_llama, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, load_in_lowra=True, lowra_bits=1.5)
    for name, model in (("loaded", loaded), ("again", AutoModelForCausalLM.from_pretrained(packed[0]))):
        model.save_pretrained(tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        config = model.config.quantization_config
        assert (
            f"{config.true_bits:.4f} per packed weight" in card
            and config.fingerprint in card
            and "import lowra" in card
        )
        (tmp_path / name / "README.md").write_text("mine")
        model.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "README.md").read_text() == "mine"
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "README.md").exists()


def test_a_name_on_the_hub_is_named_as_such(packed):
    _, report = packed
    config = LowRAConfig(base="org/model", nominal_bits=2.0, true_bits=2.2, error=0.1, fingerprint="0" * 64)
    card = model_card(config, "LlamaForCausalLM", report["quantised_parameters"], report["packed_bytes"], report)
    assert "\nbase_model: org/model\n" in card and "# org/model, packed at 2 bits" in card


def test_base_30m_meets_the_projects_own_bounds(base_30m, tmp_path):
    report = quantize_checkpoint(
        str(base_30m), tmp_path / "out", LowRAConfig(bits=1.5), AdapterRecipe(8), device="cpu", progress=False
    )
    assert report["true_bits"] <= report["nominal_bits"] + 0.35
    assert report["assigner"]["bits_used"] <= report["assigner"]["budget"]
    assert report["assigner"]["gap"] < 1e-4


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there(tiny_llama, tmp_path, device):
    with pytest.raises(ValueError, match="There is no cuda:99|is no device"):
        quantize_checkpoint(str(tiny_llama), tmp_path / "out", LowRAConfig(), device=device)


def test_a_misspelt_name_of_a_dense_module(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="'donw_proj' in its name"):
        quantize_checkpoint(str(tiny_llama), tmp_path / "out", LowRAConfig(modules_to_not_convert=["donw_proj"]))
    assert not list(tmp_path.iterdir())


def test_files_follow_the_umask(tiny_llama, tmp_path):
    before = os.umask(0o027)
    try:
        quantize_checkpoint(str(tiny_llama), tmp_path / "out", LowRAConfig(), AdapterRecipe(4), progress=False)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_two_processes_do_not_write_to_the_same_place(tiny_llama, tmp_path):
    """The second would empty the folder of the first, whose pieces would then count as its own."""
    arguments = (str(tiny_llama), tmp_path / "out", LowRAConfig(bits=1.5))
    with locked(tmp_path / "out.partial"):
        with pytest.raises(ValueError, match="Another process is writing to .*out.partial"):
            quantize_checkpoint(*arguments, device="cpu", progress=False)
        assert (tmp_path / "out.partial").exists()
    quantize_checkpoint(*arguments, device="cpu", progress=False)


def test_pieces_of_another_recipe_are_thrown_away_and_that_is_said(tiny_llama, tmp_path, monkeypatch, caplog):
    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "assemble", dies)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(tiny_llama), tmp_path / "out", LowRAConfig(bits=1.5), device="cpu", progress=False)
    assert list((tmp_path / "out.partial" / "pieces").iterdir())
    monkeypatch.undo()
    reports = [
        quantize_checkpoint(str(tiny_llama), tmp_path / name, LowRAConfig(bits=2), device="cpu", progress=False)
        for name in ("out", "fresh")
    ]
    assert reports[0]["true_bits"] == reports[1]["true_bits"]
    (said,) = [record.getMessage() for record in caplog.records if "unfinished" in record.getMessage()]
    assert "with bits=1.5; this run differs" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is at least 1"),
        ({"rank": 4, "steps": 0}, "steps is at least 1"),
        ({"rank": 4, "alpha": 0}, "alpha must be positive"),
    ],
)
def test_impossible_adapters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdapterRecipe(**arguments)
