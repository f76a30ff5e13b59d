"""Whether a GPU has room for graphs, with a memory that is reckoned: of a training loop, in units of 10 kB."""

import contextlib
import gc
import types
import weakref

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

from lowra.integrations import layer_graphs
from lowra.integrations.graph_memory import Room, has_room

DEVICE = torch.device("cuda", 0)
UNIT = 10**4


@pytest.fixture
def memory(monkeypatch):
    """The figures of a GPU of 100 units, as PyTorch gives them."""
    now = types.SimpleNamespace(allocated=20, reserved=0, peak=0, free=90, limit=1.0)
    figures = {
        "memory_allocated": lambda: now.allocated * UNIT,
        "memory_reserved": lambda: max(now.reserved, now.allocated) * UNIT,
        "max_memory_allocated": lambda: max(now.peak, now.allocated) * UNIT,
        "mem_get_info": lambda: (now.free * UNIT, 100 * UNIT), "get_per_process_memory_fraction": lambda: now.limit,
    }  # fmt: skip
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return now


@pytest.mark.parametrize(
    ("limit", "free", "fits"), [(1.0, 60, True), (0.5, 60, True), (0.3, 60, False), (1.0, 8, False), (0.35, 60, True)]
)
def test_room_within_what_a_process_may_take(memory, limit, free, fits):
    memory.reserved, memory.limit, memory.free = 25, limit, free
    assert has_room(2 * UNIT, 11.2 * UNIT, DEVICE) is fits


class Loop:
    """Steps of a model whose gradients take 4 units and AdamW's states 8 (or as many as said), as memory sees them.

    A pass works in 6 units beside the gradients; graphs would take 1.
    """

    def __init__(self, memory, accumulation=1, states=8, optimizer=torch.optim.AdamW, resumed=False, work=6):
        self.model = torch.nn.Linear(100, 100, bias=False)
        self.room, self._memory, self._states, self._work = Room(self.model, DEVICE), memory, states, work
        self._accumulation, self._count, self._opener = accumulation, 0, object()
        self.optimizer = optimizer(self.model.parameters(), lr=1e-9)
        self._has_states = resumed
        memory.allocated += states if resumed else 0
        self.found = []

    def run(self, steps):
        """After how many passes of one key graphs were made; None for none."""
        for _ in range(steps):
            for _ in range(self._accumulation):
                if self._count and self._asks():
                    return self._count
                if not self._count:
                    self.room.begins("key", self._opener)
                self._count += 1
                self._peak(self._work + (4 if self.model.weight.grad is None else 0))
                self._memory.allocated += 4 if self.model.weight.grad is None else 0
                self.model.weight.grad = torch.zeros_like(self.model.weight)
            self._memory.allocated += 0 if self._has_states else self._states
            self._has_states = True
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._memory.allocated -= 4
        return None

    def _peak(self, more):
        self._memory.peak = max(self._memory.peak, self._memory.allocated + more)

    def _asks(self):
        self.room.begins("key", self._opener)
        if not self.room.may_have("key"):
            return False
        self.found.append(self.room.lacking("key", lambda: UNIT))
        return not self.found[-1]


# A step takes at its peak 20 that stay, 8 states, 4 gradients, 6 to work in, 1 of graphs: 39, and 3 % between blocks.
@pytest.mark.parametrize(
    ("accumulation", "resumed", "cap", "after"),
    [(1, False, 50, 1), (1, False, 41, 2), (1, False, 38, None), (1, True, 41, 2), (1, True, 38, None),
     (4, False, 55, 1), (4, False, 41, 8), (4, False, 38, None), (4, True, 41, 8)],
)  # fmt: skip
def test_gradients_and_states_count_once(memory, accumulation, resumed, cap, after):
    memory.limit = cap / 100
    loop = Loop(memory, accumulation, resumed=resumed)
    assert loop.run(5) == after
    if after is None:
        assert loop.found[-1] == "the GPU has no room for graphs beside a step"
        assert all("before the optimiser has stepped twice" in reason for reason in loop.found[:1])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("work", [0, 6, 14])
def test_graphs_are_made_only_where_they_fit(memory, accumulation, resumed, work):
    most = 20 + 8 + 4 + work + 1
    for cap in range(most - 3, most + 14):
        memory.limit, memory.allocated, memory.peak = cap / 100, 20, 0
        after = Loop(memory, accumulation, resumed=resumed, work=work).run(3)
        assert (cap >= most or after is None) and (cap < most + 2 or after is not None)


def test_states_of_8_bits_are_what_they_take(memory):
    memory.limit = 0.345  # with 8 units of states it would take 39
    assert Loop(memory, states=2).run(5) == 2


def test_states_that_are_to_come_count(memory):
    """A parameter that got no gradient yet, as of an adapter that is not active: gradient and states are 12 units."""
    memory.limit = 0.41
    loop = Loop(memory)
    loop.model.register_parameter("later", torch.nn.Parameter(torch.zeros(100, 100)))
    assert loop.run(5) is None
    loop.model.later.requires_grad_(False)
    assert loop.run(1)


def test_an_optimizer_of_another_kind(memory):
    """Of which PyTorch does not tell: gradients and states are counted whether they are there or not."""
    memory.limit = 0.41

    class Own:
        def __init__(self, parameters, lr):
            self._parameters = list(parameters)

        def step(self):
            pass

        def zero_grad(self):
            for parameter in self._parameters:
                parameter.grad = None

    assert Loop(memory, optimizer=Own).run(5) is None
    memory.limit, memory.allocated, memory.peak = 0.60, 20, 0
    assert Loop(memory, optimizer=Own).run(5) == 1


def test_a_step_of_another_model_tells_nothing(memory):
    room = Room(torch.nn.Linear(2, 2), DEVICE)
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(other.parameters()).step()
    assert room._steps == 0


def test_a_peak_that_was_reset_is_remembered(memory):
    memory.limit = 0.38
    loop = Loop(memory)
    loop.run(2)
    memory.peak = 0
    assert loop.run(2) is None


def test_nobody_is_told_of_steps_once_a_model_has_gone(memory):
    gc.collect()
    before = len(_global_optimizer_post_hooks)
    room = Room(torch.nn.Linear(2, 2), DEVICE)
    assert len(_global_optimizer_post_hooks) == before + 1
    del room
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before


def test_a_step_that_finds_no_room_leaves_none_of_its_tensors_behind(memory, monkeypatch):
    monkeypatch.setattr(layer_graphs, "bytes_of_graphs", lambda *_: 200.0 * UNIT)
    recorder = types.SimpleNamespace(without_chance=contextlib.nullcontext)
    monkeypatch.setattr(layer_graphs, "Recorder", lambda device: recorder)
    layer = torch.nn.Linear(2, 2)
    shared = layer_graphs._Shared(layer)

    def attempt():
        hidden = types.SimpleNamespace(device=DEVICE, values=torch.ones(2))
        call = types.SimpleNamespace(tensors=[hidden], function=None, key="key")
        shared.begins(call, layer)
        assert shared.may_have("key")
        assert shared.place_for(call, layer) is None
        return weakref.ref(hidden.values)

    assert attempt()() is None
    assert not shared.may_have("key")
