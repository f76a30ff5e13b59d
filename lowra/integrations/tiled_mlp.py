"""`tile_mlps`: MLPs, and the norms beside them, work on some tokens at a time (`lowra.nn.tiled`).

Norms, because what one holds in float32 while it is differentiated, seven times the hidden states' number in all, would
else be the most that lives at a time.
"""

import inspect
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..nn.tiled import tiled
from .checkpointed_layers import checkpointed_layers

# A tile must be worth making its weights dense for: at 4,096 tokens that is an eighth of its product on an H100.
TILE = 4096
_NAMES = ("mlp", "feed_forward", "ffn")
_LINEAR = (nn.Linear, Conv1D, BaseTunerLayer)
_OF_NO_TOKEN = (nn.Dropout, nn.Identity, nn.ModuleList)


def tile_mlps(model: nn.Module) -> None:
    """Has the MLPs and norms of a model work on 4,096 tokens at a time, in training and without gradients.

    What an MLP holds for backward, four times its width for each token, and a norm's float32 are then held for one tile
    and computed again in backward. With gradient checkpointing that takes no more products than without. Losses are the
    same; gradients of adapters are sums of another order. Holds until the model is loaded anew.

    Args:
        model: a model of Transformers, or a PeftModel on one; its adapters may come later.

    Raises:
        ValueError: its blocks have no MLP that is known to work token by token.
    """
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    found = mlps_to_tile(bare)
    if not found:
        raise ValueError(
            f"{type(bare).__name__} has no MLP that is known to work token by token (a mixture of experts is none), so "
            "there is nothing to tile: train it without."
        )
    for module in (*found, *_norms(bare)):
        if not isinstance(vars(module).get("forward"), _Tiling):
            vars(module)["forward"] = _Tiling(module)


def mlps_to_tile(model: nn.Module) -> list[nn.Module]:
    """The MLPs of a model that are known to work token by token."""
    return [mlp for layer in checkpointed_layers(model) for mlp in _mlps(layer)]


def _norms(model: nn.Module) -> list[nn.Module]:
    """The norms of the blocks, over the hidden states, and that behind the last."""
    layers = checkpointed_layers(model)
    stacks = [owner for owner in model.modules() if any(layer in layers for layer in _listed(owner))]
    return [child for owner in (*layers, *stacks) for child in owner.children() if _is_norm(child)]


def _listed(owner: nn.Module) -> list[nn.Module]:
    return [module for child in owner.children() if isinstance(child, nn.ModuleList) for module in child]


def _is_norm(module: nn.Module) -> bool:
    is_over_last = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    return is_over_last and _reads_hidden_states_alone(module)


def _mlps(layer: nn.Module) -> list[nn.Module]:
    return [child for name, child in layer.named_children() if name in _NAMES and _is_plain(child)]


def _is_plain(mlp: nn.Module) -> bool:
    """Whether an MLP is of linear layers and activations alone, and reads nothing but the hidden states."""
    if not _reads_hidden_states_alone(mlp):
        return False
    linear = [module for module in mlp.modules() if isinstance(module, _LINEAR)]
    within = {id(part) for module in linear for part in module.modules()}
    others = [module for module in mlp.modules() if module is not mlp and id(module) not in within]
    return (
        len(linear) >= 2
        and not any(True for _ in mlp.parameters(recurse=False))
        and all(isinstance(module, _OF_NO_TOKEN) or not [*module.parameters()] for module in others)
    )


def _reads_hidden_states_alone(module: nn.Module) -> bool:
    needed = [
        parameter
        for parameter in inspect.signature(type(module).forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return len(needed) == 2  # with self


class _Tiling:
    """In the place of a module's `forward`, be that its class's or one that it was given, as Liger does."""

    def __init__(self, module: nn.Module):
        self._module, self._given = module, vars(module).get("forward")

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        size = max(1, TILE * hidden.shape[-2] // max(1, hidden[..., 0].numel())) if hidden.dim() > 1 else 0
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        whole = not 0 < size < hidden.shape[-2] or args or kwargs or torch.compiler.is_compiling()
        # the hook of a parameter would be called for each tile, and for their sum
        if whole or any(parameter._backward_hooks for parameter in trained):
            return self._usual(hidden, *args, **kwargs)
        return tiled(self._usual, hidden, size, trained)

    def _usual(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._given is not None:
            return self._given(hidden, *args, **kwargs)
        return type(self._module).forward(self._module, hidden, *args, **kwargs)
