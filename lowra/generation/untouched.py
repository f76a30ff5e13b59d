"""Whether nobody has touched a model since a decoder was read from it, at a glance.

What decides what a decoder reads lies in attributes of some thousand modules. Reading all of it again takes 15 to 30 ms
of a host before the first token of each request; whether a dictionary was changed is told by one number.
"""

from collections import OrderedDict
from itertools import chain
from operator import is_
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..nn.hooks import FORWARD_HOOKS
from ..nn.linear import LowRALinear
from ..nn.packed_module import PackedModule
from ..nn.told_changes import alike, are_changes_told, versions

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
_OF_TORCH = frozenset(vars(nn.Module()))  # what every module has


def modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()` in no particular order, without a generator for each level: a fifth of its time."""
    found: dict[nn.Module, None] = {model: None}
    waiting = [model]
    while waiting:
        for module in waiting.pop()._modules.values():
            if module is not None and module not in found:
                found[module] = None
                waiting.append(module)
    return list(found)


class Untouched:
    """A model as it is, but for the values of its tensors and for hooks. Does not hold the model itself."""

    def __init__(self, model: PreTrainedModel):
        """See `of`."""
        every = modules_of(model)
        self._kind, self._config = type(model), model.config
        self._modules = modules = every[1:]  # the first is the model
        self._classes, self._attributes = list(map(type, modules)), list(map(vars, modules))
        self._of_model = [model._modules, model._parameters]
        self._kinds = list(dict.fromkeys([type(model), type(model.config), *self._classes]))
        self._bases = list(dict.fromkeys(base for kind in self._kinds for base in kind.__mro__))
        self._hooks = [own[kind] for own in self._attributes for kind in FORWARD_HOOKS]
        self._replaced = [module for module in modules if "forward" in vars(module)]
        self._packed = [module for module in modules if isinstance(module, PackedModule)]
        linears = [module for module in modules if isinstance(module, LowRALinear)]
        self._with_tables = [linear for linear in linears if linear.adapter_tables is not None]
        adapted = [own for own, kind in zip(self._attributes, self._classes, strict=True) if _has_adapters(kind)]
        held: list[Any] = [value for own in adapted for name, value in own.items() if name not in _OF_TORCH]
        self._lists = [value for value in held if isinstance(value, list | set)]
        self._dicts: list[Any] = [
            *self._attributes,
            vars(self._config),
            *(value for value in held if isinstance(value, dict)),
        ]
        self._dicts += [*self._of_model, *(own["_modules"] for own in self._attributes)]
        self._dicts += [own["_parameters"] for own in self._attributes]
        tensors = [tensor for module in every for tensor in module._parameters.values() if tensor is not None]
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._are_alike = alike(self._tensors)
        self._held = self._holding()  # kept, so that an identity stays one's own
        self._was = self._read(model)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Untouched | None":
        """None where changes are not told of, or not of all of its parameters.

        Raises:
            ValueError: codes of a packed layer were written into.
        """
        tensors = (tensor for module in modules_of(model) for tensor in module._parameters.values())
        plain = all(tensor is None or type(tensor) in _PLAIN_TENSORS for tensor in tensors)
        return cls(model) if plain and are_changes_told() else None

    def is_same(self, model: PreTrainedModel) -> bool:
        """Whether everything is untouched.

        Raises:
            ValueError: codes of a packed layer were written into, or tables of several adapters are to count at once.
        """
        return (
            type(model) is self._kind
            and model.config is self._config
            and all(map(is_, (model._modules, model._parameters), self._of_model))
            and list(map(type, self._modules)) == self._classes
            and all(map(is_, map(vars, self._modules), self._attributes))
            and self._are_alike(*self._tensors)
            and self._read(model) == self._was
            and all(map(is_, self._holding(), self._held))
        )

    def awaited(self, model: PreTrainedModel) -> list[nn.Module]:
        """The model, and those of its modules that have hooks or another forward than their class."""
        hooks, kinds = self._hooks, len(FORWARD_HOOKS)
        found = {place // kinds for place, own in enumerate(hooks) if own}
        return [model, *self._replaced, *(self._modules[place] for place in sorted(found))]

    def _holding(self) -> list[Any]:
        """What classes have for all modules, forwards and properties among it, and entries of lists."""
        return [*chain.from_iterable(vars(base).values() for base in self._bases), *chain.from_iterable(self._lists)]

    def _read(self, model: PreTrainedModel) -> list[Any]:
        found: list[Any] = [*versions(self._dicts), *map(torch.Tensor.data_ptr, self._tensors)]
        found += map(len, self._lists)
        found += (module.row_layout() for module in self._packed)
        for linear in self._with_tables:
            found += [table.data_ptr() for table in linear.current_tables().values()]
        found += (kind.__mro__ for kind in self._kinds)
        found += (len(vars(base)) for base in self._bases)
        config: Any = self._config  # and what it names
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        found += (ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, None), OrderedDict.get(ACT2FN, activation))
        dropout = getattr(model, "attention_dropout", None)
        found += (model.training, dropout, model.get_decoder(), model.get_output_embeddings())
        return found


def _has_adapters(kind: type) -> bool:
    return issubclass(kind, BaseTunerLayer | AuxiliaryTrainingWrapper)
