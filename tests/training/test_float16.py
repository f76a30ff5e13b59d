"""Training in float16 with loss scaling, as on GPUs without bfloat16, and how a recipe comes to it."""

import dataclasses
import logging

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from lowra.config import LowRAConfig
from lowra.generation import loading
from lowra.nn.trained_tables import train_tables
from lowra.quantization.pipeline import quantize_checkpoint
from lowra.training import finetune, settled
from lowra.training.recipe import Recipe

CARD = torch.device("cuda")
LENGTH, BATCH, STEPS = 24, 4, 30


@pytest.fixture
def without_bfloat16(monkeypatch):
    """A Tesla T4, as far as the choice of a type goes."""
    monkeypatch.setattr(settled, "has_bfloat16", lambda device: device.type != "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float16") / "packed"
    quantize_checkpoint(str(tiny_llama), folder, LowRAConfig(bits=1.5))
    return folder


def model_to_train(packed, dtype, tables):
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    if tables:
        train_tables(model, scales=True)
    return model.train()


def batches():
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(32, 120, (2 * BATCH, LENGTH), generator=random)
    return [rows[BATCH * (i % 2) :][:BATCH] for i in range(STEPS)]


def train(model, dtype, scale):
    """Losses of a plain loop, and the scaler; float32 has neither autocast nor scaling."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-2)
    half = dtype == torch.float16
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=20, enabled=half)
    losses = []
    for ids in batches():
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, scaler


@pytest.mark.parametrize("tables", [False, True], ids=["adapter", "tables"])
def test_float16_with_loss_scaling_follows_float32(packed, tables):
    exact, _ = train(model_to_train(packed, torch.float32, tables), torch.float32, 1.0)
    model = model_to_train(packed, torch.float16, tables)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert any("level_change" in name for name in trained) == tables
    losses, scaler = train(model, torch.float16, 2.0**10)
    assert scaler.get_scale() > 2.0**10  # it grew: no step was lost to an overflow
    for half, single in zip(losses, exact, strict=True):
        assert half == pytest.approx(single, rel=5e-3)
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.isfinite().all() for p in trained.values())


def test_a_scale_too_large_costs_steps_and_nothing_else(packed):
    model = model_to_train(packed, torch.float16, True)
    losses, scaler = train(model, torch.float16, 2.0**32)
    assert losses[0] == losses[2]  # the same rows again: nothing was learned from gradients that overflowed
    assert scaler.get_scale() < 2.0**32 and losses[-1] < 0.95 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters() if p.is_floating_point())


def test_a_recipe_takes_float16_where_there_is_no_bfloat16(recipe, without_bfloat16, caplog):
    recipe = dataclasses.replace(recipe, bf16=True)
    with caplog.at_level(logging.WARNING):
        found = settled.on_device(recipe, CARD)
    assert (found.bf16, found.fp16) == (False, True)
    (record,) = caplog.records
    assert "Tesla T4 has no bfloat16" in record.getMessage() and "fp16=true" in record.getMessage()
    for other in (dataclasses.replace(recipe, bf16=False), found):
        assert settled.on_device(other, CARD) is other
    assert settled.on_device(recipe, torch.device("cpu")) is recipe


def test_an_override_for_bfloat16_is_refused_where_there_is_none(recipe, without_bfloat16):
    with pytest.raises(ValueError, match=r"Tesla T4 has no bfloat16 .* Give fp16=true .* or bf16=false"):
        settled.on_device(recipe.changed(["bf16=true"]), CARD)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_float16_on_a_cpu_is_refused(recipe):
    with pytest.raises(ValueError, match=r"fp16=true needs a GPU: on a CPU give bf16=true"):
        finetune(recipe.changed(["fp16=true"]), progress=False)


def test_one_of_both_types_counts(recipe):
    both = dataclasses.replace(recipe, bf16=True, fp16=True)
    assert (both.bf16, both.fp16) == (False, True)
    content = {**recipe.to_dict(), "bf16": True}
    assert Recipe.from_dict({**content, "fp16": True}, given={"bf16"}).bf16
    assert Recipe.from_dict({**content, "fp16": True}, given={"fp16"}).fp16
    with pytest.raises(ValueError, match="give one of them"):
        Recipe.from_dict({**content, "fp16": True}, given={"bf16", "fp16"})


def test_models_are_loaded_in_float16_where_there_is_no_bfloat16(packed, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    config = AutoConfig.from_pretrained(packed)
    for asked, found in ((torch.bfloat16, torch.float16), (torch.float16, "auto"), (torch.float32, "auto")):
        config.dtype = asked
        monkeypatch.setattr(loading, "has_bfloat16", lambda device: False)
        assert loading._dtype(config, CARD) == found
        monkeypatch.setattr(loading, "has_bfloat16", lambda device: True)
        assert loading._dtype(config, CARD) == "auto"
    assert caplog.text.count("loaded in float16") == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("tables", ["frozen", "levels_and_scales"])
def test_a_recipe_trains_in_float16(recipe, tables):
    options = {"max_steps": 20, "tables": tables, "gradient_checkpointing": True}
    exact = finetune(dataclasses.replace(recipe, **options), progress=False)
    half = dataclasses.replace(recipe, **options, fp16=True, output=recipe.output + "16")
    found = finetune(half, progress=False)
    assert found["recipe"]["fp16"]
    for a, b in zip(found["curve"], exact["curve"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert found["tuned"]["loss"] == pytest.approx(exact["tuned"]["loss"], rel=0.02)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16 base", "float32 base"])
def test_a_plain_trainer_trains_in_float16(packed, dtype, tmp_path):
    rows = [{"input_ids": row, "labels": row} for ids in batches()[:2] for row in ids]
    losses = {}
    for half in (False, True):
        model = model_to_train(packed, dtype if half else torch.float32, True)
        arguments = TrainingArguments(
            str(tmp_path), fp16=half, max_steps=20, per_device_train_batch_size=BATCH, learning_rate=1e-2,
            logging_steps=1, save_strategy="no", report_to=[], max_grad_norm=1.0, disable_tqdm=True,
            label_names=["labels"],
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses[half] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True][-1] < losses[True][0]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
