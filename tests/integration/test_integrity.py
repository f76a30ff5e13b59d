"""Damaged packed checkpoints: found when they are loaded and by `lowra verify`, each by the name of the tensor."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import logits_of, make_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import lowra
from lowra.checkpoints.integrity import DIGESTS_FILE, find_tensors
from lowra.checkpoints.whole_files import OpenFiles
from lowra.commands import main
from lowra.quantization import assembling

LAYER = "model.layers.1.mlp.down_proj"
OTHER = "model.layers.0.mlp.down_proj"  # of the same shape


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module", params=["double_quant", "float16", "float32"])
def packed(request, dense_llama, tmp_path_factory):
    """A packed LLaMA with each storage of scales."""
    folder = tmp_path_factory.mktemp("integrity") / request.param
    config = lowra.LowRAConfig(bits=1.75, scales=request.param)
    lowra.quantize_checkpoint(str(dense_llama), folder, config, progress=False)
    return folder


@pytest.fixture
def copied(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copied")


def change(folder, how, metadata=True):
    """Rewrites the weights as any program would that knows safetensors."""
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"} if metadata else None)


def flip(name, place=0, bit=0):
    def how(tensors):
        content = tensors[name].view(-1).view(torch.uint8)
        content[place] ^= 1 << bit

    return how


def swap(one, other):
    def how(tensors):
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    return how


def put(name, value, place=0):
    def how(tensors):
        tensors[name].view(-1)[place] = value

    return how


DAMAGE = {
    "codes": (flip(f"{LAYER}.weight", 7), f"{LAYER}.weight"),
    "last byte of the codes": (flip(f"{LAYER}.weight", -1, 7), f"{LAYER}.weight"),
    "scales": (flip(f"{LAYER}.scales", 2), f"{LAYER}.scales"),
    "levels": (flip(f"{LAYER}.levels", 4), f"{LAYER}.levels"),
    "norm": (flip("model.norm.weight", 1, 3), "model.norm.weight"),
    "head": (flip("lm_head.weight", 999), "lm_head.weight"),
    "embeddings": (flip("model.embed_tokens.weight", 1000), "model.embed_tokens.weight"),
    "swapped levels": (swap(f"{LAYER}.scales", f"{OTHER}.scales"), f"{OTHER}.scales"),
    "swapped head and embeddings": (swap("lm_head.weight", "model.embed_tokens.weight"), "lm_head.weight, model.embed"),
    "permuted precisions": (lambda t: t.update({f"{LAYER}.row_bits": t[f"{LAYER}.row_bits"].flip(0)}), "row_bits"),
    "descending levels": (lambda t: t.update({f"{LAYER}.levels": t[f"{LAYER}.levels"].flip(0)}), f"{LAYER}.levels"),
    "left-over buffer": (
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        "though they were not written with it.*inv_freq",
    ),
    "another type": (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}), "model.norm.weight"),
}


def test_every_kind_of_damage_is_found(packed, tmp_path, capsys):
    for number, (how, name) in enumerate(DAMAGE.values()):
        folder = shutil.copytree(packed, tmp_path / str(number))
        change(folder, how, metadata=number % 2 == 0)
        with pytest.raises(ValueError, match=name):
            load(folder)
        assert main(["verify", str(folder)]) == 2
        assert name.rpartition("*")[2] in capsys.readouterr().err


def test_steps_of_scales_are_checked(dense_llama, tmp_path):
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "packed", lowra.LowRAConfig(), progress=False)
    change(tmp_path / "packed", flip(f"{LAYER}.scale_steps", 1))
    with pytest.raises(ValueError, match=f"{LAYER}.scale_steps"):
        load(tmp_path / "packed")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("leaf", ["levels", "scales", "scale_steps"])
def test_tables_are_finite_whatever_the_digests_say(copied, leaf, value):
    name = f"{LAYER}.{leaf}"
    stored = load_file(copied / "model.safetensors").get(name)
    if stored is None or not stored.is_floating_point():
        pytest.skip("this storage of scales has no such numbers")
    change(copied, put(name, value))
    recorded = json.loads((copied / DIGESTS_FILE).read_text())
    for keep in (True, False):
        if keep:  # digests made anew over the damage
            with pytest.raises(ValueError, match=f"NaN or infinite values stand in 1 tensor.*{name}"):
                find_tensors(OpenFiles([copied / "model.safetensors"]))
        else:  # a checkpoint of an earlier version
            forget_digests(copied)
        with pytest.raises(ValueError, match=f"NaN or infinite values stand in 1 tensor.*{name}"):
            load(copied)
    assert recorded["algorithm"] == "xxh3_128"


def forget_digests(folder, packing=True):
    """Makes of a checkpoint one that an earlier version wrote."""
    (folder / DIGESTS_FILE).unlink()
    config = json.loads((folder / "config.json").read_text())
    for name in ("packing", "initial_adapter", "calibration") if packing else ():
        del config["quantization_config"][name]
    (folder / "config.json").write_text(json.dumps(config))


def test_checkpoints_of_earlier_versions_load(copied, packed, caplog, capsys):
    forget_digests(copied)
    with caplog.at_level(logging.WARNING, logger="lowra"):
        model = load(copied)
    assert not caplog.records
    assert torch.equal(logits_of(model), logits_of(load(packed)))
    # they learn what packing they are, and have digests once they are saved
    assert model.config.quantization_config.packing == load(packed).config.quantization_config.packing
    assert main(["verify", str(copied)]) == 0
    assert "cannot be told" in capsys.readouterr().out
    change(copied, lambda t: t.update({f"{LAYER}.levels": t[f"{LAYER}.levels"].flip(0)}))
    with caplog.at_level(logging.WARNING, logger="lowra"):
        load(copied)
    assert any(f"{LAYER}.levels" in record.getMessage() for record in caplog.records)


def test_lost_digests_are_said_and_packed_weights_still_checked(copied, caplog, capsys):
    forget_digests(copied, packing=False)
    with caplog.at_level(logging.WARNING, logger="lowra"):
        load(copied)
    assert any(f"has lost its {DIGESTS_FILE}" in record.getMessage() for record in caplog.records)
    assert main(["verify", str(copied)]) == 0
    assert "the packed weights are as they were written" in capsys.readouterr().out
    for name in ("weight", "row_bits", "levels", "scales"):
        change(copied, flip(f"{LAYER}.{name}", 1) if name != "row_bits" else DAMAGE["permuted precisions"][0])
        with pytest.raises(ValueError, match="not those that its config.json was written with"):
            load(copied)
        change(copied, flip(f"{LAYER}.{name}", 1) if name != "row_bits" else DAMAGE["permuted precisions"][0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ('{"algorithm": "md5"}', "of the kind 'md5'"),
        ('{"algorithm": "xxh3_128", "tensors": [], "config": {}}', "lacks `tensors` or `config`"),
        ('{"algorithm": "xxh3_128", "tensors": {}, "config": {}}', "though they were not written with it"),
        ('{"algorithm": "xxh3_128", "tensors": {"model.norm.weight": null}, "config": {}}', "has other|though"),
    ],
)
def test_damaged_digests_are_refused(copied, content, message):
    (copied / DIGESTS_FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(copied)


def test_weights_of_another_packing_beside_this_config_are_refused(packed_llama, dense_llama, tmp_path):
    other = tmp_path / "other"
    lowra.quantize_checkpoint(str(dense_llama), other, lowra.LowRAConfig(bits=1.5), progress=False)
    for taken in ("model.safetensors", DIGESTS_FILE):  # the second: both, so that they fit one another
        shutil.copyfile(packed_llama / taken, other / taken)
        with pytest.raises(ValueError, match="has other bytes|its config.json was written with"):
            load(other)


def test_verify_knows_the_initial_adapter_of_another_packing(packed_llama, dense_llama, tmp_path, capsys):
    other = tmp_path / "other"
    config, recipe = lowra.LowRAConfig(bits=1.5, refine=1), lowra.AdapterRecipe(rank=4)
    lowra.quantize_checkpoint(str(dense_llama), other, config, recipe, progress=False)
    assert main(["verify", str(other)]) == 0
    shutil.rmtree(other / "initial_adapter")
    shutil.copytree(packed_llama / "initial_adapter", other / "initial_adapter")
    assert main(["verify", str(other)]) == 2
    assert "belongs to another packing than the checkpoint it stands in (refine=0 vs 1" in capsys.readouterr().err


def test_changed_settings_are_said(copied, caplog, capsys):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.5, "transformers_version": "9"}))
    with caplog.at_level(logging.WARNING, logger="lowra"):
        load(copied)
    assert [r.getMessage() for r in caplog.records if "rms_norm_eps is 0.5 and was 1e-06" in r.getMessage()]
    assert main(["verify", str(copied)]) == 2
    assert "rms_norm_eps is 0.5 and was 1e-06" in capsys.readouterr().err


def test_of_nested_settings_those_that_differ_are_said(copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["error"] = 0.25
    config["rope_parameters"] = {**(config.get("rope_parameters") or {}), "rope_theta": 5.0}
    config["chunk_names"] = ["x" * 1000]
    (copied / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(copied)]) == 2
    said = capsys.readouterr().err
    assert "quantization_config.error is 0.25 and was" in said and "rope_parameters.rope_theta is 5.0" in said
    assert "menu" not in said and len(said) < 800


def test_saving_writes_digests_of_what_is_saved(packed, tmp_path, caplog):
    model = load(packed)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert main(["verify", str(tmp_path / "again")]) == 0
    before = model.config.quantization_config.packing
    with torch.no_grad():
        model.get_submodule(LAYER).levels[0] += 0.5
        model.model.norm.weight += 0.25
    model.save_pretrained(tmp_path / "changed")
    with caplog.at_level(logging.WARNING, logger="lowra"):
        changed = load(tmp_path / "changed")
    assert not caplog.records and torch.equal(logits_of(changed), logits_of(model))
    after = changed.config.quantization_config.packing
    assert after["codes"] == before["codes"] and after["tables"] != before["tables"]


def test_k_bit_preparation_leaves_the_packing(packed, tmp_path):
    """It saves float16 tables as float32, which are the same numbers."""
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(load(packed))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.quantization_config.packing == load(packed).config.quantization_config.packing


def test_packing_while_loading_has_the_identity_of_what_it_saves(dense_llama, tmp_path):
    model = load(dense_llama, load_in_lowra=True, lowra_bits=1.5)
    made = model.config.quantization_config.packing
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["packing"] == made
    assert load(tmp_path).config.quantization_config.packing == made
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_other_classes_check_the_whole_files(packed, tmp_path, kind):
    kind.from_pretrained(packed)
    folder = shutil.copytree(packed, tmp_path / "copied")
    change(folder, flip("lm_head.weight", 3))
    with pytest.raises(ValueError, match="lm_head.weight"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "Qwen3MoeForCausalLM", "T5ForConditionalGeneration"])
def test_experts_embeddings_and_tied_heads(architecture, tmp_path):
    make_model(architecture).save_pretrained(tmp_path / "dense")
    config = lowra.LowRAConfig(bits=2, quantize_embeddings=architecture != "Qwen3MoeForCausalLM")
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", config, progress=False)
    assert main(["verify", str(tmp_path / "packed")]) == 0
    names = [name for name in load_file(tmp_path / "packed" / "model.safetensors") if name.endswith(".levels")]
    change(tmp_path / "packed", flip(names[-1], 2))
    with pytest.raises(ValueError, match=names[-1]):
        type(make_model(architecture)).from_pretrained(tmp_path / "packed")


def test_quantising_reads_back_what_it_wrote(dense_llama, tmp_path, monkeypatch):
    whole = assembling.save_tensors

    def failing(tensors, path, *args):
        whole(tensors, path, *args)
        content = bytearray(path.read_bytes())
        content[-1] ^= 4
        path.write_bytes(content)

    monkeypatch.setattr(assembling, "save_tensors", failing)
    with pytest.raises(ValueError, match="reads back otherwise in 1 tensor"):
        lowra.quantize_checkpoint(str(dense_llama), tmp_path / "packed", lowra.LowRAConfig(), progress=False)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("size", [8, 96, 128])
def test_groups_are_those_that_were_packed(copied, packed, capsys, size):
    """As many groups as before, of other borders, are other weights: a setting that is nobody's to change."""
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["group_size"] = size
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"groups of (64|{size})"):
        load(copied)
    assert main(["verify", str(copied)]) == main(["inspect", str(copied)]) == 2
    assert "group" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"tensors": {}}, {"files": {}}, {"files": 7}, {"packing": None}, {"packing": [1]}])
def test_digests_that_lack_something_end_in_a_sentence_or_do_no_harm(copied, packed, change):
    content = json.loads((copied / DIGESTS_FILE).read_text())
    (copied / DIGESTS_FILE).write_text(json.dumps({**content, **change}))
    if "files" in change:
        assert torch.equal(logits_of(load(copied)), logits_of(load(packed)))
    else:
        with pytest.raises(ValueError, match="not written with"):
            load(copied)
