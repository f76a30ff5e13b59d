"""Factors and packings that come as state dicts: whose they are is asked, or told, as by every other door."""

import logging

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from safetensors.torch import load_file
from small_models import logits_of
from transformers import AutoModelForCausalLM

import lowra
from lowra.adapters.labels import BaseIdentity
from lowra.integrations import loose_factors
from lowra.integrations.adapter_records import record_of


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def told(caplog):
    return [record.getMessage() for record in caplog.records if "come as a state dict" in record.getMessage()]


@pytest.fixture(scope="module")
def packings(dense_llama, tmp_path_factory):
    """Two packings of one base of the same bits, with their starts."""
    folder = tmp_path_factory.mktemp("loose")
    for name, options in (("first", {}), ("second", {"refine": 2})):
        config = lowra.LowRAConfig(bits=2.0, **options)
        lowra.quantize_checkpoint(str(dense_llama), folder / name, config, lowra.AdapterRecipe(rank=4), progress=False)
    return folder


def started(packings, name="first"):
    return PeftModel.from_pretrained(load(packings / name), packings / name / "initial_adapter")


@pytest.mark.parametrize("put", [set_peft_model_state_dict, None])
def test_factors_read_from_an_adapter_of_another_packing_are_refused(packings, put):
    """Without set_peft_model_state_dict the keys are the model's own."""
    model, own = started(packings), started(packings)
    factors = peft.load_peft_weights(str(packings / "second" / "initial_adapter"), device="cpu")

    def load_factors(model, factors):
        if put is not None:
            return put(model, factors)
        named = {key.replace(".weight", ".default.weight"): value for key, value in factors.items()}
        return model.load_state_dict(named, strict=False)

    with pytest.raises(ValueError, match=r"another packing .*refine=2 vs 0"):
        load_factors(model, factors)
    assert torch.equal(logits_of(model), logits_of(own))  # nothing was put in
    load_factors(model, peft.load_peft_weights(str(packings / "first" / "initial_adapter"), device="cpu"))
    assert torch.equal(logits_of(model), logits_of(own)) and record_of(model, "default")["init"] == "loftq"


@pytest.fixture(autouse=True)
def nothing_read_out(monkeypatch):
    monkeypatch.setattr(loose_factors, "_read_out", set())


def test_hotswapping_a_folder_is_asked_once(packings):
    """In a process that has read no adapter of this packing out, on a base that needs its start."""
    model, own = started(packings), started(packings)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            module.lora_B["default"].weight.data.zero_()
    hotswap_adapter(model, str(packings / "first" / "initial_adapter"), "default", torch_device="cpu")
    assert torch.equal(logits_of(model), logits_of(own)) and record_of(model, "default")["init"] == "loftq"
    with pytest.raises(ValueError, match="another packing"):
        hotswap_adapter(model, str(packings / "second" / "initial_adapter"), "default", torch_device="cpu")


def from_file(packings):
    return load_file(packings / "second" / "initial_adapter" / "adapter_model.safetensors")


def by_peft(model, factors):
    set_peft_model_state_dict(model, factors)


def by_hand(model, factors):
    model.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in factors.items()}, strict=False)


def into_the_base(model, factors):
    inner = {k.removeprefix("base_model.model.").replace(".weight", ".default.weight"): v for k, v in factors.items()}
    model.get_base_model().load_state_dict(inner, strict=False)


def by_swapping(model, factors):
    hotswap_adapter_from_state_dict(model, factors, "default", LoraConfig(r=4, lora_alpha=4))


@pytest.mark.parametrize("put", [by_peft, by_hand, into_the_base, by_swapping])
@pytest.mark.parametrize("kind", ["tensors of a file", "copies of another packing's", "pickled", "a new adapter"])
def test_factors_of_unknown_origin_are_refused_where_the_base_needs_its_own(packings, put, kind, tmp_path):
    model = get_peft_model(load(packings / "first"), LoraConfig(r=4)) if "new" in kind else started(packings)
    before = logits_of(model)
    factors = from_file(packings)
    if "copies" in kind:
        factors = {k: v.clone() for k, v in get_peft_model_state_dict(started(packings, "second")).items()}
    if "pickled" in kind:
        torch.save(factors, tmp_path / "factors.bin")
        factors = torch.load(tmp_path / "factors.bin")
    with pytest.raises(ValueError, match=r"'default' come as a state dict.*loftq, rank 4.*load_adapter"):
        put(model, factors)
    assert torch.equal(logits_of(model), before)  # nothing was put in


@pytest.mark.parametrize("kind", ["of a file", "read from another packing"])
def test_transformers_asks_about_factors_too(packings, kind):
    model = load(packings / "first")
    other, own = (str(packings / name / "initial_adapter") for name in ("second", "first"))
    factors = from_file(packings) if kind == "of a file" else peft.load_peft_weights(other, device="cpu")
    with pytest.raises(ValueError, match=r"come as a state dict|another packing"):
        model.load_adapter(adapter_state_dict=factors, peft_config=LoraConfig.from_pretrained(other))
    assert not getattr(model, "_hf_peft_config_loaded", False)
    factors = peft.load_peft_weights(own, device="cpu")
    model.load_adapter(adapter_state_dict=factors, peft_config=LoraConfig.from_pretrained(own))
    assert torch.equal(logits_of(model), logits_of(started(packings)))


def test_what_training_has_read_out_of_its_own_adapter_comes_back(packings, caplog):
    """The best of a run, or an average of several clients, which nothing ties to the tensors that were read."""
    model = started(packings)
    best = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    before = logits_of(model)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data += 1
    set_peft_model_state_dict(model, {key: (value + value) / 2 for key, value in best.items()})
    assert torch.equal(logits_of(model), before)


def test_a_base_without_a_start_takes_any_and_tells(dense_llama, packings, caplog, tmp_path):
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "whole", lowra.LowRAConfig(bits=2.0), progress=False)
    model = get_peft_model(load(tmp_path / "whole"), LoraConfig(r=4, target_modules="all-linear"))
    with caplog.at_level(logging.WARNING, logger="lowra"):
        set_peft_model_state_dict(model, from_file(packings))
    assert len(told(caplog)) == 1


def test_dense_models_are_left_to_peft(dense_llama, packings):
    model = get_peft_model(load(dense_llama), LoraConfig(r=4, target_modules="all-linear"))
    assert not set_peft_model_state_dict(model, from_file(packings)).unexpected_keys


def test_factors_from_elsewhere_are_told_once(packings, caplog):
    model = started(packings)
    get_peft_model_state_dict(model)
    factors = from_file(packings)
    with caplog.at_level(logging.WARNING, logger="lowra"):
        set_peft_model_state_dict(model, factors)
        set_peft_model_state_dict(model, factors)
    assert len(told(caplog)) == 1 and "'default'" in told(caplog)[0]


def test_a_new_adapter_filled_by_hand_claims_no_start(packings, caplog, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    model = get_peft_model(load(packings / "first"), config)
    with caplog.at_level(logging.WARNING, logger="lowra"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(started(packings)))
    assert told(caplog) and record_of(model, "default")["init"] == "unknown"


def test_the_doors_themselves_say_nothing(packings, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, logger="lowra"):
        model = started(packings)
        model.load_adapter(packings / "first" / "initial_adapter", "second")
        model.save_pretrained(tmp_path)
        copied = started(packings)
        copied.load_state_dict({k: v for k, v in model.state_dict().items() if ".second." not in k})
    assert not told(caplog)  # the last one brings its base


def test_the_identity_of_a_model_is_that_of_the_weights_put_into_it(packings, tmp_path):
    model, other = load(packings / "first"), load(packings / "second")
    model.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="another packing"):
        PeftModel.from_pretrained(model, packings / "first" / "initial_adapter")
    assert BaseIdentity.of(model).packing == BaseIdentity.of(other).packing
    adapted = PeftModel.from_pretrained(model, packings / "second" / "initial_adapter")
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(packings / "second"), tmp_path)), logits_of(adapted))


def test_what_is_saved_after_another_packing_was_put_in_describes_that(dense_llama, packings, tmp_path):
    config = lowra.LowRAConfig(bits=1.25, scales="float32")
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "other", config, progress=False)
    model, other = load(packings / "first"), load(tmp_path / "other")
    model.load_state_dict(other.state_dict())
    model.save_pretrained(tmp_path / "saved")
    saved, wanted = (one.config.quantization_config for one in (load(tmp_path / "saved"), other))
    for name in ("packing", "scales"):
        assert getattr(saved, name) == getattr(wanted, name)
    for name in ("nominal_bits", "true_bits"):
        assert getattr(saved, name) == pytest.approx(getattr(wanted, name), abs=1e-5)
