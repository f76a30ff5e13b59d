"""Labels: the fingerprint of a base, and refusal of other bases, retired adapters and changed bytes."""

import datetime
import json

import pytest
import torch
from adapter_models import make_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapter_storage import store

from lowra.adapters import LabelError, LoraQuantSettings, load_packed, quantize_loraquant, read_adapter, read_packed
from lowra.adapters.labels import base_fingerprint, base_quantization, bytes_problem, make_label, retirement_problem
from lowra.adapters.source import CONFIG_FILE
from lowra.adapters.storage import LABEL_FILE, PACKED_FILE


@pytest.fixture()
def packed_folder(adapter_folder, base, tmp_path):
    packed = quantize_loraquant(read_adapter(adapter_folder), LoraQuantSettings(refine=False))
    return store(packed, base, tmp_path / "packed")


def edit_label(folder, **changes):
    label = json.loads((folder / LABEL_FILE).read_text())
    (folder / LABEL_FILE).write_text(json.dumps(label | changes))


def test_fingerprint_is_of_the_base_alone(base):
    alone = base_fingerprint(base)
    assert alone == base_fingerprint(make_base()) and len(alone) == 64
    assert base_fingerprint(get_peft_model(make_base(), LoraConfig(target_modules="all-linear"))) == alone
    kept = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    assert base_fingerprint(get_peft_model(make_base(), kept)) == alone
    tokens = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    assert base_fingerprint(get_peft_model(make_base(), tokens)) == alone


def test_fingerprint_tells_bases_apart(base):
    alone = base_fingerprint(base)
    assert base_fingerprint(make_base(seed=1)) != alone
    assert base_fingerprint(make_base().to(torch.bfloat16)) != alone
    base.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    assert base_fingerprint(base) != alone


def test_quantised_base_gives_its_own_fingerprint(base):
    recipe = {"quant_method": "lowra", "fingerprint": "f" * 64, "bits": 2.0, "true_bits": 2.25, "codebook": "learned"}
    base.config.quantization_config = recipe
    assert base_fingerprint(base) == "f" * 64
    assert base_quantization(base) == "lowra 2.0 bits, 2.2500 stored, learned codebook"
    base.config.quantization_config = {"quant_method": "other", "fingerprint": "f" * 64}
    assert base_fingerprint(base) != "f" * 64


def test_weights_without_bytes_are_refused():
    with torch.device("meta"):
        model = make_base()
    with pytest.raises(ValueError, match="meta device"):
        base_fingerprint(model)


def test_label_records_everything(adapter_folder, base):
    packed = quantize_loraquant(read_adapter(adapter_folder), LoraQuantSettings(refine=False))
    label = make_label(
        packed,
        base_name="small",
        base=base,
        task="law",
        training_data="statutes",
        evaluation={"accuracy": "0.7"},
        licence="CC0",
        retire="2030-01-31",
    )
    assert label["base"] == {"name": "small", "fingerprint": base_fingerprint(base), "quantization": "none (float32)"}
    wanted = {"task": "law", "training_data": "statutes", "licence": "CC0", "retire": "2030-01-31"}
    assert wanted.items() <= label.items()
    assert label["evaluation"] == {"accuracy": "0.7"}
    with pytest.raises(ValueError, match="YYYY-MM-DD"):
        make_label(packed, retire="soon")


def test_good_label_loads(packed_folder, base):
    load_packed(base, packed_folder)


def test_other_base_is_refused_and_can_be_forced(packed_folder):
    other = make_base(seed=1)
    with pytest.raises(LabelError, match="another base.*force=True"):
        load_packed(other, packed_folder)
    with pytest.warns(UserWarning, match="another base"):
        load_packed(other, packed_folder, force=True)


def test_same_weights_at_other_bits_are_another_base(adapter_folder, base, tmp_path):
    recipe = {"quant_method": "lowra", "fingerprint": "f" * 64, "bits": 2.0}
    base.config.quantization_config = recipe
    packed = quantize_loraquant(read_adapter(adapter_folder), LoraQuantSettings(refine=False))
    folder = store(packed, base, tmp_path / "packed")
    load_packed(base, folder)
    other = make_base()
    other.config.quantization_config = recipe | {"bits": 1.5}
    with pytest.raises(LabelError, match="lowra 2.0 bits.*this base is lowra 1.5 bits"):
        load_packed(other, folder)


def test_unknown_base_is_refused(packed_folder, base):
    edit_label(packed_folder, base={"name": None, "fingerprint": None, "quantization": None})
    with pytest.raises(LabelError, match="names no base fingerprint"):
        load_packed(base, packed_folder)


def test_retired_adapter_is_refused_and_can_be_forced(packed_folder, base):
    edit_label(packed_folder, retire="2020-02-29")
    with pytest.raises(LabelError, match="retired on 2020-02-29"):
        load_packed(base, packed_folder)
    with pytest.warns(UserWarning, match="retired"):
        load_packed(base, packed_folder, force=True)


def test_day_of_retirement_is_the_last_good_one():
    day = datetime.date(2030, 1, 31)
    assert retirement_problem({"retire": "2030-01-31"}, day) is None
    assert "retired" in retirement_problem({"retire": "2030-01-31"}, day + datetime.timedelta(days=1))
    assert retirement_problem({"retire": None}) is None


@pytest.mark.parametrize("changed", ["bytes", "layout", "config"])
def test_changed_bytes_are_refused_and_can_be_forced(packed_folder, base, changed):
    if changed == "config":
        config = json.loads((packed_folder / CONFIG_FILE).read_text())
        (packed_folder / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 17}))
    else:
        original = (packed_folder / PACKED_FILE).read_bytes()
        if changed == "bytes":
            content = original[:-1] + bytes([original[-1] ^ 1])
        else:
            content = original.replace(b"layers.0.mlp.down_proj", b"layers.0.mlp.DOWN_proj")
        assert content != original
        (packed_folder / PACKED_FILE).write_bytes(content)
    assert "bytes have changed" in bytes_problem(read_packed(packed_folder))
    with pytest.raises(LabelError, match="bytes have changed"):
        load_packed(base, packed_folder)
    if changed == "bytes":
        with pytest.warns(UserWarning, match="bytes have changed"):
            load_packed(base, packed_folder, force=True)


def test_every_reason_is_given(packed_folder):
    edit_label(packed_folder, retire="2020-01-01", sha256="0" * 64)
    with pytest.raises(LabelError, match="bytes have changed.*retired on.*another base"):
        load_packed(make_base(seed=1), packed_folder)


def test_cut_file_is_refused(packed_folder):
    content = (packed_folder / PACKED_FILE).read_bytes()
    (packed_folder / PACKED_FILE).write_bytes(content[:-100])
    with pytest.raises(ValueError, match="cut short"):
        read_packed(packed_folder)


def test_tensors_that_do_not_fit_the_layout_are_refused(packed_folder):
    from safetensors import safe_open

    path = packed_folder / PACKED_FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {"codes": torch.zeros(3, dtype=torch.uint8)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="tensor codes should be"):
        read_packed(packed_folder)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="no readable layout"):
        read_packed(packed_folder)


def test_trained_adapter_is_not_a_packed_one(adapter_folder):
    with pytest.raises(FileNotFoundError, match="lowra adapter quantize"):
        read_packed(adapter_folder)
