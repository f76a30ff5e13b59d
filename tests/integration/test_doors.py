"""Doors that lead past the usual ones: functions imported by name, uploads, configurations that lost something."""

import json
import shutil

import pytest
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import LlamaForCausalLM
from transformers.utils.hub import PushToHubMixin

import lowra
from lowra.checkpoints.integrity import DIGESTS_FILE


@pytest.fixture(scope="module")
def packings(dense_llama, tmp_path_factory):
    """Two packings of one base, each with a trained adapter."""
    found = []
    for name, options in {"plain": {}, "refined": {"refine": 2}}.items():
        folder = tmp_path_factory.mktemp(name)
        lowra.quantize_checkpoint(dense_llama, folder / "base", lowra.LowRAConfig(bits=2, **options), progress=False)
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        get_peft_model(model, LoraConfig(r=4, init_lora_weights=False)).save_pretrained(folder / "adapter")
        found.append(folder)
    return found


def test_a_hotswap_imported_before_lowra_asks_too(packings):
    own, other = packings
    swap = hotswap_adapter.__wrapped__  # what `from peft.utils.hotswap import hotswap_adapter` gave before
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(own / "base"), own / "adapter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="other packing|another packing|packed"):
        swap(model, str(other / "adapter"), "default", torch_device="cpu")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    swap(model, str(own / "adapter"), "default", torch_device="cpu")
    hotswap_adapter(model, str(other / "adapter"), "default", torch_device="cpu", any_base=True)


def test_what_is_uploaded_has_digests_and_card(packings, tmp_path, monkeypatch):
    uploaded = []

    class Api:
        def create_repo(self, name, **options):
            return type("Repository", (), {"repo_id": name})

    class Card:
        def save(self, path):
            pass

    def upload(self, folder, *args, **kwargs):
        uploaded.extend(path.name for path in tmp_path.joinpath("saved").iterdir())

    monkeypatch.setattr(transformers.modeling_utils, "hf_api", Api)
    monkeypatch.setattr(transformers.modeling_utils, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    model = LlamaForCausalLM.from_pretrained(packings[0] / "base")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert {DIGESTS_FILE, "README.md", "config.json", "model.safetensors"} <= set(uploaded)
    assert "_upload_modified_files" not in vars(model)


@pytest.mark.parametrize("lost", [["error"], ["base"], ["bits"], ["nominal_bits", "true_bits"], ["fingerprint"]])
def test_a_card_of_a_config_that_lost_something(packings, tmp_path, lost):
    folder = tmp_path / "copy"
    shutil.copytree(packings[0] / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    for name in lost:
        del config["quantization_config"][name]
    (folder / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "None" not in card.replace("modules_to_not_convert=None", "")
    assert lost == ["bits"] or "not known" in card
    assert (tmp_path / "again" / DIGESTS_FILE).is_file()


@pytest.mark.parametrize("lost", ["nominal_bits", "fingerprint", "packing", "base"])
def test_a_config_that_lost_something_is_that_of_a_packed_base(packings, tmp_path, lost):
    """An adapter of another packing that started anew was accepted where nominal_bits were missing."""
    own, other = packings
    folder = tmp_path / "copy"
    shutil.copytree(own / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"][lost]
    (folder / "config.json").write_text(json.dumps(config))
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), own / "adapter")
    with pytest.raises(ValueError, match="another packing of the same base .*refine=2 vs 0"):
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), other / "adapter")


def test_an_adapter_without_record_on_a_base_that_has_a_start(packings, dense_llama, tmp_path, caplog):
    lowra.quantize_checkpoint(
        dense_llama, tmp_path / "base", lowra.LowRAConfig(bits=2), lowra.AdapterRecipe(4), progress=False
    )
    shutil.copytree(packings[0] / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "lowra_base.json").unlink()
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(packings[0] / "base"), tmp_path / "adapter")
    assert "has no lowra_base.json" not in caplog.text
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert "has no lowra_base.json" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"peft_type": 3}', '{"r": "a"}', '{"peft_type": "LORA", "r": "four"}', "\udcff"]
)
def test_auto_classes_name_a_damaged_configuration(packings, tmp_path, text):
    shutil.copytree(packings[0] / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(text, errors="surrogateescape")
    with pytest.raises((ValueError, OSError), match="adapter_config.json") as raised:
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("how", ["base of a PeftModel", "adapter deleted"])
def test_a_base_inside_an_adapters_layers_is_not_saved_as_it_is(packings, tmp_path, how, transformers_loads_adapters):
    model = LlamaForCausalLM.from_pretrained(packings[0] / "base")
    if how == "adapter deleted":
        model.load_adapter(str(packings[0] / "adapter"), "one")
        model.delete_adapter("one")
    else:
        adapted = PeftModel.from_pretrained(model, packings[0] / "adapter")
    with pytest.raises(ValueError, match=r"inside layers of an adapter .*q_proj.base_layer"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    if how == "base of a PeftModel":
        adapted.unload().save_pretrained(tmp_path / "saved")
        LlamaForCausalLM.from_pretrained(tmp_path / "saved")
