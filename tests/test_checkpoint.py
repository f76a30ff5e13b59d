"""Dense checkpoints as they come: indices, shards, names and types that are not what they should be."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BartConfig, BartModel, MarianConfig, MarianMTModel

from lowra import LowRAConfig, LowRALinear, quantize_checkpoint
from lowra.checkpoints.dense import empty_model, safetensors_files

SEQ2SEQ = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def changed(folder, target, change):
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def quantize(model, output):
    return quantize_checkpoint(str(model), output, LowRAConfig(bits=1.5), device="cpu", progress=False)


@pytest.mark.parametrize(("content", "error"), [("{", "JSONDecodeError"), ("{}", "weight_map"), ("[]", "TypeError")])
def test_a_damaged_index_is_named(tmp_path, content, error):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json is damaged .*{error}"):
        safetensors_files(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="no model.safetensors, and its model-00001-of-00002.safetensors is of"):
        safetensors_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="has no model-00002-of-00002.safetensors"):
        safetensors_files(tmp_path)


def test_a_single_file_goes_before_shards_as_in_transformers(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert safetensors_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_other_types_are_refused_by_name(tiny_llama, tmp_path, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    model = changed(tiny_llama, tmp_path / "model", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=f"{name} is stored as .*16 or 32 bits"):
        quantize(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_tensors_that_stay_dense_are_looked_at_too(tiny_llama, tmp_path, name):
    damaged = changed(tiny_llama, tmp_path / "nan", lambda tensors: tensors[name].view(-1)[3:5].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"Tensor {name} holds 2 NaN or Inf"):
        quantize(damaged, tmp_path / "out")
    short = changed(tiny_llama, tmp_path / "short", lambda tensors: tensors.update({name: tensors[name][:8].clone()}))
    with pytest.raises(ValueError, match=f"Tensor {name} has shape"):
        quantize(short, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [damaged, short]


def test_tensors_without_a_place_are_named(tiny_llama, tmp_path, caplog):
    extra = {
        "model.layers.2.mlp.up_proj.weight": torch.zeros(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    with caplog.at_level(logging.WARNING, logger="lowra"):
        quantize(changed(tiny_llama, tmp_path / "model", lambda tensors: tensors.update(extra)), tmp_path / "out")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "holds 1 tensor(s): model.layers.2.mlp.up_proj.weight that LlamaForCausalLM" in message


def test_a_bare_encoder_decoder_gets_its_tied_head(tmp_path):
    """The hub's bart-large names BartModel, which generates nothing."""
    BartModel(BartConfig(**SEQ2SEQ)).save_pretrained(tmp_path / "bart")
    assert type(empty_model(tmp_path / "bart")).__name__ == "BartForConditionalGeneration"
    quantize(tmp_path / "bart", tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["architectures"] == ["BartForConditionalGeneration"]


def test_what_the_class_computes_by_itself_need_not_be_there(tmp_path):
    """Marian's positions are no part of its checkpoints."""
    model = MarianMTModel(MarianConfig(**SEQ2SEQ)).eval()
    model.save_pretrained(tmp_path / "dense")
    assert not any("embed_positions" in name for name in load_file(tmp_path / "dense" / "model.safetensors"))
    quantize(tmp_path / "dense", tmp_path / "packed")
    packed = MarianMTModel.from_pretrained(tmp_path / "packed")
    name = "model.encoder.embed_positions.weight"
    assert torch.equal(packed.get_parameter(name), model.get_parameter(name))


def _norms_in_float32(tensors):
    tensors.update({name: tensor.float() for name, tensor in tensors.items() if "norm" in name})


@pytest.mark.parametrize(
    ("stored", "named", "wanted"),
    [
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.bfloat16, {"dtype": None}, torch.bfloat16),
        (torch.float16, {}, torch.float16),
        (torch.float32, {}, torch.float32),
        (torch.float32, {"torch_dtype": "bfloat16"}, torch.bfloat16),  # what config.json says counts
        (torch.bfloat16, {"dtype": "float32"}, torch.float32),
        ("mixed", {}, torch.bfloat16),
        ("shards", {}, torch.bfloat16),
    ],
)
def test_a_checkpoint_is_packed_in_the_type_that_it_is_stored_in(tiny_llama, tmp_path, stored, named, wanted):
    dense, output = tmp_path / "dense", tmp_path / "packed"
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16 if isinstance(stored, str) else stored
    )
    model.save_pretrained(dense, max_shard_size="50KB" if stored == "shards" else "1GB")
    assert stored != "shards" or len(safetensors_files(dense)) > 1
    if stored == "mixed":
        dense = changed(dense, tmp_path / "mixed", _norms_in_float32)
    config = json.loads((dense / "config.json").read_text())
    del config["dtype"]
    (dense / "config.json").write_text(json.dumps({**config, **named}))
    quantize(dense, output)
    assert json.loads((output / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    packed = AutoModelForCausalLM.from_pretrained(output)
    loaded = AutoModelForCausalLM.from_pretrained(dense, load_in_lowra=True, lowra_bits=1.5)
    for one in (packed, loaded, AutoModelForCausalLM.from_pretrained(dense)):
        assert {one.dtype, one(torch.arange(5)[None]).logits.dtype} == {wanted}
    assert {module.compute_dtype for module in packed.modules() if isinstance(module, LowRALinear)} == {wanted}


@pytest.mark.parametrize("named", ["torch.bfloat16", "bf16", 5, "uint8", {"text_config": "bfloat16"}])
def test_a_type_that_does_not_exist_is_said_in_one_sentence(tiny_llama, tmp_path, named):
    dense = shutil.copytree(tiny_llama, tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "dtype": named}))
    with pytest.raises(ValueError, match="config.json (cannot be read by Transformers|names the dtype)"):
        quantize(dense, tmp_path / "packed")
