"""Packings of one base at the same bits are told apart, by whichever door an adapter comes, in words that help."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from safetensors.torch import load_file, save_file
from small_models import VOCABULARY, logits_of
from transformers import AutoModelForCausalLM

import lowra
from lowra.adapters import AdapterLibrary, load_packed
from lowra.commands import main

BITS = 2.0
RECIPES = {  # config, adapter, what the message has to name
    "rank": ({}, {"rank": 8}, "rank 4 vs 8"),
    "no adapter": ({}, None, "rank 4 vs no initial adapter"),
    "method": ({}, {"rank": 4, "method": "pissa"}, "method loftq vs pissa"),
    "alpha": ({}, {"rank": 4, "steps": 1}, "steps 5 vs 1"),
    "refine": ({"refine": 2}, {"rank": 4}, "refine=0 vs 2"),
    "menu": ({"menu": [2]}, {"rank": 4}, r"menu=\[1, 2, 4\] vs \[2\]"),
    "scales": ({"scales": "float32"}, {"rank": 4}, "scales=double_quant vs float32"),
}


def pack(dense, folder, options, adapter):
    recipe = None if adapter is None else lowra.AdapterRecipe(**adapter)
    lowra.quantize_checkpoint(str(dense), folder, lowra.LowRAConfig(bits=BITS, **options), recipe, progress=False)
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def first(dense_llama, tmp_path_factory):
    return pack(dense_llama, tmp_path_factory.mktemp("identity") / "first", {}, {"rank": 4})


@pytest.fixture(scope="module")
def second(dense_llama, tmp_path_factory):
    """Another packing of the same base at the same bits."""
    return pack(dense_llama, tmp_path_factory.mktemp("identity") / "second", {"refine": 2}, {"rank": 4})


@pytest.fixture(scope="module")
def trained(first, tmp_path_factory):
    """An adapter trained from the first packing's start."""
    model = PeftModel.from_pretrained(load(first), first / "initial_adapter", is_trainable=True)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    folder = tmp_path_factory.mktemp("identity") / "trained"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", RECIPES)
def test_messages_name_what_differs(first, trained, dense_llama, tmp_path, case):
    options, adapter, message = RECIPES[case]
    other = load(pack(dense_llama, tmp_path / "other", options, adapter))
    for folder in (first / "initial_adapter", trained):
        with pytest.raises(ValueError, match=f"another packing.*{message}.*any_base=True"):
            PeftModel.from_pretrained(other, folder)
        PeftModel.from_pretrained(load(first), folder)
    PeftModel.from_pretrained(other, trained, any_base=True)


def test_calibration_tells_packings_apart(dense_llama, tmp_path):
    generator = torch.Generator().manual_seed(0)
    folders = []
    for number in range(2):
        calibration = calibration_of(dense_llama, generator)
        folder = tmp_path / str(number)
        config = lowra.LowRAConfig(bits=BITS, sensitivity="fisher")
        lowra.quantize_checkpoint(
            str(dense_llama), folder, config, lowra.AdapterRecipe(4), calibration=calibration, progress=False
        )
        folders.append(folder)
    with pytest.raises(ValueError, match="calibrated with other text"):
        PeftModel.from_pretrained(load(folders[0]), folders[1] / "initial_adapter")
    plain = pack(dense_llama, tmp_path / "plain", {}, {"rank": 4})
    with pytest.raises(ValueError, match="calibrated vs not calibrated"):
        PeftModel.from_pretrained(load(plain), folders[0] / "initial_adapter")


def calibration_of(dense, generator):
    from lowra.checkpoints.dense import empty_model
    from lowra.checkpoints.targets import find_targets

    targets = find_targets(empty_model(dense), None).values()
    inputs = {f"{t.name}.weight": torch.rand(t.in_features, generator=generator) + 0.1 for t in targets}
    gradients = {f"{t.name}.weight": torch.rand(t.out_features, generator=generator) + 0.1 for t in targets}
    return lowra.Calibration(inputs, gradients)


def refused(call):
    with pytest.raises(ValueError, match="another packing of.*refine=0 vs 2"):
        call()


def test_every_door_asks(first, second, trained, tmp_path):
    base = load(second)
    refused(lambda: PeftModel.from_pretrained(base, trained))
    refused(lambda: PeftMixedModel.from_pretrained(load(second), trained))
    refused(lambda: load(second).load_adapter(str(trained)))
    own = get_peft_model(load(second), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")).eval()
    before = logits_of(own)
    refused(lambda: own.load_adapter(trained, "other"))
    refused(lambda: hotswap_adapter(own, str(trained), "default", torch_device="cpu"))
    assert torch.equal(logits_of(own), before)
    moved = json.loads((trained / "adapter_config.json").read_text())
    copied = shutil.copytree(trained, tmp_path / "copied")
    (copied / "adapter_config.json").write_text(json.dumps({**moved, "base_model_name_or_path": str(second)}))
    refused(lambda: AutoPeftModelForCausalLM.from_pretrained(copied))
    assert main(["evaluate", str(second), "--adapter", str(trained), "--data", __file__]) == 2


def test_packed_adapters_ask_too(first, second, trained, tmp_path, capsys):
    packed = tmp_path / "packed"
    quantize = ["adapter", "quantize", str(trained), "--method", "rtn", "--output", str(packed), "--base"]
    assert main([*quantize, str(second)]) == 2
    assert "refine=0 vs 2" in capsys.readouterr().err and not packed.exists()
    assert main([*quantize, str(first)]) == 0
    load_packed(load(first), packed)
    refused(lambda: load_packed(load(second), packed))
    library = AdapterLibrary(load(second))
    refused(lambda: library.add("a", packed))


def test_the_same_recipe_with_other_tables(first, trained, tmp_path):
    model = load(first)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.levels *= 1.5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the same codes with other levels and scales"):
        PeftModel.from_pretrained(load(tmp_path), trained)


def test_a_base_saved_again_or_packed_while_loading_is_the_same(first, trained, dense_llama, tmp_path):
    load(first, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(load(tmp_path / "again"), trained)
    while_loading = {"load_in_lowra": True, "lowra_bits": BITS}
    model = get_peft_model(load(dense_llama, **while_loading), LoraConfig(target_modules=["up_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(load(dense_llama, **while_loading), tmp_path / "adapter")
    with pytest.raises(ValueError, match="no initial adapter vs rank 4"):
        PeftModel.from_pretrained(load(first), tmp_path / "adapter")


def test_records_of_earlier_versions_are_asked_what_they_know(first, second, trained, tmp_path):
    old = shutil.copytree(trained, tmp_path / "old")
    record = json.loads((old / "lowra_base.json").read_text())
    kept = ("base", "nominal_bits", "init", "fingerprint")
    (old / "lowra_base.json").write_text(json.dumps({name: record[name] for name in kept}))
    PeftModel.from_pretrained(load(first), old)
    PeftModel.from_pretrained(load(second), old)  # nothing tells
    (old / "lowra_base.json").write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="belongs to another base"):
        PeftModel.from_pretrained(load(first), old)


@pytest.mark.parametrize("name", ["packing", "recipe", "files", "settings", "fingerprint", "nominal_bits", "start"])
@pytest.mark.parametrize("value", [7.5, "x", [], {"a": 1}, True, float("nan")])
def test_records_of_any_content_end_in_one_sentence(first, trained, tmp_path, name, value):
    folder = shutil.copytree(trained, tmp_path / "changed")
    record = json.loads((folder / "lowra_base.json").read_text())
    (folder / "lowra_base.json").write_text(json.dumps({**record, name: value}))
    try:
        PeftModel.from_pretrained(load(first), folder)
    except ValueError as error:
        assert "\n" not in str(error)


def damage(how):
    def change(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        how(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return change


def flip(tensors):
    tensors[sorted(tensors)[3]].view(-1).view(torch.uint8)[2] ^= 4


def swap(tensors):
    names = [name for name in sorted(tensors) if name.endswith("up_proj.lora_A.weight")]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


@pytest.mark.parametrize("how", [flip, swap])
def test_changed_factors_are_refused(first, trained, tmp_path, how):
    folder = shutil.copytree(trained, tmp_path / "changed")
    damage(how)(folder)
    for call in (
        lambda: PeftModel.from_pretrained(load(first), folder),
        lambda: load(first).load_adapter(str(folder)),
        lambda: hotswap_adapter(
            PeftModel.from_pretrained(load(first), trained), str(folder), "default", torch_device="cpu"
        ),
    ):
        with pytest.raises(ValueError, match="has other bytes than were saved in"):
            call()
    assert main(["adapter", "quantize", str(folder), "--method", "rtn", "--output", str(tmp_path / "out")]) == 2
    assert main(["verify", str(folder)]) == 2 and main(["verify", str(trained)]) == 0


def test_changed_settings_are_told(first, trained, tmp_path, caplog):
    folder = shutil.copytree(trained, tmp_path / "changed")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9, "lora_dropout": 0.3}))
    PeftModel.from_pretrained(load(first), folder)
    said = [record.getMessage() for record in caplog.records]
    assert [message for message in said if "lora_alpha is 9 and was 4.0" in message and "dropout" not in message]


def test_the_start_of_a_merge_is_the_start(first, second, trained, dense_llama, tmp_path):
    def merge(initial):
        model = PeftModel.from_pretrained(load(first), trained)
        return lowra.merge_into_dense(model, original=dense_llama, initial=initial)

    for wrong in (trained, shutil.copytree(trained, tmp_path / "copy of it")):
        with pytest.raises(ValueError, match="is not what adapter 'default' began with"):
            merge(wrong)
    with pytest.raises(ValueError, match="is not what|another packing"):
        merge(second / "initial_adapter")
    old = shutil.copytree(trained, tmp_path / "old")  # a record that knows of no start
    record = json.loads((old / "lowra_base.json").read_text())
    (old / "lowra_base.json").write_text(json.dumps({key: record[key] for key in record if key != "start"}))
    with pytest.raises(ValueError, match="is not what adapter"):
        lowra.merge_into_dense(PeftModel.from_pretrained(load(first), old), original=dense_llama, initial=old)
    assert not torch.equal(logits_of(merge(first / "initial_adapter")), logits_of(load(dense_llama)))


def test_hotswapped_adapters_are_saved_with_their_own_record(first, trained, tmp_path):
    fresh = get_peft_model(load(first), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    fresh.save_pretrained(tmp_path / "fresh")
    model = PeftModel.from_pretrained(load(first), tmp_path / "fresh").eval()
    hotswap_adapter(model, str(trained), "default", torch_device="cpu")
    model.save_pretrained(tmp_path / "swapped")
    record = json.loads((tmp_path / "swapped" / "lowra_base.json").read_text())
    assert record["init"] == "loftq"
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(first), tmp_path / "swapped").eval()), logits_of(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
    model.save_pretrained(tmp_path / "unknown")
    assert json.loads((tmp_path / "unknown" / "lowra_base.json").read_text())["init"] == "unknown"


def test_adapters_of_transformers_have_records_and_no_card(first, second, tmp_path):
    model = load(first)
    model.add_adapter(LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False), "law")
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "README.md").exists()
    assert not (tmp_path / "adapter" / "lowra_digests.json").exists()
    again = load(first)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again), expected)
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(first), tmp_path / "adapter").eval()), expected)
    refused(lambda: load(second).load_adapter(str(tmp_path / "adapter")))
    assert VOCABULARY == expected.shape[-1]


def test_factors_saved_in_the_other_format_replace_the_earlier_ones(first, trained, tmp_path):
    """PEFT leaves the safetensors file of an earlier save beside a pickled one, and loads that."""
    model = PeftModel.from_pretrained(load(first), trained)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(first), tmp_path)), logits_of(model))
