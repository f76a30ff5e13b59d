"""What `lowra.fast_decoding` takes for untouched: never a model of which a decoder would read something else."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaMLP

import lowra
from lowra.generation import fast, untouched
from lowra.nn.trained_tables import bake_tables, train_tables


@pytest.fixture
def model(adapted_llama):
    return copy.deepcopy(adapted_llama)


def first(model):
    return model.get_base_model().model.layers[0]


def query(model):
    return first(model).self_attn.q_proj


def with_other_data(model):
    weight = query(model).lora_A["a"].weight
    weight.data = weight.data.clone()


def in_another_module(model):
    mlp = first(model).mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def in_training_with_dropout(model):
    first(model).self_attn.attention_dropout = 0.5
    first(model).train()


def layers_in_another_order(model):
    layers = model.get_base_model().model.layers
    layers[0], layers[1] = layers[1], layers[0]


def with_other_attributes(model):
    attributes = dict(vars(first(model).self_attn), scaling=3.0)
    first(model).self_attn.__dict__ = attributes


def with_another_property(model):
    kind = type(query(model))
    query(model).__class__ = type(kind.__name__, (kind,), {"disable_adapters": True, "__module__": kind.__module__})


def by_another_function(model):
    def louder(*args, **keywords):
        out, weights = sdpa_attention_forward(*args, **keywords)
        return 20 * out, weights

    AttentionInterface.register("louder still", louder)
    model.get_base_model().config._attn_implementation = "louder still"


CHANGES = {
    "other active adapter": lambda model: model.set_adapter("b"),
    "both active": lambda model: model.base_model.set_adapter(["a", "b"]),
    "active in a layer, in place": lambda model: query(model)._active_adapter.append("b"),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged, in place": lambda model: query(model).merged_adapters.append("a"),
    "merged": lambda model: model.base_model.merge_adapter(),
    "scaling": lambda model: query(model).set_scale("a", 3.0),
    "scaling, in place": lambda model: query(model).scaling.update(a=5.0),
    "a variant": lambda model: query(model).lora_variant.update(a=object()),
    "deleted": lambda model: model.delete_adapter("a"),
    "other rank": lambda model: query(model).update_layer("a", 8, 1.0, config=LoraConfig(r=8)),
    "other factor": lambda model: setattr(query(model).lora_A["a"], "weight", nn.Parameter(torch.ones(4, 64))),
    "other data": with_other_data,
    "other module of a factor": lambda model: query(model).lora_B.update({"a": nn.Linear(4, 64, bias=False)}),
    "a bias of a factor": lambda model: setattr(query(model).lora_B["a"], "bias", nn.Parameter(torch.ones(64))),
    "unloaded": lambda model: model.base_model.unload(),
    "other layer": in_another_module,
    "fewer layers": lambda model: model.get_base_model().model.layers.pop(1),
    "layers in another order": layers_in_another_order,
    "attributes": with_other_attributes,
    "epsilon": lambda model: setattr(first(model).input_layernorm, "variance_epsilon", 0.1),
    "norm": lambda model: first(model).input_layernorm.double(),
    "norm, put past everything": lambda model: first(model).input_layernorm._parameters.update(weight=torch.ones(64)),
    "head": lambda model: setattr(model.get_base_model(), "lm_head", nn.Linear(64, 96, bias=False)),
    "body": lambda model: setattr(model.get_base_model(), "model", copy.deepcopy(model.get_base_model().model)),
    "embeddings": lambda model: model.get_base_model().set_input_embeddings(nn.Embedding(96, 64)),
    "levels": lambda model: setattr(query(model).base_layer, "levels", nn.Parameter(-query(model).base_layer.levels)),
    "frequencies": lambda model: model.get_base_model().model.rotary_emb.inv_freq.mul_(2),
    "config": lambda model: setattr(model.get_base_model().config, "num_hidden_layers", 1),
    "other config": lambda model: setattr(model.get_base_model(), "config", copy.copy(model.config)),
    "attention": by_another_function,
    "class": with_another_property,
    "a layer in training": lambda model: (
        setattr(first(model).self_attn, "attention_dropout", 0.5) or first(model).train()
    ),
    "the model's class": lambda model: setattr(
        model.get_base_model(), "__class__", type("Other", (type(model.get_base_model()),), {"_sample": print})
    ),
}


CHANGES_OF_CLASSES = {
    "forward of a class": (LlamaMLP, "forward", lambda self, x: 2 * x),
    "property of a class": (LoraLayer, "merged", True),
    "loop of a class": (LlamaForCausalLM, "_sample", print),
    "head of a class": (LlamaForCausalLM, "get_output_embeddings", lambda self: nn.Linear(64, 96)),
}


@pytest.mark.parametrize("change", [*CHANGES, *CHANGES_OF_CLASSES])
def test_no_change_is_overlooked(model, change, monkeypatch):
    bare = model.get_base_model()
    with torch.inference_mode():
        decoder = fast.Decoder(bare, 96)
        assert decoder.is_current(bare) and decoder.untouched.is_same(bare) and decoder.is_current(bare)
    if change in CHANGES:
        CHANGES[change](model)
    else:
        monkeypatch.setattr(*CHANGES_OF_CLASSES[change])
    bare = model.get_base_model()
    with torch.inference_mode():
        assert not decoder.untouched.is_same(bare) or change == "frequencies"
        found = decoder.is_current(bare)
        monkeypatch.setattr(untouched, "are_changes_told", lambda: False)
        assert decoder.is_current(bare) == found == (change == "other config")


def tokens(model, **options):
    usual = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "custom_generate": lowra.fast_decoding}
    return model.generate(torch.arange(5, 15).view(2, 5), **{**usual, **options})


@pytest.mark.parametrize("names", [None, ["a", "b"]])
def test_what_nobody_touched_is_not_read_again(model, monkeypatch, caplog, names):
    options = {} if names is None else {"adapter_names": names}
    before = [tokens(model, **options) for _ in range(2)][-1]
    monkeypatch.setattr(fast.Decoder, "__init__", lambda *_: pytest.fail("read"))
    assert torch.equal(tokens(model, **options), before) and not caplog.records


def test_a_request_of_another_shape_reads_nothing_again(model, monkeypatch):
    monkeypatch.setattr(fast, "_SLOTS", 8)
    options = [{}, {"max_new_tokens": 30}, {"max_new_tokens": 3}, {"do_sample": True, "max_new_tokens": 2}]
    expected = [tokens(model, custom_generate=None, **own) for own in options[:3]]
    fast.release(model)
    for _ in range(2):
        tokens(model)
    monkeypatch.setattr(fast.Decoder, "__init__", lambda *_: pytest.fail("read"))
    for own, plain in zip(options, expected, strict=False):
        assert torch.equal(tokens(model, **own), plain)
    tokens(model, **options[-1])
    assert torch.equal(tokens(model), expected[0])


def test_other_adapters_are_read_once(model, monkeypatch):
    reads, read = [], fast.Decoder.__init__
    monkeypatch.setattr(fast.Decoder, "__init__", lambda self, *given: reads.append(given[2:]) or read(self, *given))
    for number in range(4):
        names = ["a", "b"] if number % 2 else ["b", "__base__"]
        del reads[:]
        found = tokens(model, adapter_names=names)
        # With the second request it is known what to look at, and all later ones go through adapters that are known.
        assert len(reads) == [1, 2, 0, 0][number]
        assert torch.equal(found, tokens(model, adapter_names=names, custom_generate=None))
    model.set_adapter("b")
    for number in range(4):
        model.set_adapter("ab"[number % 2])
        del reads[:]
        found = tokens(model)
        assert len(reads) == (2 if number == 0 else 1)
        assert torch.equal(found, tokens(model, custom_generate=None))


def test_hooks_and_forwards_count_in_a_model_that_is_untouched_otherwise(model, caplog):
    fast._warn.cache_clear()
    for _ in range(2):
        tokens(model)
    hook = query(model).register_forward_hook(lambda module, inputs, output: -output)
    assert torch.equal(tokens(model), tokens(model, custom_generate=None)) and "has a hook" in caplog.text
    hook.remove()
    mlp = first(model).mlp
    mlp.forward = functools.partial(torch.mul, 2)
    tokens(model)
    assert "the forward of LlamaMLP has been replaced" in caplog.text
    del mlp.forward
    lowra.tile_mlps(model.get_base_model())
    for _ in range(2):
        tokens(model)
    model.get_base_model().forward = functools.partial(model.get_base_model().forward)
    tokens(model)
    assert "the forward of LlamaForCausalLM has been replaced" in caplog.text


def test_codes_that_were_written_into_are_refused_as_ever(model):
    for _ in range(2):
        tokens(model)
    query(model).base_layer.weight.data.add_(1)
    with pytest.raises(ValueError, match="were written into"):
        tokens(model)


def test_tables_of_adapters_count(packed_llama):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(packed_llama), LoraConfig(r=4), "a").eval()
    model.add_adapter("b", LoraConfig(r=4))
    with torch.no_grad():
        for change in train_tables(model, scales=True).values():
            torch.nn.init.normal_(change, std=0.3)
    bake_tables(model)
    bare = model.get_base_model()
    with torch.inference_mode():
        decoder = fast.Decoder(bare, 96)
        assert decoder.is_current(bare) and decoder.untouched.is_same(bare)
        tables = query(model).base_layer.adapter_tables
        held = tables.of_adapter("a")
        tables.put("a", {layer: {part: t.clone() for part, t in parts.items()} for layer, parts in held.items()})
        assert not decoder.untouched.is_same(bare) and not decoder.is_current(bare)


def test_an_adapter_that_is_deleted_goes_although_a_session_is_kept(model):
    for _ in range(3):
        tokens(model)
    gone = weakref.ref(query(model).lora_A["b"].weight)
    model.delete_adapter("b")
    gc.collect()
    assert gone() is None and fast.session_of(model.get_base_model()) is not None


@pytest.mark.parametrize("packed", [True, False])
def test_naming_the_adapters_of_a_batch_is_done_by_peft_in_one_walk(model, dense_llama, packed, monkeypatch):
    if not packed:
        base = AutoModelForCausalLM.from_pretrained(dense_llama)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"), "a").eval()
    tuner, walks = model.base_model, []
    layers = [module for module in tuner.modules() if isinstance(module, LoraLayer)]
    walk = nn.Module.modules
    monkeypatch.setattr(nn.Module, "modules", lambda self: walks.append(self) or walk(self))
    with tuner._enable_peft_forward_hooks(adapter_names=["a", "__base__"]):
        assert len(layers) > 5 and all(len(layer._forward_pre_hooks) == 1 for layer in layers)
    assert not any(layer._forward_pre_hooks for layer in layers) and "modules" not in vars(tuner)
    assert walks.count(tuner) == (1 if packed else 3)  # one asks what the first adapted layer is, and goes no further
    with pytest.raises(ValueError, match="non-existing adapter"), tuner._enable_peft_forward_hooks(adapter_names=["z"]):
        pass
    assert "modules" not in vars(tuner)


def test_a_model_goes_although_one_of_its_modules_refers_to_it(adapted_llama):
    model = copy.deepcopy(adapted_llama)
    query(model).of_whom = [model.get_base_model()]
    for _ in range(3):
        tokens(model)
    gone = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_begins_anew(model):
    for _ in range(2):
        tokens(model)
    bare = model.get_base_model()
    for other in (copy.copy(bare), copy.deepcopy(bare), pickle.loads(pickle.dumps(bare))):
        assert fast.session_of(other) is None and fast.session_of(bare) is not None
