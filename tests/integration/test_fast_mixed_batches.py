"""Batches that go through other adapters than the last: by the same session, with the tokens of one of their own."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_fast_generation import CONFIGS, DEVICES, load
from transformers import AutoModelForCausalLM

import lowra
from lowra.generation import decoder, fast

BATCH = 4
CONFIG = {
    "law": LoraConfig(r=4, target_modules="all-linear"),
    "news": LoraConfig(r=8, target_modules=["q_proj", "down_proj", "o_proj"]),
    "sport": LoraConfig(r=12, lora_alpha=3, target_modules=["v_proj", "up_proj"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mixed")
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(path)
    return path


@pytest.fixture(params=DEVICES)
def model(folder, request):
    torch.manual_seed(1)
    (first, config), *others = CONFIG.items()
    model = get_peft_model(load(folder, request.param), config, first)
    for name, config in others:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def session(model):
    return fast.session_of(model.get_base_model())


def tokens(model, names, **options):
    ids = torch.arange(5, 5 + 6 * len(names), device=model.device).view(len(names), 6)
    usual = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "custom_generate": lowra.fast_decoding}
    return model.generate(ids, adapter_names=list(names), **{**usual, **options})


def alone(model, names):
    """By a session of its own."""
    fast.release(model)
    return tokens(model, names)


def test_all_compositions_go_through_one_session(model, caplog):
    of_all = ["sport", "law", "__base__", "news"]
    nobody = ["__base__"] * BATCH
    some = itertools.islice(itertools.product(["__base__", *CONFIG], repeat=BATCH), 5, 250, 23)
    compositions = [of_all, nobody, *some]
    expected = {tuple(names): alone(model, names) for names in compositions}
    fast.release(model)
    tokens(model, nobody)  # nothing is to be shared yet
    tokens(model, of_all)
    kept = session(model)
    for names in compositions:
        assert torch.equal(tokens(model, names), expected[tuple(names)]), names
        assert session(model) is kept
    if model.device.type == "cpu":
        for names in compositions[:4]:
            assert torch.equal(tokens(model, names, custom_generate=None), expected[tuple(names)])
    assert not caplog.records


def test_adapters_gather_up_to_few_ranks_or_as_many_as_a_batch_has(model, monkeypatch):
    turns = (("law", False), ("news", False), ("law", True), ("sport", False), ("news", True))
    expected = {name: alone(model, [name]) for name in CONFIG}
    fast.release(model)
    for name, same in turns:
        before = session(model)
        assert torch.equal(tokens(model, [name]), expected[name])
        assert (session(model) is before) == same
    monkeypatch.setattr(decoder, "_GATHERED", 10)
    for name, same in turns:
        before = session(model)
        tokens(model, [name] * BATCH)
        assert (session(model) is before) == same
    for names, same in ((["law", "news"], False), (["sport", "law"], False), (["news", "law"], False)):
        before = session(model)
        tokens(model, names)  # three are more than two sequences can need
        assert (session(model) is before) == same


def test_what_happens_to_adapters_between_batches(model, caplog):
    first, second = ["law", "news", "__base__", "law"], ["news", "sport", "news", "sport"]
    tokens(model, first)
    tokens(model, second)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.law" in name:
                parameter.neg_()
    found = tokens(model, first)
    assert torch.equal(found, alone(model, first))
    tokens(model, second)
    model.delete_adapter("sport")
    found = tokens(model, first)
    assert torch.equal(found, alone(model, first))
    model.add_adapter("sport", LoraConfig(r=4, target_modules=["q_proj"]))
    found = tokens(model, second)
    assert torch.equal(found, alone(model, second)) and not caplog.records
    kept = session(model)
    assert torch.equal(tokens(model, second), found) and session(model) is kept


def test_an_adapter_that_is_not_covered_hinders_those_alone_that_it_is_in(model, caplog):
    first, second = ["law", "news", "__base__", "law"], ["news", "sport", "news", "sport"]
    tokens(model, first)
    tokens(model, second)
    model.delete_adapter("sport")
    model.add_adapter("sport", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    tokens(model, first)
    assert not caplog.records


@pytest.mark.parametrize("names", [[], ["law"], ["law", "news", "law"], ["law", "chess"]])
def test_as_many_names_as_sequences_of_adapters_that_there_are(model, names):
    ids = torch.arange(5, 17, device=model.device).view(2, 6)
    said = []
    for custom_generate in (None, lowra.fast_decoding):
        with pytest.raises(ValueError, match="same as the number of inputs|non-existing") as refused:
            model.generate(ids, adapter_names=names, max_new_tokens=3, custom_generate=custom_generate)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_switches_between_adapters_of_a_kind_go_through_one_session(model, caplog):
    model.add_adapter("chess", CONFIG["law"])
    for name, parameter in model.named_parameters():
        if "lora_B.chess" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    ids = torch.arange(5, 17, device=model.device).view(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def switched(name, fresh=False):
        model.set_adapter(name)
        if fresh:
            fast.release(model)
        return model.generate(ids, custom_generate=lowra.fast_decoding, **options)

    expected = {name: switched(name, fresh=True) for name in ("law", "chess", "news")}
    fast.release(model)
    switched("law")
    switched("chess")  # factors of the model's own type had no room of their own yet
    kept = session(model)
    for name in ("law", "chess", "chess", "law"):
        assert torch.equal(switched(name), expected[name]) and session(model) is kept
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.law" in name:
                parameter.neg_()
    trained = switched("law")
    assert session(model) is kept and not torch.equal(trained, expected["law"])
    model.delete_adapter("chess")
    assert torch.equal(switched("law"), trained) and session(model) is kept
    assert torch.equal(switched("news"), expected["news"]) and session(model) is not kept
    assert torch.equal(switched("law"), trained)
    with model.disable_adapter():
        bare = model.generate(ids, custom_generate=lowra.fast_decoding, **options)
        assert torch.equal(bare, model.generate(ids, **options)) or model.device.type == "cuda"
    assert not caplog.records


@pytest.mark.parametrize("change", ["scaling", "target"])
def test_adapters_of_another_kind_have_a_session_of_their_own(model, change):
    ids = torch.arange(5, 17, device=model.device).view(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    other = {"scaling": {"lora_alpha": 2}, "target": {"target_modules": ["q_proj", "k_proj"]}}[change]
    model.add_adapter("chess", LoraConfig(**{"r": 4, "target_modules": "all-linear", **other}))
    model.eval()
    for name in ("law", "chess", "law", "chess"):
        before = session(model)
        model.set_adapter(name)
        found = model.generate(ids, custom_generate=lowra.fast_decoding, **options)
        assert session(model) is not before
        if model.device.type == "cpu":
            assert torch.equal(found, model.generate(ids, **options))


def test_adapters_that_change_places_do_not_change_sequences(model):
    names = ["red", "blue", "red", "blue"]

    def put(red, blue):
        for name, target in (("red", red), ("blue", blue)):
            if name in model.peft_config:
                model.delete_adapter(name)
            model.add_adapter(name, LoraConfig(r=4, target_modules=[target]))
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B.red" in name or "lora_B.blue" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.eval()

    put("q_proj", "k_proj")
    tokens(model, names)
    for _ in range(2):
        tokens(model, names)
        put("k_proj", "q_proj")
        found = tokens(model, names)
        assert torch.equal(found, alone(model, names))
        put("q_proj", "k_proj")
