"""State dicts of other packings: averaged and altered ones are refused, and a start that is needed is asked for."""

import copy
import io
import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save
from small_models import logits_of, make_model, packed_layers
from transformers import AutoModelForCausalLM

import lowra
from lowra.nn import known_codes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Packings of the same precisions: two seeds' weights, of which one needs its start."""
    folder = tmp_path_factory.mktemp("origins")
    for seed, names in ((0, ("first", "loftq")), (1, ("second",))):
        make_model("LlamaForCausalLM", seed=seed).save_pretrained(folder / f"dense{seed}")
        for name in names:
            config, recipe = lowra.LowRAConfig(bits=2, menu=(2,)), lowra.AdapterRecipe(4) if name == "loftq" else None
            lowra.quantize_checkpoint(str(folder / f"dense{seed}"), folder / name, config, recipe, progress=False)
    return folder


@pytest.fixture
def load_packed(folders):
    return lambda name: AutoModelForCausalLM.from_pretrained(folders / name).eval()


def mean(one, other, weight=0.5):
    return {k: (weight * t.double() + (1 - weight) * other[k].double()).to(t.dtype) for k, t in one.items()}


def in_place(one, other, weight=0.5):
    for name, tensor in one.items():
        one[name] = (weight * tensor.double() + (1 - weight) * other[name].double()).to(tensor.dtype)
    return one


def into_the_tensors(one, other, weight=0.5):
    for name, tensor in one.items():
        tensor.copy_((weight * tensor.double() + (1 - weight) * other[name].double()).to(tensor.dtype))
    return one


def xor(one, other):
    return {
        name: t ^ other[name] if t.dtype == torch.uint8 and "row_bits" not in name else t for name, t in one.items()
    }


def noise(one, other):
    one = dict(one)
    name = next(name for name in one if name.endswith("down_proj.weight"))
    one[name] = one[name].clone()
    one[name][3] ^= 1
    return one


def mixed_in_one_layer(one, other):
    """Codes of one packing, precisions, scales and levels of the other."""
    return {
        name: other[name] if name.endswith(".weight") and f"{name[:-7]}.levels" in one else t for name, t in one.items()
    }


ALTERED = {
    "mean": mean,
    "nearly the first": lambda a, b: mean(a, b, 0.999),
    "interpolated": lambda a, b: mean(a, b, 0.25),
    "in place": in_place,
    "into the tensors": into_the_tensors,
    "difference": xor,
    "one bit": noise,
    "codes under other tables": mixed_in_one_layer,
}


@pytest.mark.parametrize("by_file", [False, True], ids=["model", "file"])
@pytest.mark.parametrize("how", ALTERED)
def test_averages_cast_back_are_refused(load_packed, folders, how, by_file):
    model, other = load_packed("first"), load_packed("second")
    states = [twin.state_dict() for twin in (load_packed("first"), other)]
    if by_file:
        states = [load((folders / name / "model.safetensors").read_bytes()) for name in ("first", "second")]
    before = logits_of(model)
    with pytest.raises(RuntimeError, match=r"no numbers|lost the metadata"):
        model.load_state_dict(ALTERED[how](*states))
    if how == "one bit":
        assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("change", ["scales", "scale_steps", "levels"])
def test_tables_that_were_altered_on_the_way_are_refused(load_packed, change):
    model, state = load_packed("first"), load_packed("first").state_dict()
    name = next(name for name in state if name.endswith(f"down_proj.{change}"))
    state[name] = state[name].clone()
    first, last = state[name].view(-1)[0], state[name].view(-1)[-1:]
    last.copy_(first ^ 1 if change == "scales" else first * 3 + 1)
    with pytest.raises(RuntimeError, match="not those that this state dict was made with"):
        model.load_state_dict(state)


def through_torch(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


WHOLE = {
    "as it is": lambda state: state,
    "torch.save": through_torch,
    "copied": copy.deepcopy,
    "made anew": lambda state: {name: tensor.clone() for name, tensor in state.items()},
    "safetensors": lambda state: load(save({name: tensor.contiguous() for name, tensor in state.items()})),
}


@pytest.mark.parametrize("way", WHOLE)
def test_whole_packings_go_on_loading(load_packed, way):
    model, other = load_packed("first"), load_packed("second")
    model.load_state_dict(WHOLE[way](other.state_dict()))
    assert torch.equal(logits_of(model), logits_of(other))
    config, wanted = model.config.quantization_config, other.config.quantization_config
    assert (config.base, config.fingerprint) == (wanted.base, wanted.fingerprint)
    model.load_state_dict(WHOLE[way](load_packed("first").state_dict()))
    assert torch.equal(logits_of(model), logits_of(load_packed("first")))


def test_what_another_process_made_is_taken_with_its_metadata(load_packed, monkeypatch):
    """Known codes are those of a process, so here it is made to know none."""
    model, other = load_packed("first"), load_packed("second")
    saved, bare = through_torch(other.state_dict()), {**other.state_dict()}
    own = {**load_packed("first").state_dict()}
    monkeypatch.setattr(known_codes, "_known", {})
    with pytest.raises(RuntimeError, match="has lost the metadata"):
        model.load_state_dict(bare)
    model.load_state_dict(own)  # what is there already
    model.load_state_dict(saved)
    assert torch.equal(logits_of(model), logits_of(other))
    for layer, twin in zip(packed_layers(model).values(), packed_layers(load_packed("first")).values(), strict=True):
        layer.load_state_dict(twin.state_dict())  # a layer's own has metadata too


@pytest.mark.parametrize("way", WHOLE)
def test_a_base_that_needs_its_start_says_so_wherever_it_is_put(load_packed, folders, caplog, way):
    model, needy = load_packed("first"), load_packed("loftq")
    model.load_state_dict(WHOLE[way](needy.state_dict()))
    with caplog.at_level(logging.WARNING, logger="lowra"):
        logits_of(model)
    assert sum("without it the outputs are far off" in record.getMessage() for record in caplog.records) == 1
    assert model.config.quantization_config.initial_adapter == needy.config.quantization_config.initial_adapter
    caplog.clear()
    adapted = PeftModel.from_pretrained(model, folders / "loftq" / "initial_adapter")
    with caplog.at_level(logging.WARNING, logger="lowra"):
        found = logits_of(adapted.eval())
    assert not caplog.records
    wanted = PeftModel.from_pretrained(load_packed("loftq"), folders / "loftq" / "initial_adapter").eval()
    assert torch.equal(found, logits_of(wanted))


def test_a_base_that_needed_its_start_no_longer_asks_when_it_is_whole(load_packed, caplog, tmp_path):
    model = load_packed("loftq")
    model.load_state_dict(load_packed("second").state_dict())
    with caplog.at_level(logging.WARNING, logger="lowra"):
        logits_of(model)
        model.save_pretrained(tmp_path / "saved")
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert not [record for record in caplog.records if "start" in record.getMessage()]


def test_what_needs_its_start_is_saved_as_that(load_packed, caplog, tmp_path):
    model = load_packed("first")
    model.load_state_dict(load_packed("loftq").state_dict())
    model.save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.WARNING, logger="lowra"):
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert any("without it the outputs are far off" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("names", [("levels",), ("scales", "scale_steps"), ("levels", "scales", "scale_steps")])
def test_tables_without_their_codes_are_refused(load_packed, names):
    def parts_of(model):
        return {n: t for n, t in model.state_dict().items() if n.endswith(names)}

    model, before = load_packed("first"), logits_of(load_packed("first"))
    with pytest.raises(RuntimeError, match="came without the codes"):
        model.load_state_dict(parts_of(load_packed("second")), strict=False)
    assert torch.equal(logits_of(model), before)
    model.load_state_dict(parts_of(model), strict=False)  # its own
    trained = load_packed("first")
    for layer in packed_layers(trained).values():
        layer.levels.data *= 0.5
    state = trained.state_dict()  # of the same codes, which its metadata says
    for name in [name for name in state if not name.endswith(names)]:
        del state[name]
    if "levels" not in names:  # the others stand beside levels that were trained since
        with pytest.raises(RuntimeError, match="are not those that this state dict was made with"):
            model.load_state_dict(state, strict=False)
        return
    model.load_state_dict(state, strict=False)
    assert torch.equal(logits_of(model), logits_of(trained))


def test_layers_of_two_packings_are_told(load_packed, caplog):
    model, other = load_packed("first"), load_packed("second")
    mixed = {**model.state_dict(), **{k: v for k, v in other.state_dict().items() if ".layers.1." in k}}
    with caplog.at_level(logging.WARNING, logger="lowra"):
        model.load_state_dict(mixed)
    assert any("layers of another packing" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("data", [False, True])
def test_averages_put_in_as_parameters_are_refused(load_packed, data):
    model, other = load_packed("first"), load_packed("second")
    logits_of(model)
    averaged = mean(model.state_dict(), other.state_dict())
    for name, layer in packed_layers(model).items():
        for leaf in layer.packed_tensors():
            parameter = torch.nn.Parameter(averaged[f"{name}.{leaf}"], requires_grad=False)
            if data:
                getattr(layer, leaf).data = parameter.data
            else:
                setattr(layer, leaf, parameter)
    with pytest.raises(ValueError, match="no numbers"):
        logits_of(model)
    for layer in packed_layers(model).values():
        layer.prepare()
    assert torch.isfinite(logits_of(model)).all()
