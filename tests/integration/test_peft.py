"""Adapters on packed bases: training, several at once, saving and loading, merging, and whose base they belong to."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from small_models import inputs_of, logits_of, losses_of, make_model
from transformers import AutoModelForCausalLM

import lowra
from lowra.integrations.peft import LowRALoraLinear

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def adapted(folder, seed=1, **options):
    """A packed model with a LoRA whose factors are both random, as training leaves them."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options))
    model = get_peft_model(load(folder), config)
    randomise(model, seed)
    return model.eval()


def randomise(model, seed, adapter="default"):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = parameter.data + noise if "magnitude" in name else noise


def packed_bytes(model):
    return {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}


@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_reloads_and_merges(packed_llama, tmp_path, kind):
    model = adapted(packed_llama, **KINDS[kind])
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj, LowRALoraLinear)
    before = packed_bytes(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = losses_of(model, inputs_of(model)["input_ids"], optimizer, steps=3)
    assert losses[-1] < losses[0]
    after = packed_bytes(model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(load(packed_llama), tmp_path / "adapter").eval()
    logits = logits_of(model)
    assert torch.equal(logits_of(reloaded), logits)

    merged = lowra.merge_into_dense(reloaded)
    torch.testing.assert_close(logits_of(merged), logits, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    plain = load(tmp_path / "merged")
    assert not any(isinstance(module, lowra.LowRALinear) for module in plain.modules())
    assert torch.equal(logits_of(plain), logits_of(merged))


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge_leave_the_packed_layer_as_it_was(packed_llama, kind):
    model = adapted(packed_llama, **KINDS[kind])
    logits = logits_of(model)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), logits, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), logits)


OTHER_METHODS = {
    "AdaLora": {"total_step": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "Vera": {"r": 8},
    "OFT": {"r": 0, "oft_block_size": 8},
}


@pytest.mark.parametrize("to", ["dequantised", "original"])
@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_train_reload_and_merge(packed_llama, dense_llama, tmp_path, method, to):
    config = getattr(peft, f"{method}Config")(target_modules=["q_proj", "down_proj"], **OTHER_METHODS[method])
    model = get_peft_model(load(packed_llama), config)
    tokens = inputs_of(model)["input_ids"]
    model(input_ids=tokens, labels=tokens).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02
    model.eval().save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(packed_llama), tmp_path).eval()
    assert torch.equal(logits_of(reloaded), logits_of(model))
    if to == "dequantised":
        merged, expected = lowra.merge_into_dense(reloaded), model
    else:
        merged = lowra.merge_into_dense(reloaded, original=dense_llama)
        expected = PeftModel.from_pretrained(load(dense_llama), tmp_path).eval()
    torch.testing.assert_close(logits_of(merged), logits_of(expected), rtol=1e-3, atol=1e-4)
    assert not hasattr(merged.config, "quantization_config")


def test_unload_gives_the_packed_base_back(packed_llama):
    assert torch.equal(logits_of(adapted(packed_llama).unload()), logits_of(load(packed_llama)))


def test_merge_and_unload_computes_right_but_is_not_saved_as_packed(packed_llama, tmp_path):
    model = adapted(packed_llama)
    logits = logits_of(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="merge_into_dense"):
        merged.save_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_merged_models_have_the_layers_of_their_class(architecture, tmp_path):
    model_class = getattr(transformers, architecture)
    make_model(architecture).save_pretrained(tmp_path / "dense")
    packed = model_class.from_pretrained(tmp_path / "dense", load_in_lowra=True, lowra_bits=2.0).eval()
    model = get_peft_model(packed, LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=True)).eval()
    randomise(model, 1)
    logits = logits_of(model)
    merged = lowra.merge_into_dense(model)
    torch.testing.assert_close(logits_of(merged), logits, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    plain = model_class.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(plain), logits_of(merged))
    same = {name: type(module) for name, module in make_model(architecture).named_modules()}
    assert {name: type(module) for name, module in plain.named_modules()} == same


def test_bfloat16_bases_merge_into_bfloat16(packed_llama):
    model = get_peft_model(load(packed_llama, dtype=torch.bfloat16), LoraConfig(r=4, target_modules="all-linear"))
    randomise(model, 1)
    merged = lowra.merge_into_dense(model)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert logits_of(merged).dtype == torch.bfloat16


def test_merging_into_the_original_weights(packed_llama, dense_llama):
    model = PeftModel.from_pretrained(load(packed_llama), packed_llama / "initial_adapter")
    start = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    trained = dict(model.named_parameters())
    factors = [f"{prefix}.lora_{side}.default.weight" for side in "BA"]
    scaling = model.get_submodule(prefix).scaling["default"]
    expected = load(dense_llama).model.layers[1].mlp.up_proj.weight + scaling * (
        trained[factors[0]] @ trained[factors[1]] - start[factors[0]] @ start[factors[1]]
    )
    with pytest.raises(ValueError, match="began as loftq"):
        lowra.merge_into_dense(model, original=dense_llama)
    merged = lowra.merge_into_dense(model, original=dense_llama, initial=packed_llama / "initial_adapter")
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, expected, rtol=1e-5, atol=1e-6)
    assert not hasattr(merged.config, "quantization_config")


def test_an_untrained_adapter_merges_into_the_original_itself(packed_llama, dense_llama):
    model = PeftModel.from_pretrained(load(packed_llama), packed_llama / "initial_adapter")
    merged = lowra.merge_into_dense(model, original=dense_llama, initial=packed_llama / "initial_adapter")
    torch.testing.assert_close(logits_of(merged), logits_of(load(dense_llama)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["cloq", "pissa"])
def test_every_start_that_makes_up_for_the_quantisation_is_asked_for(packed_llama, dense_llama, tmp_path, start):
    shutil.copytree(packed_llama / "initial_adapter", tmp_path / "adapter")
    record = tmp_path / "adapter" / "lowra_base.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "init": start}))
    model = PeftModel.from_pretrained(load(packed_llama), tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"began as {start}"):
        lowra.merge_into_dense(model, original=dense_llama)


def test_another_original_is_refused(packed_llama, tmp_path):
    make_model("LlamaForCausalLM", seed=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="belongs to another base"):
        lowra.merge_into_dense(adapted(packed_llama), original=tmp_path, initial=packed_llama / "initial_adapter")


def test_dense_models_are_sent_to_peft(dense_llama):
    model = get_peft_model(load(dense_llama), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="no packed base"):
        lowra.merge_into_dense(model)


def test_several_adapters_and_mixed_batches(packed_llama, tmp_path):
    options = {"r": 4, "target_modules": "all-linear"}
    model = adapted(packed_llama)
    model.add_adapter("second", LoraConfig(**options, use_rslora=True))
    randomise(model, 2, "second")
    tokens = inputs_of(model)["input_ids"]
    alone = {}
    with torch.no_grad():
        for name in ("default", "second"):
            model.set_adapter(name)
            alone[name] = model(input_ids=tokens).logits
        with model.disable_adapter():
            alone["__base__"] = model(input_ids=tokens).logits
        for pair in (("default", "second"), ("second", "__base__")):
            mixed = model(input_ids=tokens, adapter_names=list(pair)).logits
            expected = torch.stack([alone[name][row] for row, name in enumerate(pair)])
            torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(packed_llama), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    again.set_adapter("second")
    assert torch.equal(again.eval()(input_ids=tokens).logits, alone["second"])


def test_the_initial_adapter_is_trainable(packed_llama):
    model = PeftModel.from_pretrained(load(packed_llama), packed_llama / "initial_adapter", is_trainable=True)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 14 and all("lora_" in name for name in trainable)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_starts_that_need_the_original_weights_are_refused(packed_llama, init):
    options = {"loftq_config": LoftQConfig()} if init == "loftq" else {}
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, **options)
    with pytest.raises(ValueError, match="lowra quantize MODEL --rank"):
        get_peft_model(load(packed_llama), config)


@pytest.fixture(scope="module")
def other_llama(tmp_path_factory):
    """A packed LLaMA of the same shapes and other weights."""
    above = tmp_path_factory.mktemp("other")
    make_model("LlamaForCausalLM", seed=9).save_pretrained(above / "dense")
    config, recipe = lowra.LowRAConfig(bits=1.5), lowra.AdapterRecipe(rank=4)
    lowra.quantize_checkpoint(str(above / "dense"), above / "packed", config, recipe, progress=False)
    return above / "packed"


def test_adapters_of_another_base_are_refused(packed_llama, other_llama, tmp_path):
    adapted(packed_llama).save_pretrained(tmp_path)
    for adapter in (packed_llama / "initial_adapter", tmp_path):
        with pytest.raises(ValueError, match="belongs to another base.*any_base=True"):
            PeftModel.from_pretrained(load(other_llama), adapter)
    forced = PeftModel.from_pretrained(load(other_llama), tmp_path, any_base=True)
    assert torch.isfinite(logits_of(forced)).all()


def test_adapters_of_the_same_base_at_other_bits_are_refused(packed_llama, dense_llama):
    other = load(dense_llama, load_in_lowra=True, lowra_bits=2.0)
    with pytest.raises(ValueError, match="at 1.4999 nominal bits, this model has"):
        PeftModel.from_pretrained(other, packed_llama / "initial_adapter")


def test_the_record_of_the_start_survives_training(packed_llama, tmp_path):
    model = PeftModel.from_pretrained(load(packed_llama), packed_llama / "initial_adapter", is_trainable=True)
    model.save_pretrained(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "lowra_base.json").read_text())
    assert record == json.loads((packed_llama / "initial_adapter" / "lowra_base.json").read_text())
    assert record["init"] == "loftq"


def test_adapters_without_a_record_load(packed_llama, tmp_path):
    shutil.copytree(packed_llama / "initial_adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "lowra_base.json").unlink()
    PeftModel.from_pretrained(load(packed_llama), tmp_path / "adapter")


@pytest.mark.parametrize("float32", [False, True])
def test_prepare_for_training(packed_llama, float32):
    plain = load(packed_llama, dtype=torch.bfloat16)
    model = lowra.prepare_for_training(load(packed_llama, dtype=torch.bfloat16), float32_norms_and_head=float32)
    assert model.is_gradient_checkpointing and not model.config.use_cache
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = torch.float32 if float32 else torch.bfloat16
    assert model.model.norm.weight.dtype == expected and model.lm_head.weight.dtype == expected
    for name, tensor in packed_bytes(plain).items():
        assert torch.equal(model.get_parameter(name), tensor)
    for name, module in plain.named_modules():
        if isinstance(module, lowra.LowRALinear):
            assert torch.equal(model.get_submodule(name).levels, module.levels)
    trained = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomise(trained, 1)
    tokens = inputs_of(trained)["input_ids"]
    trained.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_checkpointing_changes_no_gradient(packed_llama):
    grads = []
    for checkpointing in (False, True):
        model = lowra.prepare_for_training(load(packed_llama), gradient_checkpointing=checkpointing)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        randomise(model, 1)
        tokens = inputs_of(model)["input_ids"]
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_pefts_own_preparation_breaks_nothing(packed_llama, tmp_path):
    model = prepare_model_for_kbit_training(load(packed_llama))
    assert torch.equal(logits_of(model), logits_of(load(packed_llama)))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))
