"""The main paths on a GPU: packing, loading, offloading, training, generating, and going back to the CPU."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import ARCHITECTURES, assert_same_tensors, inputs_of, logits_of, losses_of, make_model, packed_layers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lowra

GPU = "cuda:0"
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # float32, other orders of summation

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module", autouse=True)
def full_float32():
    """Dense layers beside the packed ones would round to TensorFloat-32 by default of some versions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def devices_of(model) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


@pytest.mark.parametrize("device_map", [{"": 0}, "cuda", "auto", {"": GPU}], ids=["0", "cuda", "auto", "cuda:0"])
def test_a_packed_checkpoint_on_the_gpu_is_the_one_on_the_cpu(packed_llama, device_map):
    model, reference = load(packed_llama, device_map=device_map), load(packed_llama)
    assert devices_of(model) == {"cuda"}
    assert_same_tensors(model, reference)
    torch.testing.assert_close(logits_of(model), logits_of(reference), **CLOSE)


def test_large_tensors_arrive_whole(tmp_path):
    """Larger than the pieces that are read at once, so that tensors are cut and pieces hold several."""
    size = {"hidden_size": 2048, "intermediate_size": 20000, "num_attention_heads": 16, "num_key_value_heads": 16}
    make_model("LlamaForCausalLM", **size).bfloat16().save_pretrained(tmp_path / "dense")
    config = lowra.LowRAConfig(bits=3.0, iterations=1)
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", config, progress=False)
    model, reference = load(tmp_path / "packed", device_map={"": GPU}), load(tmp_path / "packed")
    assert max(layer.weight.numel() for layer in packed_layers(reference).values()) > 9 << 20
    assert_same_tensors(model, reference)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture, tmp_path):
    model_class = getattr(transformers, architecture)
    make_model(architecture).save_pretrained(tmp_path / "dense")
    config = lowra.LowRAConfig(bits=1.5)
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", config, device=GPU, progress=False)
    model = model_class.from_pretrained(tmp_path / "packed", device_map={"": GPU}).eval()
    reference = model_class.from_pretrained(tmp_path / "packed").eval()
    assert packed_layers(model).keys() == packed_layers(reference).keys() != set()
    torch.testing.assert_close(logits_of(model), logits_of(reference), **CLOSE)


@pytest.mark.parametrize("device_map", [{"": 0}, "auto"], ids=["0", "auto"])
def test_quantising_while_loading(dense_llama, tmp_path, device_map):
    loaded = load(dense_llama, load_in_lowra=True, lowra_bits=1.5, device_map=device_map)
    assert devices_of(loaded) == {"cuda"}
    config = lowra.LowRAConfig(bits=1.5)
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "packed", config, device=GPU, progress=False)
    assert_same_tensors(loaded, load(tmp_path / "packed"))


def test_saved_on_the_gpu_and_loaded_anywhere(dense_llama, tmp_path):
    model = load(dense_llama, load_in_lowra=True, lowra_bits=1.5, device_map={"": 0})
    model.save_pretrained(tmp_path / "packed")
    logits = logits_of(model)
    on_gpu, on_cpu = load(tmp_path / "packed", device_map={"": 0}), load(tmp_path / "packed")
    assert_same_tensors(on_gpu, model)
    assert_same_tensors(on_cpu, model)
    assert torch.equal(logits_of(on_gpu), logits)
    torch.testing.assert_close(logits_of(on_cpu), logits, **CLOSE)
    assert torch.equal(logits_of(on_cpu.to(GPU)), logits)
    on_gpu.cpu().save_pretrained(tmp_path / "again")
    assert_same_tensors(load(tmp_path / "again"), model)


OFFLOADED = {"model.embed_tokens": 0, "model.layers.0": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_offloaded_from_the_gpu(packed_llama, tmp_path, place):
    model = load(packed_llama, device_map={**OFFLOADED, "model.layers.1": place}, offload_folder=tmp_path)
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"  # until its turn comes
    whole = load(packed_llama, device_map={"": 0})
    assert torch.equal(logits_of(model), logits_of(whole))
    assert torch.equal(logits_of(model), logits_of(whole))  # a second time, after they went back


@pytest.mark.parametrize("source", ["packed", "dense"])
def test_device_map_auto_with_too_little_gpu_memory(packed_llama, dense_llama, source):
    folder, options = (packed_llama, {}) if source == "packed" else (dense_llama, {"load_in_lowra": True})
    if source == "dense":
        options["lowra_bits"] = 1.5
    whole = load(folder, device_map={"": 0}, **options)
    size = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    model = load(folder, device_map="auto", max_memory={0: size * 9 // 10, "cpu": "1GB"}, **options)
    assert set(model.hf_device_map.values()) == {0, "cpu"}
    torch.testing.assert_close(logits_of(model), logits_of(whole))
    tokens = inputs_of(model)["input_ids"].to(GPU)
    assert torch.equal(
        model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0),
        whole.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0),
    )


def test_packed_embeddings_with_a_tied_head(tmp_path):
    make_model("LlamaForCausalLM", tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    config = lowra.LowRAConfig(bits=2.0, quantize_embeddings=True)
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", config, device=GPU, progress=False)
    model, reference = load(tmp_path / "packed", device_map={"": 0}), load(tmp_path / "packed")
    assert_same_tensors(model, reference)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    table, tokens = model.get_input_embeddings(), inputs_of(model)["input_ids"].to(GPU)
    assert torch.equal(table(tokens), table.dequantize()[tokens])
    torch.testing.assert_close(logits_of(model), logits_of(reference), **CLOSE)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens, **greedy)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **greedy), plain)
    offloaded = load(
        tmp_path / "packed",
        device_map={**OFFLOADED, "model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.1": 0},
    )
    assert torch.equal(logits_of(offloaded), logits_of(model))


def training_losses(folder, device, **options):
    torch.manual_seed(0)
    model = lowra.prepare_for_training(load(folder, device_map={"": device}, **options))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = inputs_of(model)["input_ids"].to(device)
    return model, losses_of(model, tokens, optimizer, steps=4)


def test_training_steps_are_those_of_the_cpu(packed_llama, tmp_path):
    model, losses = training_losses(packed_llama, GPU)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(training_losses(packed_llama, "cpu")[1], rel=1e-3)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(packed_llama, device_map={"": 0}), tmp_path).eval()
    assert torch.equal(logits_of(reloaded), logits_of(model.eval()))
    merged = lowra.merge_into_dense(reloaded)
    torch.testing.assert_close(logits_of(merged), logits_of(model), **CLOSE)


def test_training_in_bfloat16(packed_llama):
    _, losses = training_losses(packed_llama, GPU, dtype=torch.bfloat16)
    assert losses[-1] < losses[0]


def test_training_with_offloaded_layers(packed_llama):
    model = lowra.prepare_for_training(
        load(packed_llama, device_map={**OFFLOADED, "model.layers.1": "cpu"}), gradient_checkpointing=False
    )
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0]))
    tokens = inputs_of(model)["input_ids"].to(GPU)
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients and all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_adapters_mixed_in_a_batch(packed_llama):
    model = get_peft_model(load(packed_llama, device_map={"": 0}), LoraConfig(r=4, target_modules="all-linear"))
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.1).to(GPU)
    tokens = inputs_of(model)["input_ids"].to(GPU)
    with torch.no_grad():
        mixed = model.eval()(tokens, adapter_names=["default", "other"]).logits
        for row, name in enumerate(("default", "other")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(tokens).logits[row], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generation_with_static_cache_and_compiled_forward(packed_llama, dtype):
    model = load(packed_llama, device_map={"": 0}, dtype=dtype)
    tokens = inputs_of(model)["input_ids"].to(GPU)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens, **greedy)
    compiled = model.generate(tokens, cache_implementation="static", **greedy)  # compiles by itself on a GPU
    assert plain.shape == compiled.shape
    if dtype == torch.float32:
        assert torch.equal(plain, compiled)


def test_a_compiled_training_step(packed_llama):
    model = get_peft_model(load(packed_llama, device_map={"": 0}), LoraConfig(r=4, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens = inputs_of(model)["input_ids"].to(GPU)
    compiled = torch.compile(model, fullgraph=False)
    grads = [torch.autograd.grad(run(input_ids=tokens, labels=tokens).loss, trained) for run in (model, compiled)]
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)


def test_trainer(packed_llama, tmp_path):
    model = lowra.prepare_for_training(load(packed_llama, device_map={"": 0}))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    row = {"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], save_steps=3, bf16=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 8)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert (tmp_path / "checkpoint-3" / "lowra_base.json").exists()


def test_sft_trainer_of_trl(tiny_llama, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    trainer = trl.SFTTrainer(
        load(tiny_llama, load_in_lowra=True, lowra_bits=1.5, device_map={"": 0}),
        args=trl.SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[]),
        train_dataset=datasets.Dataset.from_dict({"text": ["A city on a river."] * 8}),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "lowra_base.json").exists()


def test_the_command_line_on_the_gpu(tiny_llama, tmp_path):
    from lowra.commands import main

    packed = tmp_path / "packed"
    assert main(["quantize", str(tiny_llama), "--bits", "1.5", "--rank", "4", "--output", str(packed)]) == 0
    adapter = str(packed / "initial_adapter")
    assert main(["generate", str(packed), "--adapter", adapter, "--prompt", "The", "--tokens", "4"]) == 0
    assert main(["inspect", str(packed), "--original", str(tiny_llama)]) == 0
