"""Adapters of which only some files were copied: the weights repeat the record, and say what is missing."""

import json
import logging
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import inputs_of, logits_of
from transformers import AutoModelForCausalLM

import lowra
from lowra.commands import main
from lowra.integrations.adapter_records import record_of
from lowra.nn.trained_tables import bake_tables, train_tables

RECORD, TABLES = "lowra_base.json", "tables.safetensors"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def adapters(dense_llama, tmp_path_factory):
    """A base without a start, an adapter on it with tables, one without, and another packing of the base."""
    folder = tmp_path_factory.mktemp("half")
    for name, options in (("base", {}), ("other", {"refine": 2})):
        lowra.quantize_checkpoint(str(dense_llama), folder / name, lowra.LowRAConfig(bits=2, **options), progress=False)
    torch.manual_seed(3)
    model = get_peft_model(load(folder / "base"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(folder / "plain")
    for parameter in train_tables(model, scales=True).values():
        parameter.data += 0.05 * torch.rand_like(parameter)
    bake_tables(model)
    model.save_pretrained(folder / "tabled")
    (folder / "wanted").write_text(json.dumps(logits_of(model).tolist()))
    return folder


@pytest.fixture
def robbed(adapters, tmp_path):
    """Copies an adapter without some of its files."""

    def rob(name, *lost):
        folder = shutil.copytree(adapters / name, tmp_path / name)
        for file in lost:
            (folder / file).unlink()
        return folder

    return rob


def swapped(base, adapter):
    model = get_peft_model(load(base), LoraConfig(r=2, target_modules="all-linear"))
    hotswap_adapter(model, str(adapter), "default")


def added(base, adapter):
    PeftModel.from_pretrained(load(base), base.parent / "plain").load_adapter(adapter, "second")


DOORS = {
    "from_pretrained": lambda base, adapter: PeftModel.from_pretrained(load(base), adapter),
    "load_adapter": added,
    "of Transformers": lambda base, adapter: load(base).load_adapter(str(adapter)),
    "auto": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "hotswap": swapped,
    "dense": lambda base, adapter: PeftModel.from_pretrained(load(base.parent / "dense"), adapter),
}


@pytest.mark.parametrize("lost", [(TABLES,), (TABLES, RECORD)], ids=["tables", "tables and record"])
@pytest.mark.parametrize("door", DOORS)
def test_lost_tables_are_missed(adapters, robbed, dense_llama, door, lost):
    if not (adapters / "dense").exists():
        shutil.copytree(dense_llama, adapters / "dense")
    if door == "dense" and RECORD not in lost:
        pytest.skip("its record says on which base it belongs")
    folder = robbed("tabled", *lost)
    with pytest.raises(ValueError, match=TABLES):
        DOORS[door](adapters / "base", folder)


def test_lost_tables_are_missed_by_the_commands(robbed, tmp_path, capsys):
    folder = robbed("tabled", TABLES, RECORD)
    for command in (
        ["verify", str(folder)],
        ["adapter", "quantize", str(folder), "--output", str(tmp_path / "packed")],
        ["merge", str(folder), "--output", str(tmp_path / "merged")],
    ):
        assert main(command) == 2
        assert TABLES in capsys.readouterr().err


def test_without_its_record_alone_nothing_is_lost(adapters, robbed, caplog):
    with caplog.at_level(logging.WARNING, logger="lowra"):
        model = PeftModel.from_pretrained(load(adapters / "base"), robbed("tabled", RECORD))
    assert logits_of(model).tolist() == json.loads((adapters / "wanted").read_text())
    assert record_of(model, "default")["packing"] and f"lacks its {RECORD}" in caplog.text


def test_on_another_packing_a_lost_record_is_told(adapters, robbed, caplog):
    with caplog.at_level(logging.WARNING, logger="lowra"):
        PeftModel.from_pretrained(load(adapters / "other"), robbed("plain", RECORD))
    assert "belongs to another packing of the same base (refine=0 vs 2" in caplog.text


def test_the_weights_are_what_any_program_reads(adapters):
    for name in ("plain", "tabled"):
        with safe_open(adapters / name / "adapter_model.safetensors", framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            assert json.loads(file.metadata()["lowra_base"]) == json.loads((adapters / name / RECORD).read_text())
        for tensor in load_file(adapters / name / "adapter_model.safetensors").values():
            assert tensor.data_ptr() % tensor.element_size() == 0


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"files": 3}', '{"packing": "none"}', "\x00"])
def test_what_cannot_be_read_there_is_as_nothing(adapters, robbed, content):
    from lowra.checkpoints.atomic import set_metadata

    folder = robbed("plain", RECORD)
    set_metadata(folder / "adapter_model.safetensors", "lowra_base", content)
    model = PeftModel.from_pretrained(load(adapters / "base"), folder)
    assert record_of(model, "default") == {} and torch.isfinite(model(**inputs_of(model)).logits).all()
