"""What PEFT cannot do with packed layers is refused with the reason, before PyTorch speaks of shapes of bytes."""

import json
import shutil

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import ARCHITECTURES, logits_of, make_model
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

import lowra

LAYERS = {"target_modules": ["q_proj", "down_proj"]}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


READ_THE_WEIGHT = {
    "Adamss": {},
    "Deft": {},
    "Delora": {},
    "Frod": {},
    "Glora": {},
    "Hira": {},
    "HRA": {},
    "Lily": {},
    "LoHa": {},
    "LoKr": {},
    "OSF": {},
    "Peanut": {},
    "Psoft": {},
    "Shira": {"r": 4},
    "Supertuning": {},
    "TinyLora": {},
    "UniLora": {},
}


@pytest.mark.parametrize("method", READ_THE_WEIGHT)
def test_methods_that_read_the_weight_are_refused(packed_llama, method):
    kind = getattr(peft, f"{method}Config", None)
    if kind is None:
        pytest.skip(f"PEFT {peft.__version__} has no {method}")
    config = kind(**LAYERS, **READ_THE_WEIGHT[method])
    with pytest.raises(ValueError, match=f"{config.peft_type.value} reads the dense weight .* such as LoRA"):
        get_peft_model(load(packed_llama), config)


def test_they_may_be_put_on_layers_that_stayed_dense(dense_llama):
    config = lowra.LowRAConfig(modules_to_not_convert=["q_proj"])
    model = load(dense_llama, quantization_config=config)
    assert get_peft_model(model, peft.LoHaConfig(target_modules=["q_proj"])).peft_type == "LOHA"


def test_kasa_is_refused(packed_llama):
    if not hasattr(peft, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    config = LoraConfig(r=4, **LAYERS, kasa_config=peft.KasaConfig())
    with pytest.raises(ValueError, match="kasa_config takes apart the original weights"):
        get_peft_model(load(packed_llama), config)


def test_adapters_on_packed_experts_are_refused(tmp_path):
    make_model("MixtralForCausalLM").save_pretrained(tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match="packed experts take no adapter"):
        get_peft_model(load(tmp_path, load_in_lowra=True), config)


def test_single_experts_among_other_modules_are_left_out_with_a_warning(tmp_path, caplog):
    make_model("MixtralForCausalLM").save_pretrained(tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj", "w1", "w2", "w3"])
    with caplog.at_level("WARNING", logger="lowra"):
        model = get_peft_model(load(tmp_path, load_in_lowra=True), config)
    assert "packed experts take no adapter; w1, w2, w3 of target_modules left out" in caplog.text
    assert torch.isfinite(logits_of(model)).all()


def test_dense_blocks_and_shared_experts_of_a_mixture_keep_their_adapters(tmp_path, caplog):
    """PEFT takes their gate_proj for one of the routed experts."""
    fields = {**ARCHITECTURES["Qwen3MoeForCausalLM"], "n_routed_experts": 4, "first_k_dense_replace": 1}
    torch.manual_seed(0)
    dense = Glm4MoeForCausalLM(Glm4MoeConfig(**fields, n_group=1, topk_group=1, n_shared_experts=1)).eval()
    dense.save_pretrained(tmp_path / "dense")
    config, packed = lowra.LowRAConfig(bits=1.5), tmp_path / "packed"
    lowra.quantize_checkpoint(str(tmp_path / "dense"), packed, config, lowra.AdapterRecipe(16), progress=False)
    model = PeftModel.from_pretrained(load(packed), packed / "initial_adapter").eval()
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert {name.partition("layers.")[2] for name in layers} >= {"0.mlp.gate_proj", "1.mlp.shared_experts.down_proj"}
    assert len(layers) == sum(isinstance(module, lowra.LowRALinear) for module in model.modules())
    errors = [(logits_of(found) - logits_of(dense)).norm() for found in (model, load(packed))]
    assert errors[0] < 0.8 * errors[1]
    again = get_peft_model(load(packed), LoraConfig(r=4, target_modules="all-linear"))
    assert len([name for name, module in again.named_modules() if hasattr(module, "lora_A")]) == len(layers)
    # the bare base is used above, which is said; no name of target_modules is
    said = {f"lowra.integrations.{name}_start" for name in ("missing", "stored")}
    assert {record.name for record in caplog.records} <= said


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_other_layers_than_ours_do_not_merge_into_bytes(packed_llama, merge):
    model = get_peft_model(load(packed_llama), peft.VeraConfig(r=8, **LAYERS))
    with pytest.raises(ValueError, match=r"cannot merge into a packed layer: use lowra.merge_into_dense\(peft_model\)"):
        getattr(model, merge)()


def test_prompts_have_nothing_to_merge(packed_llama):
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="PROMPT_TUNING adds to the inputs .* nothing to merge"):
        lowra.merge_into_dense(get_peft_model(load(packed_llama), config))


def test_replicated_layers_are_not_merged_into_the_original(packed_llama, dense_llama):
    config = LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    model = get_peft_model(load(packed_llama), config)
    with pytest.raises(ValueError, match="model.layers.2.self_attn.q_proj is no layer of the original"):
        lowra.merge_into_dense(model, original=dense_llama)


def test_merged_adapters_can_still_be_merged_for_good(packed_llama, dense_llama):
    start = packed_llama / "initial_adapter"
    for options in ({}, {"original": dense_llama, "initial": start}):
        models = [PeftModel.from_pretrained(load(packed_llama), start).eval() for _ in range(2)]
        models[1].merge_adapter()
        one, other = (logits_of(lowra.merge_into_dense(model, **options)) for model in models)
        assert torch.equal(one, other)


def test_the_initial_adapter_says_what_it_is_for(packed_llama):
    config = json.loads((packed_llama / "initial_adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    model = AutoPeftModelForCausalLM.from_pretrained(packed_llama / "initial_adapter").eval()
    expected = PeftModel.from_pretrained(load(packed_llama), packed_llama / "initial_adapter").eval()
    assert torch.equal(logits_of(model), logits_of(expected))


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def change(folder, alter):
    tensors = load_file(folder / "adapter_model.safetensors")
    alter(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def cut_short(folder):
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:-100])


DAMAGED = {
    "missing": (lambda f: change(f, lambda t: t.pop(KEY)), r"lacks 1 tensor\(s\): .*layers.1.mlp.up_proj.lora_A"),
    "left over": (
        lambda f: change(f, lambda t: t.update({KEY.replace("layers.1", "layers.9"): torch.zeros(4, 64)})),
        r"holds, .* 1 tensor\(s\): .*layers.9.mlp.up_proj.lora_A",
    ),
    "another shape": (
        lambda f: change(f, lambda t: t.update({KEY: t[KEY][:, :8].clone()})),
        "does not fit this model: .*size mismatch for .*layers.1.mlp.up_proj.lora_A",
    ),
    "cut short": (cut_short, "adapter_model.safetensors cannot be read .* cut short"),
    "no record": (lambda f: (f / "lowra_base.json").write_text("{"), "lowra_base.json is damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_adapters_are_refused(packed_llama, tmp_path, case):
    damage, message = DAMAGED[case]
    shutil.copytree(packed_llama / "initial_adapter", tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PeftModel.from_pretrained(load(packed_llama), tmp_path / "adapter")


def test_an_adapter_without_weights_is_not_looked_for_on_the_hub(packed_llama, tmp_path):
    shutil.copy(packed_llama / "initial_adapter" / "adapter_config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="has an adapter_config.json and no adapter_model.safetensors"):
        PeftModel.from_pretrained(load(packed_llama), tmp_path)


def test_an_adapter_that_makes_up_for_packing_is_not_put_on_a_dense_model(packed_llama, dense_llama):
    start = packed_llama / "initial_adapter"
    with pytest.raises(ValueError, match="began as loftq .* this model is dense"):
        PeftModel.from_pretrained(load(dense_llama), start)
    packed = load(packed_llama)
    expected = logits_of(PeftModel.from_pretrained(packed, start).eval())
    dequantised = load(packed_llama)
    dequantised.dequantize()
    found = logits_of(PeftModel.from_pretrained(dequantised, start, any_base=True).eval())
    torch.testing.assert_close(found, expected)


def test_adapters_loaded_by_transformers_are_checked_too(packed_llama, dense_llama, transformers_loads_adapters):
    start = str(packed_llama / "initial_adapter")
    model = load(packed_llama)
    model.load_adapter(start)
    expected = PeftModel.from_pretrained(load(packed_llama), start).eval()
    assert torch.equal(logits_of(model), logits_of(expected))
    other = load(dense_llama, load_in_lowra=True, lowra_bits=2.0)
    with pytest.raises(ValueError, match="at 1.4999 nominal bits, this model has"):
        other.load_adapter(start)
    other.load_adapter(start, any_base=True)
