"""Whether nobody has touched a model since a decoder was read from it, at a glance.

What decides what a decoder reads lies in attributes of some thousand modules. Reading all of it again takes 9 to 25 ms
of a host before the first token of each request; whether a dictionary was changed is told by one number.
"""

import sys
import weakref
from collections.abc import Collection
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..nn.authors import called_by
from ..nn.hooks import FORWARD_HOOKS, REPLACING
from ..nn.linear import LowRALinear
from ..nn.packed_module import PackedModule
from ..nn.told_changes import alike, are_changes_told, versions
from ..nn.walk import modules_of

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
_OF_TORCH = frozenset(vars(nn.Module()))  # what every module has
_SEEN = (str, bytes, tuple, frozenset, list, set, dict)  # containers of which a change is noticed, or that have none


class Untouched:
    """A model as it is, but for the values of its tensors and for hooks.

    Holds neither the model nor what adapters have: those that are deleted go.
    """

    def __init__(self, model: PreTrainedModel, below: list[nn.Module]):
        """
        Args:
            below: `modules_of` the model but the model itself.

        Raises:
            ValueError: codes of a packed layer were written into.
        """
        self._below = list(map(weakref.ref, below))
        self._classes = list(map(type, below))
        self._kind, self._config = type(model), model.config
        every = list(map(vars, below))
        configs = [model.config, *(own["config"] for own in every if isinstance(own.get("config"), PreTrainedConfig))]
        self._configs = list({id(config): config for config in configs}.values())
        # By their places among these, of whom none comes or goes without a change of a dictionary.
        self._packed = [place for place, module in enumerate(below) if isinstance(module, PackedModule)]
        linears = [place for place in self._packed if isinstance(below[place], LowRALinear)]
        self._with_tables = [place for place in linears if vars(below[place]).get("adapter_tables") is not None]
        adapted = [place for place, kind in enumerate(self._classes) if _has_adapters(kind)]
        held = [(place, *each) for place in adapted for each in vars(below[place]).items() if each[0] not in _OF_TORCH]
        self._lists = [(place, name) for place, name, value in held if isinstance(value, list | set)]
        self._dicts = [(place, name) for place, name, value in held if isinstance(value, dict)]
        kinds: dict[Any, None] = dict.fromkeys([self._kind, *self._classes])
        self._kinds: list[Any] = [*kinds, *dict.fromkeys([*map(type, self._configs), type(ALL_ATTENTION_FUNCTIONS)])]
        self._bases = list(dict.fromkeys(base for kind in self._kinds for base in kind.__mro__))
        functions = {id(part): part for kind in kinds for part in called_by(kind.forward)}.values()
        self._functions = [function for function in functions if hasattr(function, "__code__")]
        # the names by which architectures call functions
        homes = dict.fromkeys(base.__module__ for base in self._bases)
        self._homes = [vars(sys.modules[home]) for home in homes if home.startswith("transformers.models.")]
        self._homes.append(vars(nn.functional))
        self._hooks = [own[kind] for own in every for kind in FORWARD_HOOKS]
        self._replaced = [place for place, own in enumerate(every) if not own.keys().isdisjoint(REPLACING)]
        self._versions = self._versions_of(model, every)
        self._with_parameters = [place for place, own in enumerate(every) if own["_parameters"]]
        tensors = self._tensors_of(model, every)
        self._are_alike, self._addresses = alike(tensors), list(map(torch.Tensor.data_ptr, tensors))
        self._held = self._holding(every)  # kept, so that an identity stays one's own
        self._was = self._read(model, below, every)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Untouched | None":
        """None where changes are not told of, or not of all of its parameters.

        Raises:
            ValueError: codes of a packed layer were written into.
        """
        modules = modules_of(model)
        tensors = chain.from_iterable(module._parameters.values() for module in modules)
        plain = all(tensor is None or type(tensor) in _PLAIN_TENSORS for tensor in tensors)
        held = (value for module in modules if _has_adapters(type(module)) for value in vars(module).values())
        seen = all(isinstance(value, _SEEN) or not isinstance(value, Collection | torch.Tensor) for value in held)
        return cls(model, modules[1:]) if plain and seen and are_changes_told() else None

    def is_same(self, model: PreTrainedModel) -> bool:
        """Whether everything is untouched.

        Raises:
            ValueError: codes of a packed layer were written into, or tables of several adapters are to count at once.
        """
        below: list[Any] = [reference() for reference in self._below]
        if type(model) is not self._kind or model.config is not self._config or any(map(is_, below, repeat(None))):
            return False
        every: list[dict[str, Any]] = [module.__dict__ for module in below]
        if list(map(type, below)) != self._classes or self._versions_of(model, every) != self._versions:
            return False
        tensors = self._tensors_of(model, every)
        return (
            self._are_alike(*tensors)
            and list(map(torch.Tensor.data_ptr, tensors)) == self._addresses
            and all(map(is_, self._holding(every), self._held))
            and self._read(model, below, every) == self._was
        )

    def awaited(self, model: PreTrainedModel) -> list[nn.Module]:
        """The model, and those of its modules, all untouched, that have hooks or another forward than their class."""
        hooked = {place // len(FORWARD_HOOKS) for place, hooks in enumerate(self._hooks) if hooks}
        found = [self._below[place]() for place in sorted(hooked.union(self._replaced))]
        return [model, *(module for module in found if module is not None)]

    def _versions_of(self, model: PreTrainedModel, every: list[dict[str, Any]]) -> list[int]:
        """Of attributes and containers; no two dictionaries ever have the same. every: attributes of modules."""
        dictionaries: list[Any] = [*map(vars, self._configs), *self._homes, model._modules, model._parameters, *every]
        dictionaries += chain.from_iterable(map(itemgetter("_modules", "_parameters", "_buffers"), every))
        held = (every[place].get(name) for place, name in self._dicts)
        dictionaries += [value if isinstance(value, dict) else {} for value in held]
        return versions(dictionaries)

    def _tensors_of(self, model: PreTrainedModel, every: list[dict[str, Any]]) -> list[torch.Tensor]:
        """All parameters; one that is tied as often as it is there."""
        held = (every[place]["_parameters"] for place in self._with_parameters)
        each = chain.from_iterable(own.values() for own in (model._parameters, *held))
        return [tensor for tensor in each if tensor is not None]

    def _holding(self, every: list[dict[str, Any]]) -> list[Any]:
        """What classes have for all modules, forwards and properties among it, and entries of lists."""
        lists = (every[place][name] for place, name in self._lists)
        return [*chain.from_iterable(vars(base).values() for base in self._bases), *chain.from_iterable(lists)]

    def _read(self, model: PreTrainedModel, below: list[Any], every: list[dict[str, Any]]) -> list[Any]:
        found: list[Any] = [len(every[place][name]) for place, name in self._lists]
        found += (below[place].row_layout() for place in self._packed)
        for place in self._with_tables:
            found += [table.data_ptr() for table in below[place].current_tables().values()]
        found += (kind.__mro__ for kind in self._kinds)
        found += (function.__code__ for function in self._functions)
        for config in self._configs:
            found += (type(config), *(tuple(value) for value in vars(config).values() if isinstance(value, list)))
        found += (len(vars(base)) for base in self._bases)
        owner: Any = self._config  # and what it names; of activations, classes and no modules
        activation = getattr(owner, "hidden_activation", None) or getattr(owner, "hidden_act", None)
        named = owner._attn_implementation
        found += (known.get(named, None) for known in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS))
        found.append(ACT2FN.get(activation))
        dropout = getattr(model, "attention_dropout", None)
        found += (model.training, dropout, model.get_decoder(), model.get_output_embeddings())
        return found


def _has_adapters(kind: type) -> bool:
    return issubclass(kind, BaseTunerLayer | AuxiliaryTrainingWrapper)
