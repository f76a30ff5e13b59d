"""Packed models under the engines people train and generate with: Trainer, torch.compile, static cache, FSDP2."""

import importlib
import json
import pathlib
import shutil
import subprocess
import sys

import fsdp_on_cpu
import pytest
import sharded_training
import torch
from datasets import Dataset
from other_processes import run_pair
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lowra

PROMPT = torch.arange(3, 9)[None]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_computes_the_same_in_one_graph(packed_llama, backend):
    layer = load(packed_llama).model.layers[0].mlp.up_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for run in (layer, compiled):
        y = run(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, grad))
    torch.testing.assert_close(results[0], results[1])


def test_a_layer_built_by_hand_compiles_too(packed_llama):
    packed = load(packed_llama).model.layers[0].mlp.up_proj.packed
    layer = lowra.LowRALinear.from_packed(packed)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(2, layer.in_features)
    assert torch.equal(compiled(x), layer(x))


def test_a_compiled_model_with_adapter_gives_the_same_gradients(packed_llama):
    model = get_peft_model(load(packed_llama), LoraConfig(r=4, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compiled = torch.compile(model, backend="aot_eager")
    grads = [torch.autograd.grad(run(input_ids=PROMPT, labels=PROMPT).loss, trained) for run in (model, compiled)]
    torch.testing.assert_close(grads[0], grads[1])


def test_generation_with_static_cache_and_compiled_forward(packed_llama):
    model = load(packed_llama)
    plain = model.generate(PROMPT, **GREEDY)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    static = model.generate(PROMPT, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(plain, static)


def test_autocast_computes_in_its_own_type(packed_llama):
    model = load(packed_llama)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.model.layers[0].mlp.up_proj(torch.ones(1, 64)).dtype == torch.bfloat16
        assert torch.isfinite(model(PROMPT).logits).all()


def test_trainer(packed_llama, tmp_path):
    model = lowra.prepare_for_training(load(packed_llama))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    row = {"input_ids": PROMPT[0], "labels": PROMPT[0]}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=2
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert (tmp_path / "checkpoint-2" / "lowra_base.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("offloading", [False, True])
def test_sft_trainer_of_trl(tiny_llama, tmp_path, offloading, monkeypatch):
    trl = pytest.importorskip("trl")
    if offloading:  # for a GPU, in whose place a CPU takes part
        of_trl = importlib.import_module("trl.models.activation_offloading")

        def make_for_cpu(model):
            with monkeypatch.context() as patch:
                patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
                return of_trl.get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False)

        trainers = importlib.import_module("trl.trainer.sft_trainer")
        monkeypatch.setattr(trainers, "get_act_offloading_ctx_manager", make_for_cpu)
        monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    trainer = trl.SFTTrainer(
        load(tiny_llama, load_in_lowra=True, lowra_bits=1.5),
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            activation_offloading=offloading,
        ),
        train_dataset=Dataset.from_dict({"text": ["A city on a river."] * 8}),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),  # bytes
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all("lora_" in name for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "lowra_base.json").exists()


def test_fsdp2_shards_packed_weights(packed_llama, tmp_path):
    worker = pathlib.Path(__file__).with_name("sharded_worker.py")
    command = [sys.executable, str(worker), str(packed_llama), str(tmp_path / "rendezvous")]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all("checked" in output for output in outputs)


@pytest.mark.parametrize("by_trl", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_trainer_of_a_sharded_model_saves_and_resumes(packed_llama, tmp_path, by_trl):
    if by_trl:
        pytest.importorskip("trl")
    worker = pathlib.Path(__file__).with_name("sharded_training.py")
    (tmp_path / "pair").mkdir()
    alone = sharded_training.train(packed_llama, tmp_path / "alone", 1, by_trl=by_trl)
    for again in ([], ["resume"]):
        again += ["trl"] * by_trl
        run_pair(worker, packed_llama, tmp_path / "pair", *again, **fsdp_on_cpu.environment())
        losses = json.loads((tmp_path / "pair" / "losses.json").read_text())
        assert losses == pytest.approx(alone, rel=1e-5)
        found, expected = (
            load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("pair", "alone")
        )
        assert found.keys() == expected.keys()
        # PyTorch 2.8 adds the gradients of processes on a CPU, which Adam forgives to some digits
        close = 1e-4 if torch.__version__ >= "2.9" else 1e-2
        assert all((found[name] - tensor).abs().max() < close for name, tensor in expected.items())
        record = json.loads((tmp_path / "pair" / "adapter" / "lowra_base.json").read_text())
        assert record["packing"] == json.loads((tmp_path / "alone/adapter/lowra_base.json").read_text())["packing"]
        shutil.rmtree(tmp_path / "pair" / "checkpoints" / "checkpoint-6")  # goes on from the third step


def test_an_adapter_is_not_saved_without_its_tensors(packed_llama, tmp_path):
    """FSDP's own activation checkpointing wraps the layers, and PEFT then finds none of the state's names."""
    model = get_peft_model(load(packed_llama), LoraConfig(r=4, target_modules="all-linear"))
    whole = model.state_dict()
    layers = model.get_base_model().model.layers
    layers[0], layers[1] = (checkpoint_wrapper.checkpoint_wrapper(layer) for layer in layers)
    with pytest.raises(ValueError, match="saved without a tensor.*gradient_checkpointing=True"):
        model.save_pretrained(tmp_path, state_dict=whole)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_not_saved_in_parts(packed_llama, tmp_path):
    model = get_peft_model(load(packed_llama), LoraConfig(r=4, target_modules="all-linear"))
    whole = model.state_dict()
    parts = {
        "half of it": dict(list(whole.items())[: len(whole) // 2]),
        "nothing": {},
        "wrapped": {f"module.{key}": tensor for key, tensor in whole.items()},
        "of another rank": {key: tensor[:2] if "lora_A" in key else tensor for key, tensor in whole.items()},
    }
    for what, state in parts.items():
        with pytest.raises(ValueError, match="would be saved without"):
            model.save_pretrained(tmp_path / what, state_dict=state)
    with pytest.raises(ValueError, match="no adapter 'zz'; there are default"):
        model.save_pretrained(tmp_path / "zz", selected_adapters=["zz"])
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "whole", state_dict=whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"FSDP_VERSION": "1"}, "use FSDP2"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing=True in the Trainer"),
    ],
)
def test_ways_of_fsdp_that_packed_weights_cannot_take_are_refused(packed_llama, monkeypatch, options, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in options.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        load(packed_llama)


@pytest.mark.parametrize("options", [{}, {"load_in_lowra": True}])
def test_zero3_of_deepspeed_is_refused(packed_llama, dense_llama, monkeypatch, options):
    monkeypatch.setattr("lowra.integrations.transformers.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO-3 loads and splits weights by itself.*use FSDP2"):
        load(dense_llama if options else packed_llama, **options)


@pytest.mark.parametrize(("name", "dtype"), [("levels", torch.bfloat16), ("scale_steps", torch.float16)])
def test_tables_cast_past_the_module_are_refused(packed_llama, name, dtype):
    """As DeepSpeed does under bf16 and fp16: it casts the data of every floating parameter."""
    layer = load(packed_llama).model.layers[0].mlp.up_proj
    tensor = layer.packed_tensors()[name]
    tensor.data = tensor.data.to(dtype)
    with pytest.raises(ValueError, match="cast to 16 bits.*DeepSpeed"):
        layer(torch.ones(1, layer.in_features))
