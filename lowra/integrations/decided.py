"""What the host decides by when a layer is called, compared with what it was when the layer was captured.

A graph has fixed all of it: where parameters lie, which adapters are active, what is trained, rates and functions of
modules, which codes a packed layer has.
"""

import functools
from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from ..nn.captured import NotCapturable
from ..nn.linear import LowRALinear
from ..nn.packed_module import PackedModule
from ..nn.row_layout import is_sharded
from ..nn.trained_tables import TrainedTablesLinear
from .layer_calls import PLAIN_VALUES

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL = [vars(nn.modules.module)[f"_global{name}"] for name in _HOOKS]
_CONTAINERS = (dict, list, tuple, set)
_NAMED = ("_modules", "_parameters", "_buffers")
_HOLDERS: dict[type, tuple[str, ...]] = {  # modules that compute nothing, and where they have what they hold
    nn.ModuleDict: ("_modules",),
    nn.ModuleList: ("_modules",),
    nn.ParameterDict: ("_parameters",),
    nn.ParameterList: ("_parameters",),
}
# What every module has for itself, and what a packed one makes of its tensors, which `row_layout` looks after.
_OF_TORCH = {*vars(nn.Module()), "_layout", "_seen", "_watched"} - {"training"}


# Whether dictionaries were changed, and tensors' kinds and sizes: what compiled code is guarded by, if PyTorch has it.
_GUARDS: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


class Decided:
    """Everything but tensors' values that decides what a layer computes, as it was when this was made.

    Raises:
        NotCapturable: see `is_same`.
        ValueError: the codes of a packed layer were written into.
    """

    def __init__(self, layer: nn.Module):
        self._modules = list(layer.modules())
        self._own = [vars(module) for module in self._modules]
        self._named = [own[kind] for own in self._own for kind in _NAMED]
        # Rates, factors, names of adapters, functions: also those of which nobody here has heard.
        places = [(own, name) for own in self._own for name in own if name not in _OF_TORCH]
        self._values = [(own, name) for own, name in places if not isinstance(own[name], _CONTAINERS)]
        self._containers = [own[name] for own, name in places if isinstance(own[name], _CONTAINERS)]
        self._packed = [module for module in self._modules if isinstance(module, PackedModule)]
        linears = [module for module in self._modules if isinstance(module, LowRALinear)]
        self._with_tables = [linear for linear in linears if linear.adapter_tables is not None]
        configs = [own["config"] for own in self._own if "config" in own]
        self._configs = list({id(config): config for config in configs}.values())
        self._tensors = list({id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}.values())
        if any(map(is_sharded, self._tensors)):
            raise NotCapturable("it has sharded parameters")
        # kept, because an identity is one only while its object lives
        self._kept = [own[name] for own, name in self._values] + [list(_entries(held)) for held in self._containers]
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
        if self._untouched is not None:
            self._untouched.renew()
        elif _are_changes_told():
            self._untouched = _Untouched(self._modules, self._containers, self._tensors)
        return True

    def _read(self) -> tuple[list[Any], list[Any]]:
        if any(own[kind] for own in self._own for kind in _HOOKS) or any(_HOOKS_OF_ALL):
            raise NotCapturable("it has hooks, which replaying would not call")
        forwards = [own["forward"] for own in self._own if "forward" in own]
        # By a function of the module alone, as Liger does, or by one that does more around it.
        if any("<locals>" in getattr(forward, "__qualname__", "<locals>") for forward in forwards):
            raise NotCapturable("the forward of a module in it has been replaced")
        # Identities stand for tensors and the like, whose comparison would not answer with yes or no.
        found: list[Any] = [id(value) for named in self._named for value in named.values()]
        found += [module.__class__ for module in self._modules]
        found += [len(own) for own in self._own]
        found += map(len, self._containers)
        values = [own.get(name) for own, name in self._values]
        for held in self._containers:
            if held:
                values += _entries(held)
        found += [value if type(value) in PLAIN_VALUES else id(value) for value in values]
        for tensor in self._tensors:
            found += (tensor.data_ptr(), tensor.requires_grad, tensor.dtype, tensor.shape, tensor.stride())
        found += [module.row_layout() for module in self._packed]
        return [*found, *forwards], self._read_often()

    def _read_often(self) -> list[Any]:
        """What modules of the layer do not have in themselves."""
        found: list[Any] = [getattr(config, "_attn_implementation", None) for config in self._configs]
        for linear in self._with_tables:
            found += [table.data_ptr() for table in linear.current_tables().values()]
            if isinstance(linear, TrainedTablesLinear):
                found += linear.adapter_tables.active()
        return found


@functools.cache
def _are_changes_told() -> bool:
    """Whether PyTorch has what `_Untouched` asks, and knows of attributes that are set as this Python sets them."""
    try:
        of_tensor = _GUARDS.TensorGuards(torch.zeros(2), dynamic_dims_sizes=[[2]], dynamic_dims_strides=[[1]])
        if not of_tensor.check(torch.zeros(2)) or of_tensor.check(torch.zeros(3)):
            return False
        _GUARDS.dict_version({})
    except (AttributeError, TypeError, RuntimeError):  # another PyTorch's
        return False
    module: Any = nn.Module()
    version = _GUARDS.dict_version(vars(module))
    for value in range(100):  # by then the interpreter has its own way for it
        module.value = value
        before, version = version, _GUARDS.dict_version(vars(module))
        if before == version:
            return False
    return True


class _Untouched:
    """Whether nobody has touched a layer, at a glance: that it is the same is known then, and has to be read otherwise.

    A layer of PEFT has some 80 modules, and a comparison of all that they hold waits for memory most of the time. Here
    a dictionary is looked at once, whatever is in it.

    Args:
        modules: of the layer.
        containers: that are attributes of these.
        tensors: theirs, each once.
    """

    def __init__(self, modules: list[nn.Module], containers: list[Any], tensors: list[torch.Tensor]):
        self._modules, self._classes = modules, list(map(type, modules))
        # Of what is never called itself, nothing counts but what it holds.
        called = [vars(module) for module in modules if type(module) not in _HOLDERS]
        held = [own[kind] for own in called for kind in _NAMED] + [
            vars(module)[kind] for module in modules for kind in _HOLDERS.get(type(module), ())
        ]
        changing = [*held, *(container for container in containers if not isinstance(container, tuple))]
        self._dicts = [*called, *(each for each in changing if each and isinstance(each, dict))]
        self._lists = [each for each in changing if each and not isinstance(each, dict)]
        # Most are, and then nothing but their length is looked at.
        self._empty = [*(own[kind] for own in called for kind in _HOOKS), *_HOOKS_OF_ALL]
        self._empty += [each for each in changing if not each]
        self._tensors = tensors
        self._touched_first = [*self._dicts, *self._empty, *modules, *tensors]
        sizes = [list(tensor.shape) for tensor in tensors]
        strides = [list(tensor.stride()) for tensor in tensors]
        guards = _GUARDS.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._are_alike = guards.check
        packed = [module for module in modules if isinstance(module, PackedModule)]
        self._watched = [module._parameters[name] for module in packed for name in module._seen]
        self._whole = [module.row_bits for module in packed]
        self.renew()

    def renew(self) -> None:
        """Takes things as they are for untouched."""
        self._state, self._pointers = self._read(), self._addresses()
        self._entries = list(chain.from_iterable(self._lists))

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
            and self._read() == self._state
            and self._are_alike(*self._tensors)
            and self._addresses() == self._pointers
        )

    def _read(self) -> list[int]:
        return [
            *map(_GUARDS.dict_version, self._dicts),
            *(tensor._version for tensor in self._watched),
            *(bits.untyped_storage()._cdata for bits in self._whole),
        ]

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]


def _entries(held: Any) -> Iterable[Any]:
    return (*held.keys(), *held.values()) if isinstance(held, dict) else held
