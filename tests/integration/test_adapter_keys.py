"""Adapters on packed models are whole or refused: by exact names, whatever the adapter is called and brings along."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import logits_of, make_model
from transformers import AutoModelForCausalLM

import lowra
from lowra.generation.loading import load_model
from lowra.integrations.exporting import export_adapter


def load(folder, rows=None):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if rows is not None:
        torch.manual_seed(7)
        model.resize_token_embeddings(rows)
    return model


def trained(model, adapter="default", seed=1, **options):
    """The model with a LoRA whose tensors, and those of whole modules that it trains, are changed."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | options))
    model = get_peft_model(model, config, adapter_name=adapter)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model.eval()


WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}
# options of LoraConfig, rows of the embeddings, save_embedding_layers
BROUGHT_ALONG = {
    "whole modules": (WHOLE, None, "auto"),
    "the head alone": ({"modules_to_save": ["lm_head"]}, None, "auto"),
    "a norm": ({"modules_to_save": ["norm"]}, None, "auto"),
    "whole modules twice": (WHOLE, None, True),
    "embeddings as they are": ({}, None, True),
    "new tokens": ({}, 100, "auto"),
    "new tokens trained": (WHOLE, 100, "auto"),
    "new tokens, the head alone": ({"modules_to_save": ["lm_head"]}, 100, "auto"),
    "some tokens": ({"trainable_token_indices": [3, 5, 7]}, None, "auto"),
    "some tokens by module": ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, None, True),
    "some new tokens": ({"trainable_token_indices": [97, 98]}, 100, "auto"),
    "adapted embeddings": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, None, "auto"),
    "adapted new embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, 100, "auto"),
    "tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None, "auto"),
    "DoRA": ({"use_dora": True}, None, "auto"),
    "DoRA and whole modules": ({"use_dora": True, **WHOLE}, None, True),
    "ranks": (
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"q_proj": 3}},
        None,
        "auto",
    ),
    "biases": ({"lora_bias": True}, None, "auto"),
    "one layer": ({"layers_to_transform": [1], "layers_pattern": "layers"}, None, "auto"),
    "replicated layers": ({"layer_replication": [[0, 2], [0, 1]]}, None, "auto"),
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Packed, with embeddings that are also the head."""
    above = tmp_path_factory.mktemp("tied")
    make_model("LlamaForCausalLM", tie_word_embeddings=True).save_pretrained(above / "dense")
    lowra.quantize_checkpoint(str(above / "dense"), above / "packed", lowra.LowRAConfig(bits=1.5), progress=False)
    return above / "packed"


@pytest.mark.parametrize("base", ["own head", "tied head"])
@pytest.mark.parametrize("case", BROUGHT_ALONG)
def test_what_an_adapter_brings_along_is_loaded_and_resumed(packed_llama, tied, tmp_path, case, base):
    folder = packed_llama if base == "own head" else tied
    options, rows, embeddings = BROUGHT_ALONG[case]
    model = trained(load(folder, rows), **options)
    expected = logits_of(model)
    model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    again = PeftModel.from_pretrained(load(folder, rows), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits_of(again), expected)
    names = [name for name, p in again.named_parameters() if p.requires_grad]
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    for parameter in again.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    again.load_adapter(tmp_path, "default", is_trainable=True)  # as the Trainer resumes
    # the factors are the same; mapped from the file they may lie so that a product sums in another order
    torch.testing.assert_close(logits_of(again.eval()), expected, rtol=1e-5, atol=1e-6)


NAMES = [
    ("law-v2", "law"), ("default", "de"), ("law", "law-v2"), ("a", "lora"), ("x", "A"), ("q", "q_proj"), ("1", "0"),
    ("weight", "w"), ("layers", "default"), ("base_layer", "base"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), NAMES)
@pytest.mark.parametrize("options", [{}, WHOLE], ids=["plain", "whole modules"])
def test_names_within_names(packed_llama, tmp_path, first, second, options):
    expected = {}
    for seed, name in enumerate((first, second)):
        model = trained(load(packed_llama), seed=seed, **options)
        expected[name] = logits_of(model)
        model.save_pretrained(tmp_path / name)
    both = PeftModel.from_pretrained(load(packed_llama), tmp_path / first, adapter_name=first)
    both.load_adapter(tmp_path / second, second)
    for name, logits in expected.items():
        both.set_adapter(name)
        assert torch.equal(logits_of(both.eval()), logits)


def test_mixed_models(packed_llama, tmp_path):
    model = trained(load(packed_llama))
    model.save_pretrained(tmp_path)
    mixed = PeftMixedModel.from_pretrained(load(packed_llama), tmp_path).eval()
    assert torch.equal(logits_of(mixed), logits_of(model))
    mixed.load_adapter(tmp_path, "second")


@pytest.mark.parametrize("name", ["default", "other"])
def test_deleted_and_loaded_again(packed_llama, tmp_path, name):
    start = packed_llama / "initial_adapter"
    model = PeftModel.from_pretrained(load(packed_llama), start).eval()
    expected = logits_of(model)
    model.delete_adapter("default")
    model.load_adapter(start, name)
    model.set_adapter(name)
    assert torch.equal(logits_of(model), expected)


def test_the_record_of_a_deleted_adapter_is_gone(packed_llama, tmp_path):
    model = PeftModel.from_pretrained(load(packed_llama), packed_llama / "initial_adapter", "start")
    model.load_adapter(packed_llama / "initial_adapter", "other")
    model.delete_adapter("start")
    model.add_adapter("start", LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    records = {name: json.loads((tmp_path / name / "lowra_base.json").read_text()) for name in ("start", "other")}
    assert "init" not in records["start"] and records["other"]["init"] == "loftq"


def lose(*parts):
    def change(tensors):
        key = next(key for key in sorted(tensors) if all(part in key for part in parts))
        del tensors[key]

    return change


def gain(key):
    return lambda tensors: tensors.update({key: torch.zeros(2)})


DAMAGED = {
    "a factor": ({}, lose("layers.1", "lora_A"), r"lacks 1 tensor\(s\): .*layers.1.*lora_A"),
    "a factor under another's name": ({}, lose("lora_B"), r"lacks 1 tensor"),
    "a magnitude": ({"use_dora": True}, lose("magnitude"), r"lacks 1 tensor\(s\): .*lora_magnitude_vector"),
    "a module": (WHOLE, lose("lm_head"), r"lacks base_model.model.lm_head.weight"),
    "tokens": ({"trainable_token_indices": [3]}, lose("trainable_tokens_delta"), r"lacks .*trainable_tokens_delta"),
    "a bias": ({"lora_bias": True}, lose("lora_B.bias"), r"lacks 1 tensor\(s\): .*lora_B.default.bias"),
    "too much": ({}, lambda t: t.update({"base_model.model.model.layers.7.x": torch.zeros(2)}), "holds, .*layers.7.x"),
    "embeddings too much": (
        WHOLE,
        lambda t: t.update({"base_model.model.lm_head.x": torch.zeros(2)}),
        "holds, .*head.x",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("name", ["default", "lora", "law"])
def test_what_is_missing_or_left_over_is_named(packed_llama, tmp_path, case, name):
    options, change, message = DAMAGED[case]
    trained(load(packed_llama), **options).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message.replace("default", name)):
        PeftModel.from_pretrained(load(packed_llama), tmp_path, adapter_name=name)


def test_transformers_loads_whole_adapters_or_none(packed_llama, tmp_path, transformers_loads_adapters):
    model = trained(load(packed_llama), **WHOLE)
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    plain = load(packed_llama)
    plain.load_adapter(str(tmp_path / "whole"), "law-v2")
    assert torch.equal(logits_of(plain.eval()), logits_of(model))
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "adapter_model.safetensors")
    lose("lora_A")(tensors)
    save_file(tensors, tmp_path / "damaged" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\): .*lora_A.law.weight"):
        plain.load_adapter(str(tmp_path / "damaged"), "law")


def converted(packed, folder):
    """A trained adapter that began as the initial one, without that start, and what it was before, as PeftModel."""
    shutil.copytree(packed / "initial_adapter", folder / "start")
    model = PeftModel.from_pretrained(load(packed), packed / "initial_adapter", is_trainable=True)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    model.eval().save_pretrained(folder / "plain")
    model.save_pretrained(folder / "out", path_initial_model_for_weight_conversion=str(folder / "start"))
    return folder / "out", model


def test_transformers_loads_converted_adapters(packed_llama, dense_llama, tmp_path, transformers_loads_adapters):
    adapter, _ = converted(packed_llama, tmp_path)
    plain = load(dense_llama)
    plain.load_adapter(str(adapter))
    assert torch.equal(logits_of(plain.eval()), logits_of(PeftModel.from_pretrained(load(dense_llama), adapter).eval()))


@pytest.mark.parametrize("start", ["loftq", "pissa", "lora"])
def test_converted_adapters_belong_to_the_original(dense_llama, tmp_path, start):
    """PEFT's `path_initial_model_for_weight_conversion` takes the start out of an adapter."""
    packed = tmp_path / "packed"
    recipe = lowra.AdapterRecipe(rank=4, method=start)
    lowra.quantize_checkpoint(str(dense_llama), packed, lowra.LowRAConfig(bits=1.5), recipe, progress=False)
    _, model = converted(packed, tmp_path)
    record = json.loads((tmp_path / "out" / "lowra_base.json").read_text())
    assert record["converted_from"] == start and "nominal_bits" not in record and "init" not in record

    found = PeftModel.from_pretrained(load(dense_llama), tmp_path / "out").eval()
    trained_again = PeftModel.from_pretrained(load(packed), tmp_path / "plain")
    expected = lowra.merge_into_dense(trained_again, original=dense_llama, initial=packed / "initial_adapter")
    torch.testing.assert_close(logits_of(found), logits_of(expected), rtol=1e-4, atol=1e-5)

    if start == "lora":  # nothing was taken out
        again = PeftModel.from_pretrained(load(packed), tmp_path / "out").eval()
        torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(
            ValueError, match=f"converted for the original .* its start, {start}, .* has been taken out"
        ):
            PeftModel.from_pretrained(load(packed), tmp_path / "out")
        PeftModel.from_pretrained(load(packed), tmp_path / "out", any_base=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_diverged_is_refused_where_it_would_be_used(packed_llama, tmp_path, value):
    model = PeftModel.from_pretrained(load(packed_llama), packed_llama / "initial_adapter")
    factor = next(parameter for name, parameter in model.named_parameters() if "lora_B" in name)
    factor.data[0, 0] = value
    model.save_pretrained(tmp_path / "diverged")
    message = r"lora_B.* has 1 NaN or infinite values of \d+: the training diverged"
    with pytest.raises(ValueError, match=message):
        load_model(str(packed_llama), str(tmp_path / "diverged"), "cpu")
    with pytest.raises(ValueError, match=message):
        export_adapter(tmp_path / "diverged", packed_llama / "initial_adapter", tmp_path / "exported")
