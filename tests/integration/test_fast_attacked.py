"""`lowra.fast_decoding` after changes past every door: it computes what the model does, or leaves that to the model."""

import collections
import contextlib
import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.activations import ACT2FN
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import lowra


@pytest.fixture
def model(adapted_llama):
    return copy.deepcopy(adapted_llama)


class Recorder(LogitsProcessor):
    def __init__(self):
        self.scores = []

    def __call__(self, ids, scores):
        self.scores.append(scores.clone())
        return scores


def scores(model, **options):
    """Logits of all new tokens: they tell more than tokens do."""
    recorder, ids = Recorder(), torch.arange(5, 35).view(2, 15)
    options["logits_processor"] = LogitsProcessorList([recorder])
    model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, **options)
    return torch.stack(recorder.scores)


fast = functools.partial(scores, custom_generate=lowra.fast_decoding)


def layer(model):
    return model.get_base_model().model.layers[1]


def query(model):
    return layer(model).self_attn.q_proj


def configuration(model):
    return model.get_base_model().config


def louder(function):
    @functools.wraps(function)  # which gives it the name of what it stands before
    def changed(*args, **keywords):
        out = function(*args, **keywords)
        if isinstance(out, torch.Tensor):
            return 3 * out
        return (3 * out[0], *out[1:]) if isinstance(out, tuple) else out

    return changed


def seeing_less(function):
    def changed(*args, **keywords):
        mask = function(*args, **{**keywords, "allow_is_causal_skip": False}).clone()
        mask[..., :3] = False
        return mask

    return changed


def in_one_layer(model):
    ALL_ATTENTION_FUNCTIONS["louder in one"] = louder(ALL_ATTENTION_FUNCTIONS["sdpa"])
    other = copy.deepcopy(configuration(model))
    other._attn_implementation = "louder in one"
    layer(model).self_attn.config = other


def as_an_attribute(model):
    factor = query(model).lora_B["a"]
    weight = factor.weight.detach().clone()
    del factor.weight
    factor.register_buffer("weight", weight)
    yield
    factor.weight = 2 - weight


def with_computed_weights(model):
    norm = layer(model).input_layernorm
    parametrizations.weight_norm(norm, dim=None)
    yield
    norm.parametrizations.weight.original1.data[::2] *= 3


def in_the_place_of_a_module(model):
    vars(layer(model).self_attn)["q_proj"] = other = copy.deepcopy(query(model))
    yield
    other.register_forward_hook(lambda module, inputs, output: -output)


def with_other_code(model, monkeypatch):
    def forward(self, x):
        return 2 * x

    monkeypatch.setattr(modeling_llama.LlamaMLP.forward, "__code__", forward.__code__)


def with_another_activation(model, monkeypatch):
    monkeypatch.setitem(ACT2FN, "silu", nn.Hardswish)
    for block in model.get_base_model().model.layers:
        block.mlp.act_fn = nn.Hardswish()


def with_scalings_that_tell_nobody(model):
    query(model).scaling = collections.UserDict(query(model).scaling)
    yield
    query(model).scaling["a"] = 7.0


def with_a_scaling_in_place(model):
    query(model).scaling["a"] = torch.tensor(2.0)
    yield
    query(model).scaling["a"].mul_(3)


def with_another_class_of_configuration(model):
    kind = type(configuration(model))
    fewer = property(lambda self: 1, lambda self, value: None)
    configuration(model).__class__ = type(kind.__name__, (kind,), {"num_hidden_layers": fewer})


def a_hook_of_another_name(model):
    def hook(module, inputs, output):
        return -output

    hook.__module__ = "transformers.utils"
    layer(model).mlp.register_forward_hook(hook)


CHANGES = {
    # a configuration that forwards read at each call, and attributes that they do not
    "fewer layers": lambda model: setattr(configuration(model), "num_hidden_layers", 1),
    "a window": lambda model: setattr(configuration(model), "sliding_window", 4),
    "a window of a layer": lambda model: setattr(layer(model).self_attn, "sliding_window", 4),
    "heads": lambda model: setattr(configuration(model), "num_attention_heads", 8),
    "a cap": lambda model: setattr(configuration(model), "final_logit_softcapping", 30.0),
    "a cap of a layer": lambda model: setattr(layer(model).self_attn, "attn_logit_softcapping", 1.0),
    "norms of queries": lambda model: setattr(layer(model).self_attn, "q_norm", modeling_llama.LlamaRMSNorm(16)),
    "not causal": lambda model: setattr(layer(model).self_attn, "is_causal", False),
    "another configuration of a layer": in_one_layer,
    "another class of configuration": with_another_class_of_configuration,
    # what modules are made of
    "a norm without weights": lambda model: setattr(
        layer(model), "input_layernorm", nn.RMSNorm(64, elementwise_affine=False)
    ),
    "weights of a norm that are computed": with_computed_weights,
    "a factor that is no parameter": as_an_attribute,
    "another module in one's place": in_the_place_of_a_module,
    "a bias before B": lambda model: setattr(query(model).lora_A["a"], "bias", nn.Parameter(torch.ones(4))),
    "no dropout": lambda model: query(model).lora_dropout.update({"a": nn.Tanh()}),
    "a hook of a dropout": lambda model: query(model).lora_dropout["a"].register_forward_hook(lambda *given: -given[2]),
    "scalings that tell nobody": with_scalings_that_tell_nobody,
    "a scaling in place": with_a_scaling_in_place,
    "a hook of another name": a_hook_of_another_name,
    "a call of a module": lambda model: setattr(layer(model).mlp, "_call_impl", lambda x: x),
    "a compiled call of a module": lambda model: setattr(layer(model).mlp, "_compiled_call_impl", lambda x: x),
    # what belongs to all models of a process
    "a call of a class": lambda model, m: m.setattr(
        modeling_llama.LlamaMLP, "__call__", louder(nn.Module.__call__), raising=False
    ),
    "a call of all": lambda model, m: m.setattr(nn.Module, "_call_impl", louder(nn.Module._call_impl)),
    "a forward by another": lambda model, m: m.setattr(
        modeling_llama.LlamaMLP, "forward", louder(modeling_llama.LlamaMLP.forward)
    ),
    "other code": with_other_code,
    "another activation": with_another_activation,
    "products": lambda model, m: m.setattr(nn.functional, "linear", louder(nn.functional.linear)),
    "rotation": lambda model, m: m.setattr(modeling_llama, "rotate_half", louder(modeling_llama.rotate_half)),
    "rotary embedding": lambda model, m: m.setattr(
        modeling_llama, "apply_rotary_pos_emb", louder(modeling_llama.apply_rotary_pos_emb)
    ),
    "attention": lambda model, m: m.setattr(
        type(ALL_ATTENTION_FUNCTIONS),
        "get_interface",
        lambda self, *given: louder(ALL_ATTENTION_FUNCTIONS["sdpa"]),
    ),
    "mask": lambda model, m: m.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", seeing_less(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_computes_what_the_model_does_or_leaves_that_to_the_model(model, change, monkeypatch):
    for _ in range(2):
        fast(model)
    function = CHANGES[change]
    changed = function(model, monkeypatch) if function.__code__.co_argcount == 2 else function(model)
    if isinstance(changed, types.GeneratorType):
        next(changed)
        for _ in range(2):
            fast(model)
        next(changed, None)
    found = [fast(model) for _ in range(2)]
    expected = scores(model)
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-3)


def test_a_dropout_of_another_kind_counts_without_fast_decoding_too(model):
    before = scores(model)
    query(model).lora_dropout["a"] = nn.Tanh()
    assert not torch.equal(scores(model), before)
    query(model).lora_dropout["a"] = nn.Identity()
    query(model).lora_A["a"].bias = nn.Parameter(torch.ones(4))
    assert not torch.equal(scores(model), before)


class Changing(LogitsProcessor):
    def __init__(self, change):
        self.change = change

    def __call__(self, ids, scores):
        self.change(ids.shape[1])
        return scores


def test_a_model_that_is_changed_while_it_generates_is_refused(model):
    def other_adapter(length):
        model.set_adapter("b" if length > 16 else "a")

    def other_adapter_for_a_moment(length):
        with model.disable_adapter():
            model(torch.ones(1, 3, dtype=torch.long))

    for change, refused in ((other_adapter_for_a_moment, False), (other_adapter, True)):
        expect = pytest.raises(ValueError, match="changed while it generated") if refused else contextlib.nullcontext()
        options = {"logits_processor": LogitsProcessorList([Changing(change)]), "custom_generate": lowra.fast_decoding}
        with expect:
            model.generate(torch.arange(5, 20)[None], max_new_tokens=5, do_sample=False, pad_token_id=0, **options)
