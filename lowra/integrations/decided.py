"""What the host decides by when a layer is called, compared with what it was when the layer was captured.

A graph has fixed all of it: where parameters lie, which adapters are active, what is trained, rates and functions of
modules and those that these call, which codes a packed layer has.
"""

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from ..nn.captured import NotCapturable
from ..nn.hooks import HOOKS, hooks_of_all
from ..nn.linear import LowRALinear
from ..nn.packed_module import PackedModule
from ..nn.row_layout import is_sharded
from ..nn.tabled_linear import TabledLinear
from ..nn.told_changes import alike, are_changes_told, versions
from .called_names import Place, called_names
from .layer_calls import PLAIN_VALUES

_HOOKS_OF_ALL = hooks_of_all()
_CONTAINERS = (dict, list, tuple, set)
_NAMED = ("_modules", "_parameters", "_buffers")
_HOLDERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # which compute nothing
# What every module has for itself, and what a packed one makes of its tensors, which `row_layout` looks after.
_OF_TORCH = {*vars(nn.Module()), "_layout", "_seen", "_watched"} - {"training"}


class Decided:
    """Everything but tensors' values that decides what a layer computes, as it was when this was made.

    Raises:
        NotCapturable: see `is_same`.
        ValueError: the codes of a packed layer were written into.
    """

    def __init__(self, layer: nn.Module):
        self._modules = list(layer.modules())
        # Rates, factors, names of adapters, functions: also those of which nobody here has heard.
        every = list(map(vars, self._modules))
        self._names = [[name for name in own if name not in _OF_TORCH] for own in every]
        self._kinds: list[Any] = list(dict.fromkeys(map(type, self._modules)))
        self._places = called_names(kind.forward for kind in self._kinds)
        self._packed = [module for module in self._modules if isinstance(module, PackedModule)]
        linears = [module for module in self._modules if isinstance(module, LowRALinear)]
        self._with_tables = [linear for linear in linears if linear.adapter_tables is not None]
        self._kept, _ = self._held(every)  # because an identity is one only while its object lives
        self._called = [space.get(name) for space, name in self._places]  # likewise
        tensors = [*layer.parameters(), *layer.buffers(), *filter(_has_memory, self._kept)]
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        if any(map(is_sharded, self._tensors)):
            raise NotCapturable("it has sharded parameters")
        self._containers: list[Any] = []
        self._was = self._read()
        self._untouched: _Untouched | None = None

    def is_same(self) -> bool:
        """Whether it still is as it was.

        Raises:
            NotCapturable: something waits for a forward of the layer's modules, or has put itself in its place.
            ValueError: the codes of a packed layer were written into.
        """
        if self._untouched is not None and self._untouched.is_same() and self._read_often() == self._was[1]:
            return True
        if self._read() != self._was:
            return False
        if self._untouched is not None and self._untouched.is_of(self._containers):
            self._untouched.renew()
        elif are_changes_told():
            self._untouched = _Untouched(self._modules, self._containers, self._tensors, self._places)
        return True

    def _held(self, every: list[dict[str, Any]]) -> tuple[list[Any], dict[int, Any]]:
        """Values of all attributes, also of those in containers, however deep; and these containers by their places.

        Args:
            every: module's attributes.
        """
        values = [own.get(name) for own, names in zip(every, self._names, strict=True) for name in names]
        configs = {id(config): config for own in every if (config := own.get("config")) is not None}
        values += [vars(config) for config in configs.values() if hasattr(config, "__dict__")]
        containers: dict[int, Any] = {}
        known: set[int] = set()
        for place, value in enumerate(values):  # which grow
            if type(value) not in PLAIN_VALUES and isinstance(value, _CONTAINERS):
                containers[place] = value
                if value and id(value) not in known:
                    known.add(id(value))
                    values += _entries(value)
        return values, containers

    def _read(self) -> tuple[list[Any], list[Any]]:
        every = [vars(module) for module in self._modules]
        if any(own[kind] for own in every for kind in HOOKS) or any(_HOOKS_OF_ALL):
            raise NotCapturable("it has hooks, which replaying would not call")
        forwards = [own["forward"] for own in every if "forward" in own]
        if not all(map(_is_of_module_alone, forwards)):
            raise NotCapturable("the forward of a module in it has been replaced")
        # Identities stand for tensors and the like, whose comparison would not answer with yes or no.
        found: list[Any] = [id(value) for own in every for kind in _NAMED if own[kind] for value in own[kind].values()]
        found += [module.__class__ for module in self._modules]
        found += map(len, every)
        values, containers = self._held(every)
        compared = [value if type(value) in PLAIN_VALUES else id(value) for value in values]
        for place, container in containers.items():
            compared[place] = type(container), len(container)
        found += compared
        for tensor in self._tensors:
            found += (tensor.data_ptr(), tensor.requires_grad, tensor.dtype, tensor.shape, tensor.stride())
        found += [module.row_layout() for module in self._packed]
        found += [id(space.get(name)) for space, name in self._places]
        self._containers = list(containers.values())
        return [*found, *forwards], self._read_often()

    def _read_often(self) -> list[Any]:
        """What modules of the layer do not have in themselves."""
        found: list[Any] = [kind.forward for kind in self._kinds]
        for linear in self._with_tables:
            found += [table.data_ptr() for table in linear.current_tables().values()]
            if isinstance(linear, TabledLinear):
                found += linear.adapter_tables.active()
        return found


class _Untouched:
    """Whether nobody has touched a layer, at a glance: that it is the same is known then, and has to be read otherwise.

    A layer of PEFT has some 80 modules, and a comparison of all that they hold waits for memory most of the time. Here
    a dictionary is looked at once, whatever is in it.

    Args:
        modules: of the layer.
        containers: that are attributes of these.
        tensors: theirs, each once.
        places: by which their forwards find what they call.
    """

    def __init__(
        self, modules: list[nn.Module], containers: list[Any], tensors: list[torch.Tensor], places: tuple[Place, ...]
    ):
        self._modules, self._classes, self._containers = modules, list(map(type, modules)), containers
        every = self._every = list(map(vars, modules))
        # Of what is never called itself, nothing counts but what it holds.
        called = [own for own, kind in zip(every, self._classes, strict=True) if kind not in _HOLDERS]
        self._named = [own[kind] for own in every for kind in _NAMED]
        changing = [*self._named, *(container for container in containers if not isinstance(container, tuple))]
        self._dicts = [*every, *(each for each in changing if each and isinstance(each, dict))]
        self._dicts += {id(space): space for space, _ in places}.values()
        self._lists = [each for each in changing if each and not isinstance(each, dict)]
        # Most are, and then nothing but their length is looked at.
        self._empty = [*(own[kind] for own in called for kind in HOOKS), *_HOOKS_OF_ALL]
        self._empty += [each for each in changing if not each]
        self._tensors = tensors
        self._touched_first = [*self._dicts, *self._empty, *modules, *tensors]
        self._are_alike = alike(tensors)
        packed = [module for module in modules if isinstance(module, PackedModule)]
        self._watched = [module._parameters[name] for module in packed for name in module._seen]
        self._whole = [module.row_bits for module in packed]
        self.renew()

    def renew(self) -> None:
        """Takes things as they are for untouched."""
        self._state, self._pointers = self._read(), self._addresses()
        self._entries = list(chain.from_iterable(self._lists))

    def is_of(self, containers: list[Any]) -> bool:
        """Whether these are what is looked at: others may hold the same, as the list of active adapters does."""
        named = [own[kind] for own in map(vars, self._modules) for kind in _NAMED]
        return all(map(is_, (*named, *containers), (*self._named, *self._containers)))

    def is_same(self) -> bool:
        """Whether everything is untouched."""
        # Objects of which none waits for another come from memory side by side, and a copy counts their references.
        self._touched_first.copy()
        entries = list(chain.from_iterable(self._lists))
        return (
            not any(self._empty)
            and len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and list(map(type, self._modules)) == self._classes
            and all(map(is_, map(vars, self._modules), self._every))
            and self._read() == self._state
            and self._are_alike(*self._tensors)
            and self._addresses() == self._pointers
        )

    def _read(self) -> list[int]:
        return [
            *versions(self._dicts),
            *(tensor._version for tensor in self._watched),
            *(bits.untyped_storage()._cdata for bits in self._whole),
        ]

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]


def _entries(held: Any) -> Iterable[Any]:
    return (*held.keys(), *held.values()) if isinstance(held, dict) else held


def _has_memory(value: Any) -> bool:
    return type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided


def _is_of_module_alone(forward: Any) -> bool:
    """By a function of the module alone, as Liger does, and by none that does more around what was there."""
    function = getattr(forward, "__func__", forward)
    code = getattr(function, "__code__", None)
    if code is None or "<locals>" in getattr(function, "__qualname__", "<locals>"):
        return False
    return set(code.co_freevars) <= {"__class__"}  # a wrapper may have the name of what it wraps
