"""Trained tables belong to an adapter: whoever loads it gets them or an error, and nobody else does."""

import contextlib
import copy
import functools
import json
import pickle
import shutil

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    VeraConfig,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from safetensors.torch import load_file, save_file
from small_models import inputs_of, logits_of
from transformers import AutoModelForCausalLM

import lowra
from lowra.adapters import AdapterLibrary, load_packed
from lowra.commands import main
from lowra.nn.trained_tables import bake_tables, load_tables, save_tables, train_tables

TABLES = "tables.safetensors"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def with_tables(model, seed, scales=True, shared=False):
    """Tables as training leaves them, for the active adapter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ("lora_B" in name or "ia3_l" in name) and model.active_adapter in name.split("."):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    for parameter in train_tables(model, scales, shared).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    bake_tables(model)
    return model.eval()


@pytest.fixture(scope="module", params=["all-linear", "two layers", "levels alone", "shared", "IA3"])
def trained(request, packed_llama, tmp_path_factory):
    """An adapter with tables, and the logits it has where it was trained."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    if request.param == "two layers":
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    if request.param == "IA3":
        config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    shared = request.param == "shared"
    scales = not shared and request.param != "levels alone"
    model = with_tables(get_peft_model(load(packed_llama), config), 1, scales, shared)
    folder = tmp_path_factory.mktemp("tables") / "adapter"
    model.save_pretrained(folder)
    return folder, logits_of(model)


@pytest.fixture(scope="module")
def plain(packed_llama, tmp_path_factory):
    """An adapter without tables."""
    model = get_peft_model(load(packed_llama), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.data.normal_()
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    model.save_pretrained(folder)
    return folder, logits_of(model.eval())


def test_every_door_brings_them(packed_llama, trained, tmp_path):
    folder, logits = trained
    assert (folder / TABLES).exists()
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(packed_llama), folder).eval()), logits)
    if not is_ia3(trained):
        assert torch.equal(logits_of(PeftMixedModel.from_pretrained(load(packed_llama), folder).eval()), logits)
    model = load(packed_llama)
    model.load_adapter(str(folder))
    assert torch.equal(logits_of(model), logits)
    copied = shutil.copytree(folder, tmp_path / "copied")
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(packed_llama)}))
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(copied).eval()), logits)
    merged = lowra.merge_into_dense(PeftModel.from_pretrained(load(packed_llama), folder))
    torch.testing.assert_close(logits_of(merged), logits, rtol=1e-3, atol=1e-4)


def test_the_base_keeps_its_own(packed_llama, trained, plain):
    folder, logits = trained
    base = logits_of(load(packed_llama))
    model = PeftModel.from_pretrained(load(packed_llama), folder).eval()
    with model.disable_adapter():
        assert torch.equal(logits_of(model), base)
    if is_ia3(trained):  # goes with no other method
        assert torch.equal(logits_of(model.unload()), base)
        return
    model.load_adapter(plain[0], "plain")
    assert torch.equal(logits_of(model), logits)
    for _ in range(2):
        model.set_adapter("plain")
        assert torch.equal(logits_of(model), plain[1])
        model.set_adapter("default")
        assert torch.equal(logits_of(model), logits)
    model.delete_adapter("default")
    assert torch.equal(logits_of(model), plain[1])
    model.load_adapter(folder, "default")
    model.set_adapter("default")
    assert torch.equal(logits_of(model), logits)
    assert torch.equal(logits_of(model.unload()), base)


def test_a_name_used_again_has_no_tables_left(packed_llama, trained):
    if is_ia3(trained):
        pytest.skip("one method is enough")
    model = PeftModel.from_pretrained(load(packed_llama), trained[0]).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj"]))  # B is zero
    model.set_adapter("default")
    assert torch.equal(logits_of(model.eval()), logits_of(load(packed_llama)))


def is_ia3(trained):
    return json.loads((trained[0] / "adapter_config.json").read_text())["peft_type"] == "IA3"


def test_two_adapters_with_tables_each(packed_llama, trained, tmp_path):
    if is_ia3(trained):
        pytest.skip("one method is enough")
    folder, logits = trained
    model = PeftModel.from_pretrained(load(packed_llama), folder)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj", "up_proj"]))
    model.set_adapter("second")
    second = logits_of(with_tables(model, 2))
    model.set_adapter("default")
    assert torch.equal(logits_of(model), logits) and not torch.equal(second, logits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(packed_llama), tmp_path).eval()
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits_of(again), logits)
    again.set_adapter("second")
    assert torch.equal(logits_of(again), second)
    with pytest.raises(ValueError, match="cannot be used together"):
        again.base_model.set_adapter(["default", "second"])
        logits_of(again)
    again.base_model.set_adapter(["second"])
    with pytest.raises(ValueError, match="would leave them behind"):
        again.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixed", combination_type="svd")
    tokens = inputs_of(again)["input_ids"]
    alike = again(input_ids=tokens, adapter_names=["second", "second"]).logits
    torch.testing.assert_close(alike, second, rtol=1e-4, atol=1e-5)
    for names in (["default", "second"], ["second", "__base__"], ["default", "default"], ["__base__", "__base__"]):
        with pytest.raises(ValueError, match="cannot be used together|batch of their own"):
            again(input_ids=tokens, adapter_names=names)


def test_merging(packed_llama, trained, plain):
    folder, logits = trained
    model = PeftModel.from_pretrained(load(packed_llama), folder).eval()
    if not is_ia3(trained):
        model.load_adapter(plain[0], "plain")
        model.merge_adapter(["plain"])
        torch.testing.assert_close(logits_of(model), plain[1], rtol=1e-3, atol=1e-4)
        model.unmerge_adapter()
        model.merge_adapter()
        torch.testing.assert_close(logits_of(model), logits, rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match="cannot be used together"):
            model.merge_adapter(["plain"])
        model.unmerge_adapter()
        assert torch.equal(logits_of(model), logits)
        torch.testing.assert_close(logits_of(model.merge_and_unload()), logits, rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="merge_into_dense"):
            model.merge_and_unload()
        assert torch.equal(logits_of(model), logits)


def test_the_original_cannot_take_them(packed_llama, dense_llama, trained):
    model = PeftModel.from_pretrained(load(packed_llama), trained[0])
    with pytest.raises(ValueError, match="merging into the original would leave them behind.* tables=frozen has none"):
        lowra.merge_into_dense(model, original=dense_llama, initial=packed_llama / "initial_adapter")
    with pytest.raises(ValueError, match="this model is dense"):
        PeftModel.from_pretrained(load(dense_llama), trained[0], any_base=True)
    with pytest.raises(ValueError, match="this model is dense"):
        load(dense_llama).load_adapter(str(trained[0]))


@pytest.mark.parametrize("trained", ["shared"], indirect=True)
def test_the_original_is_refused_before_anything_is_loaded(
    packed_llama, dense_llama, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("lowra.commands.merge._load", None)
    arguments = ["merge", str(packed_llama), "--adapter", str(trained[0]), "--original", str(dense_llama)]
    assert main([*arguments, "--output", str(tmp_path / "merged")]) == 2
    assert "leave --original out, which merges into the packed base; an adapter" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"scales": True}, {"shared": True}])
def test_training_goes_on_with_the_changes_that_were_saved(packed_llama, tmp_path, options):
    """Optimiser states belong to changes, and tables that were rounded do not tell them."""

    def beginning():
        model = get_peft_model(load(packed_llama), LoraConfig(r=4, target_modules="all-linear"))
        return model, train_tables(model, **options)

    model, parameters = beginning()
    for parameter in parameters.values():
        parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    resumed, again = beginning()
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(parameter, again[name]) for name, parameter in parameters.items())
    assert torch.equal(logits_of(resumed.eval()), logits_of(model.eval()))
    other = get_peft_model(load(packed_llama), LoraConfig(r=4, target_modules="all-linear"))
    train_tables(other, scales=not options)
    with pytest.raises(ValueError, match="belongs to a run that trained other tables"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    bake_tables(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "table_changes.safetensors").exists()
    with pytest.raises(ValueError, match="load it before train_tables, or after bake_tables"):
        resumed.load_adapter(tmp_path, "default", is_trainable=True)


def filled_by_transformers(model, folder):
    model = model.unload()
    factors = load_peft_weights(str(folder), device="cpu")
    model.load_adapter(adapter_state_dict=factors, peft_config=PeftConfig.from_pretrained(folder))
    return model


def filled_by_peft(model, folder):
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    return model


@pytest.mark.parametrize("fill", [filled_by_transformers, filled_by_peft])
def test_factors_read_from_a_folder_bring_them(packed_llama, trained, fill):
    folder, logits = trained
    if is_ia3(trained) and fill is filled_by_transformers:
        pytest.skip("Transformers puts factors of LoRA in")
    model = get_peft_model(load(packed_llama), PeftConfig.from_pretrained(folder))
    assert torch.equal(logits_of(fill(model, folder).eval()), logits)


def as_it_is(state, folder):
    return state


def made_anew(state, folder):
    return {name: tensor.clone() for name, tensor in state.items()}


def through_pickle(state, folder):
    torch.save(state, folder / "state.bin")
    return torch.load(folder / "state.bin")


def through_safetensors(state, folder):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


def through_distributed_checkpoint(state, folder):
    torch.distributed.checkpoint.save(state, checkpoint_id=folder / "state", no_dist=True)
    read = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.distributed.checkpoint.load(read, checkpoint_id=folder / "state", no_dist=True)
    return read


WAYS = [as_it_is, made_anew, through_pickle, through_safetensors, through_distributed_checkpoint]


@pytest.mark.parametrize(
    ("trained", "way"),
    [*(("all-linear", way) for way in WAYS), ("two layers", made_anew), ("IA3", through_safetensors)],
    indirect=["trained"],
)
def test_whole_state_dicts_bring_them(packed_llama, trained, plain, tmp_path, way):
    folder, logits = trained
    source = PeftModel.from_pretrained(load(packed_llama), folder).eval()
    state = way(source.state_dict(), tmp_path)
    fresh = get_peft_model(load(packed_llama), PeftConfig.from_pretrained(folder)).eval()
    fresh.load_state_dict(state)
    assert torch.equal(logits_of(fresh), logits)
    fresh.load_state_dict(state)
    assert torch.equal(logits_of(fresh), logits)
    with fresh.disable_adapter():
        assert torch.equal(logits_of(fresh), logits_of(load(packed_llama)))
    if not is_ia3(trained) and len(source.targeted_module_names) > 4:
        (tmp_path / "plain").mkdir()
        other = PeftModel.from_pretrained(load(packed_llama), plain[0])
        state = way(other.state_dict(), tmp_path / "plain")
        with pytest.raises(RuntimeError, match="other levels and scales of adapter 'default'"):  # not under those
            fresh.load_state_dict(state)
        again = PeftModel.from_pretrained(load(packed_llama), plain[0]).eval()
        again.load_state_dict(state)
        assert torch.equal(logits_of(again), plain[1])


def averaged(state):
    return {name: (value.float() * 0.5 + value.float() * 0.5) for name, value in state.items()}


def of_other_codes(state):
    codes = next(name for name in state if name.endswith("down_proj.base_layer.weight"))
    return {**state, codes: state[codes] ^ 1}


def cut_short(state):
    return {name: value[: len(value) // 2] if name.endswith("_extra_state") else value for name, value in state.items()}


@pytest.mark.parametrize("trained", ["all-linear"], indirect=True)
@pytest.mark.parametrize("change", [averaged, of_other_codes, cut_short])
def test_changed_state_dicts_are_refused(packed_llama, trained, change):
    source = PeftModel.from_pretrained(load(packed_llama), trained[0]).eval()
    fresh = get_peft_model(load(packed_llama), PeftConfig.from_pretrained(trained[0])).eval()
    message = {averaged: "cast or averaged", of_other_codes: "lost the metadata", cut_short: "are damaged"}[change]
    with pytest.raises(RuntimeError, match=message):
        fresh.load_state_dict(change(source.state_dict()))


@pytest.mark.parametrize("trained", ["all-linear"], indirect=True)
def test_state_dicts_of_tables_in_training(packed_llama, trained):
    folder, _ = trained
    model = PeftModel.from_pretrained(load(packed_llama), folder, is_trainable=True)
    for parameter in train_tables(model).values():
        parameter.data.normal_(std=0.1)
    fresh = get_peft_model(load(packed_llama), PeftConfig.from_pretrained(folder)).eval()
    with pytest.raises(RuntimeError, match="make it after bake_tables"):
        fresh.load_state_dict(dict(model.state_dict()), strict=False)
    train_tables(fresh)
    fresh.load_state_dict(dict(model.state_dict()))
    assert torch.equal(logits_of(fresh), logits_of(model.eval()))
    without_adapters = load(packed_llama)
    named = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): t for name, t in fresh.state_dict().items()
    }
    with pytest.raises(RuntimeError, match="no adapter that could have them"):
        without_adapters.load_state_dict({n: t for n, t in named.items() if "_change" not in n}, strict=False)


@pytest.mark.skipif(not hasattr(peft, "save_as_lora"), reason="before PEFT converted adapters")
@pytest.mark.parametrize("config", [VeraConfig(r=4, target_modules=["q_proj"]), LoraConfig(target_modules=["q_proj"])])
def test_a_lora_made_of_another_adapter_keeps_its_base_and_loses_no_tables(packed_llama, dense_llama, config, tmp_path):
    model = get_peft_model(load(packed_llama), copy.deepcopy(config))
    peft.save_as_lora(tmp_path / "lora", model, rank=4)
    again = PeftModel.from_pretrained(load(packed_llama), tmp_path / "lora").eval()
    torch.testing.assert_close(logits_of(again), logits_of(model.eval()), rtol=1e-4, atol=1e-5)
    other = tmp_path / "other"
    lowra.quantize_checkpoint(str(dense_llama), other, lowra.LowRAConfig(bits=1.5), None, "cpu", progress=False)
    with pytest.raises(ValueError, match="another packing of the same base"):
        PeftModel.from_pretrained(load(other), tmp_path / "lora")
    with_tables(model, 1)
    for make in (peft.convert_to_lora, functools.partial(peft.save_as_lora, tmp_path / "late")):
        with pytest.raises(ValueError, match="a LoRA made of it would leave them behind"):
            make(model, rank=4)
    assert not (tmp_path / "late" / "adapter_config.json").exists()


def test_hotswap(packed_llama, trained, plain, tmp_path):
    if is_ia3(trained):
        pytest.skip("hotswap knows LoRA only")
    folder, logits = trained
    model = PeftModel.from_pretrained(load(packed_llama), plain[0]).eval()
    with contextlib.suppress(RuntimeError):  # fewer layers than the first
        hotswap_adapter(model, str(folder), "default", torch_device="cpu")
        assert torch.equal(logits_of(model), logits)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
        with pytest.raises(ValueError, match="factors from a state dict would leave them behind"):
            hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
        assert torch.equal(logits_of(model), logits)
        with pytest.raises((ValueError, OSError)):
            hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
        assert torch.equal(logits_of(model), logits)
        hotswap_adapter(model, str(plain[0]), "default", torch_device="cpu")
        assert torch.equal(logits_of(model), plain[1])


def test_packed_adapters_and_libraries(packed_llama, trained, plain, tmp_path, capsys):
    if is_ia3(trained):
        pytest.skip("only LoRA is packed")
    names = {"a": trained, "b": plain}
    for name, (folder, _) in names.items():
        command = ["adapter", "quantize", str(folder), "--method", "rtn", "--bits", "4", "--base", str(packed_llama)]
        assert main([*command, "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "a" / TABLES).read_bytes() == (trained[0] / TABLES).read_bytes()
    assert not (tmp_path / "b" / TABLES).exists()
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "a" / TABLES).values())
    assert capsys.readouterr().out.count(f"beside them {size:,} bytes of trained tables") == 1
    assert main(["adapter", "inspect", str(tmp_path / "a")]) == main(["adapter", "inspect", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert f"trained tables     {size:,} bytes" in shown
    assert "trained tables     none" in shown
    model = load_packed(load(packed_llama), tmp_path / "a").eval()
    assert (logits_of(model) - trained[1]).norm() < 0.2 * (logits_of(load(packed_llama)) - trained[1]).norm()
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(load(packed_llama)))
    library = AdapterLibrary(load(packed_llama))
    for name in names:
        library.add(name, tmp_path / name)
    assert library.memory()["table_bytes"] == size
    for name in ("a", "b", "a"):
        library.switch(name)
        alone = load_packed(load(packed_llama), tmp_path / name).eval()
        assert torch.equal(logits_of(library.model), logits_of(alone))
    (tmp_path / "a" / TABLES).unlink()
    with pytest.raises(ValueError, match="bytes have changed"):
        load_packed(load(packed_llama), tmp_path / "a")
    assert main(["verify", str(tmp_path / "a")]) == 2


def lose(folder):
    (folder / TABLES).unlink()


def flip(folder):
    tensors = load_file(folder / TABLES)
    name = next(key for key in sorted(tensors) if key.endswith(".levels"))
    tensors[name].view(torch.uint8)[0] ^= 1
    save_file(tensors, folder / TABLES)


def not_a_number(folder):
    tensors = load_file(folder / TABLES)
    tensors[next(key for key in sorted(tensors) if key.endswith(".levels"))][1] = torch.nan
    save_file(tensors, folder / TABLES)


def without_codes(folder):
    tensors = load_file(folder / TABLES)
    save_file(
        {key: tensor for key, tensor in tensors.items() if not key.endswith("0.mlp.up_proj.codes")}, folder / TABLES
    )


def cut(folder):
    content = (folder / TABLES).read_bytes()
    (folder / TABLES).write_bytes(content[: len(content) // 2])


DAMAGE = {
    lose: "has lost its tables.safetensors",
    flip: "has other bytes than were saved in",
    not_a_number: "holds 1 NaN or Inf",
    without_codes: "it has no levels or no digest of",
    cut: "cut short",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_tables_are_refused(packed_llama, trained, tmp_path, how):
    folder = shutil.copytree(trained[0], tmp_path / "damaged")
    how(folder)
    for call in (
        lambda: PeftModel.from_pretrained(load(packed_llama), folder),
        lambda: load(packed_llama).load_adapter(str(folder)),
    ):
        with pytest.raises(ValueError, match=DAMAGE[how]):
            call()


def test_tables_of_another_adapter_are_refused(packed_llama, trained, plain, tmp_path):
    folder = shutil.copytree(plain[0], tmp_path / "mixed")
    shutil.copyfile(trained[0] / TABLES, folder / TABLES)
    with pytest.raises(ValueError, match="was saved without the tables.safetensors"):
        PeftModel.from_pretrained(load(packed_llama), folder)


def test_saving_over_an_adapter_with_tables_takes_them_away(packed_llama, trained, plain, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "again")
    PeftModel.from_pretrained(load(packed_llama), plain[0]).save_pretrained(folder)
    assert not (folder / TABLES).exists()
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(packed_llama), folder).eval()), plain[1])


def test_training_goes_on_from_them_and_a_checkpoint_has_them(packed_llama, trained, tmp_path):
    folder, logits = trained
    model = PeftModel.from_pretrained(load(packed_llama), folder, is_trainable=True)
    changes = train_tables(model)
    torch.testing.assert_close(logits_of(model.eval()), logits, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(load(packed_llama)))
    for parameter in changes.values():
        parameter.data.add_(0.05)
    now = logits_of(model)
    model.save_pretrained(tmp_path / "checkpoint")
    again = PeftModel.from_pretrained(load(packed_llama), tmp_path / "checkpoint").eval()
    torch.testing.assert_close(logits_of(again), now, rtol=1e-2, atol=1e-2)
    bake_tables(model)
    assert torch.equal(logits_of(again), logits_of(model))


def test_models_with_tables_are_copied_and_pickled(packed_llama, trained):
    folder, logits = trained
    model = PeftModel.from_pretrained(load(packed_llama), folder).eval()
    copied = copy.deepcopy(model)
    with copied.disable_adapter():
        base = logits_of(copied)
        assert torch.equal(logits_of(model), logits)
    assert torch.equal(base, logits_of(load(packed_llama))) and torch.equal(logits_of(copied), logits)
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model))), logits)


def test_by_hand_on_a_model_without_adapters(packed_llama, tmp_path):
    model = load(packed_llama)
    for parameter in train_tables(model).values():
        parameter.data.normal_(std=0.1)
    bake_tables(model)
    save_tables(model, tmp_path)
    again = load(packed_llama)
    load_tables(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


def test_loaded_under_inference_mode_they_train(packed_llama, trained):
    folder, logits = trained
    model = PeftModel.from_pretrained(load(packed_llama), folder, is_trainable=True).eval()
    with torch.inference_mode():
        load_tables(model, folder)
        assert torch.equal(logits_of(model), logits)
    model.enable_input_require_grads()
    inputs = inputs_of(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_other_codes_do_not_come_under_tables(packed_llama, dense_llama, trained, tmp_path):
    folder, logits = trained
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "other", lowra.LowRAConfig(bits=1.25), progress=False)
    model = PeftModel.from_pretrained(load(packed_llama), folder).eval()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with pytest.raises(RuntimeError, match="tables that were trained for the codes it has"):
        base = model.get_base_model()
        renamed = {}
        for name, tensor in load(tmp_path / "other").state_dict().items():
            module, _, leaf = name.rpartition(".")
            renamed[f"{module}.base_layer.{leaf}" if f"{module}.base_layer.{leaf}" in base.state_dict() else name] = (
                tensor
            )
        base.load_state_dict(renamed, strict=False)
