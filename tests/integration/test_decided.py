"""No change of what the host decides by is overlooked at a glance; layers share what they are called with."""

import functools
import types

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowra.integrations import decided
from lowra.integrations.decided import Decided
from lowra.integrations.layer_calls import Calls
from lowra.nn.buffers import Buffers
from lowra.nn.captured import NotCapturable
from lowra.nn.told_changes import versions


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.activation = nn.Linear(6, 6), nn.SiLU()
        self.held = nn.ModuleDict({"default": nn.Linear(6, 4)})
        self.numbers = nn.ParameterDict({"own": nn.Parameter(torch.ones(3))})
        self.scaling, self.merged, self.names, self.kinds = {"default": 2.0}, [], ["default"], {"a"}
        self.rates, self.gain, self.shift = {}, 1.0, torch.zeros(())
        self.branches, self.nested = nn.ModuleList([nn.SiLU()]), {"rates": {"own": 1.0}, "pairs": (1, [2])}
        self.config = types.SimpleNamespace(_attn_implementation="sdpa")
        self.register_buffer("table", torch.zeros(2, 3))


def other_data(block):
    block.linear.weight.data = block.linear.weight.data.clone()


def turned(block):
    block.linear.weight.data = block.linear.weight.data.t()


def narrowed(block):
    block.table.data = block.table.data[:1]


def of_other_kind(block):
    block.table.data = block.table.data.view(torch.int32)


def flat(block):
    block.table.resize_(6)


def past_attributes(block):
    vars(block)["gain"] = 3.0


def other_dictionary_of_attributes(block):
    block.__dict__ = {**vars(block), "gain": 3.0}


def other_dictionary_of_parameters(block):
    block.linear._parameters = {**block.linear._parameters, "weight": nn.Parameter(torch.ones(6, 6))}


def list_of_modules_made_anew(block):
    block.branches.append(nn.Identity())
    del block.branches[-1]
    block.branches[0] = nn.Tanh()


def other_data_of_plain_tensor(block):
    block.shift.data = torch.zeros(())


def own_forward(block):
    block.activation.forward = types.MethodType(lambda self, x: x, block.activation)


def wrapped_forward(block):
    """As accelerate does, under the name of what it wraps."""
    usual = block.activation.forward
    block.activation.forward = functools.wraps(usual)(lambda x: 3 * usual(x))


def other_class(block):
    block.activation.__class__ = nn.Identity


CHANGES = {
    "address": other_data, "strides": turned, "shape": narrowed, "dtype": of_other_kind, "resized": flat,
    "frozen": lambda block: block.linear.weight.requires_grad_(False),
    "other parameter": lambda block: setattr(block.linear, "weight", nn.Parameter(torch.ones(6, 6))),
    "parameter past PyTorch": lambda block: block.linear._parameters.update(weight=nn.Parameter(torch.ones(6, 6))),
    "no bias": lambda block: setattr(block.linear, "bias", None),
    "equal tensor of one number": lambda block: setattr(block, "shift", torch.zeros(())),
    "other module": lambda block: block.held.update({"default": nn.Linear(6, 4)}),
    "more modules": lambda block: block.held.update({"second": nn.Linear(6, 4)}),
    "more parameters": lambda block: block.numbers.update({"second": nn.Parameter(torch.ones(1))}),
    "a buffer": lambda block: block.register_buffer("second", torch.ones(1)),
    "number": lambda block: setattr(block, "gain", 2.0),
    "number in a dictionary": lambda block: block.scaling.update(default=3.0),
    "first in a dictionary": lambda block: block.rates.update(default=3.0),
    "first in a list": lambda block: block.merged.append("default"),
    "in a list": lambda block: block.names.__setitem__(0, "second"), "in a set": lambda block: block.kinds.add("b"),
    "mode": lambda block: block.eval(), "new attribute": lambda block: setattr(block.activation, "slope", 1.0),
    "gone attribute": lambda block: delattr(block, "gain"), "past attributes": past_attributes,
    "other dictionary": lambda block: setattr(block, "scaling", {"default": 3.0}),
    "other list": lambda block: setattr(block, "names", ["second"]),
    "deep in a dictionary": lambda block: block.nested["rates"].update(own=2.0),
    "deep in a tuple": lambda block: block.nested["pairs"][1].append(2),
    "tuple for a list": lambda block: setattr(block, "names", ("default",)),
    "attributes": other_dictionary_of_attributes, "parameters": other_dictionary_of_parameters,
    "modules": list_of_modules_made_anew, "plain tensor": other_data_of_plain_tensor,
    "plain tensor trained": lambda block: block.shift.requires_grad_(True),
    "config": lambda block: setattr(block.config, "sliding_window", 4),
    "class": other_class, "attention": lambda block: setattr(block.config, "_attn_implementation", "eager"),
}  # fmt: skip


@pytest.fixture(params=["at a glance", "read in full"])
def glance(request, monkeypatch):
    if request.param == "read in full":
        monkeypatch.setattr(decided, "are_changes_told", lambda: False)
    else:
        assert decided.are_changes_told()
    return request.param == "at a glance"


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_overlooked(change, glance):
    block = Block()
    was = Decided(block)
    assert was.is_same() and was.is_same() and (was._untouched is not None) is glance
    CHANGES[change](block)
    assert not was.is_same() and not was.is_same()


def test_what_was_touched_and_is_the_same(glance, monkeypatch):
    block = Block()
    was = Decided(block)
    assert was.is_same()
    block.gain = float("1")
    block.eval().train()
    assert was.is_same()
    if glance:  # and is known again from then on
        monkeypatch.setattr(was, "_read", lambda: pytest.fail("read"))
        assert was.is_same()


def test_what_holds_the_same_is_the_same_and_watched(glance):
    """PEFT makes a new list of active adapters whenever they are set, the same ones too."""
    block = Block()
    was = Decided(block)
    for _ in range(2):
        assert was.is_same() and was.is_same()
        block.names, block.scaling, block.nested = ["default"], {"default": 2.0}, {**block.nested}
        block.linear._parameters = dict(block.linear._parameters)
    assert was.is_same() and was.is_same()
    block.nested["rates"]["own"] = 2.0
    assert not was.is_same()


class Asking(nn.Module):
    """Names objects of PyTorch that have, or refuse, an attribute of any name."""

    def forward(self, x):
        return torch.ops.aten.neg(x) if torch.classes else x


def test_to_look_at_names_leaves_no_trace():
    before = dict(vars(torch.ops)), dict(vars(torch.classes))
    assert Decided(Asking()).is_same()
    assert (dict(vars(torch.ops)), dict(vars(torch.classes))) == before


def test_a_class_that_computes_something_else(glance, monkeypatch):
    block = Block()
    was = Decided(block)
    assert was.is_same() and was.is_same()
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: x)
    assert not was.is_same()


class Attending(nn.Module):
    """Finds attention as the layers of Transformers do."""

    def forward(self, *args):
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", louder)(*args)


def louder(*args):
    return tuple(2 * part for part in sdpa_attention_forward(*args))


REPLACED = {
    "in a registry": lambda patch: patch.setitem(AttentionInterface._global_mapping, "sdpa", louder),
    "past a registry": lambda patch: patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", louder),
    "under a module's name": lambda patch: patch.setitem(globals(), "ALL_ATTENTION_FUNCTIONS", {"sdpa": louder}),
    "in PyTorch": lambda patch: patch.setattr(nn.functional, "silu", nn.functional.gelu),
    "in PyTorch, of what is called": lambda patch: patch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *args, **keywords: None
    ),
}


@pytest.mark.parametrize("how", REPLACED)
def test_a_function_in_the_place_of_another(how, glance, monkeypatch):
    block = nn.Sequential(Block(), Attending())
    was = Decided(block)
    assert was.is_same() and was.is_same()
    REPLACED[how](monkeypatch)
    assert not was.is_same()
    monkeypatch.undo()
    assert was.is_same()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: block.activation.register_forward_hook(print), "it has hooks"),
        (lambda block: block.activation._forward_hooks.update({0: print}), "it has hooks"),
        (own_forward, "has been replaced"),
        (wrapped_forward, "has been replaced"),
    ],
    ids=["hook", "hook past PyTorch", "forward", "wrapper"],
)
def test_what_stands_between_is_refused(change, reason, glance):
    block = Block()
    was = Decided(block)
    assert was.is_same() and was.is_same()
    change(block)
    for _ in range(2):
        with pytest.raises(NotCapturable, match=reason):
            was.is_same()


def call(calls, layer, hidden, **keywords):
    return calls.next(layer, functools.partial(layer, **keywords), (hidden,))


def test_calls_of_one_pass_share_a_key():
    calls, first, second = Calls(), nn.Identity(), nn.Identity()
    mask, hidden = torch.ones(3), torch.ones(2, 3)
    one = call(calls, first, hidden, mask=mask, tables=(mask, None), cached=False)
    calls.keep(one.key)
    other = call(calls, second, hidden + 1, mask=mask, tables=(mask, None), cached=False)
    assert other.key == one.key and not other.opens_pass
    again = call(calls, first, hidden, mask=mask.clone(), tables=(mask, None), cached=False)
    assert again.key is one.key and again.opens_pass
    assert [tensor.tolist() for tensor in again.tensors[1:]] == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"cached": True}, {"cached": 0}, {"mask": torch.ones(4)}, {"mask": None}, {"other": 1},
        {"hidden": torch.ones(2, 4)}, {"hidden": torch.ones(3, 2).t()}, {"hidden": torch.ones(2, 3).requires_grad_()},
        {"hidden": torch.ones(2, 3).double()},
    ],
    ids=str,
)  # fmt: skip
def test_calls_that_differ_have_other_keys(change):
    calls, layers = Calls(), [nn.Identity(), nn.Identity()]
    usual = {"hidden": torch.ones(2, 3), "mask": torch.ones(3), "cached": False}
    keys = [call(calls, layer, **{**usual, **more}).key for layer, more in zip(layers, ({}, change), strict=True)]
    assert keys[0] != keys[1]


def test_the_state_of_the_host_is_part_of_a_key():
    calls, mask = Calls(), torch.ones(3)
    keys = [call(calls, nn.Identity(), mask, mask=mask).key]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(call(calls, nn.Identity(), mask, mask=mask).key)
    torch.use_deterministic_algorithms(True)
    try:
        keys.append(call(calls, nn.Identity(), mask, mask=mask).key)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(keys)) == 3


def test_lists_may_change_between_layers():
    calls, held = Calls(), [1]
    one = call(calls, nn.Identity(), torch.ones(1), held=held)
    held.append(2)
    assert call(calls, nn.Identity(), torch.ones(1), held=held).key != one.key


@pytest.mark.parametrize(
    "keywords", [{"a": object()}, {"a": torch.ones(1).requires_grad_()}, {"a": torch.ones(1, device="meta")}]
)
def test_calls_that_graphs_cannot_get_are_refused_every_time(keywords):
    calls = Calls()
    for _ in range(2):
        with pytest.raises(NotCapturable):
            call(calls, nn.Identity(), torch.ones(1), **keywords)


def test_inputs_are_copied_where_they_have_changed():
    mask = torch.zeros(3)
    buffers = Buffers([torch.ones(2), mask])
    buffers.fill([torch.ones(2), mask])
    mask.data = torch.ones(3)  # past its version: not noticed within a pass
    buffers.fill([torch.full((2,), 2.0), mask])
    assert buffers.inputs[0].tolist() == [2, 2] and buffers.inputs[1].tolist() == [0, 0, 0]
    buffers.forget()
    buffers.fill([torch.ones(2), mask])
    assert buffers.inputs[1].tolist() == [1, 1, 1]
    mask.add_(1)
    buffers.fill([torch.ones(2), mask])
    assert buffers.inputs[1].tolist() == [2, 2, 2]
    buffers.fill([torch.ones(2), torch.zeros(3)])
    assert buffers.inputs[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "change", [lambda own: own.update(a=1), lambda own: own.__ior__({"a": 1}), lambda own: own.__init__(a=1)]
)
def test_an_empty_dictionary_that_becomes_a_copy_of_another_has_changed(change):
    own = {}
    before = versions([own, {}])
    change(own)
    assert own == {"a": 1} and versions([own, {}]) != before
