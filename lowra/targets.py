"""Which layers of a model are quantised, and putting `LowRALinear` in their place."""

import dataclasses
import logging

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .linear import LowRALinear

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Target:
    """A layer to quantise.

    Attributes:
        name: of the module; of the parameter for fused experts, which a module of that name replaces.
        out_features, in_features: N and K; for fused experts N counts the rows of all of them.
        transposed: the dense weight is stored [K, N] (GPT-2's Conv1D).
        experts: E of a fused weight [E, N / E, K], or None.
        adapted: whether an adapter goes with it: not with fused experts, which PEFT does not know, and not with the
            head, because PEFT would save the whole head with every adapter.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool = False
    experts: int | None = None
    adapted: bool = True

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored dense weight as [N, K]."""
        if self.experts is not None:
            return weight.reshape(self.out_features, self.in_features)
        return weight.T if self.transposed else weight


def find_targets(model: nn.Module, skip: list[str] | None, head: bool = False) -> dict[str, Target]:
    """Every linear layer of the transformer blocks by the name of its weight, in model order.

    A block is a member of an `nn.ModuleList`, so embeddings, heads and poolers stay dense; so do layers whose name
    contains an entry of `skip`. Fused experts [E, N, K] are quantised where the model's own forward takes them one by
    one; other tensors of three dimensions stay dense, with a warning that gives their size.

    Raises:
        ValueError: nothing is left to quantise, or `head` asks for a head that cannot be.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    targets, dense = {}, {}
    for name, module in model.named_modules():
        skipped = any(entry in name for entry in skip or [])
        if not any(name.startswith(block) for block in blocks) or module is output or skipped:
            continue
        if isinstance(module, Conv1D):
            targets[f"{name}.weight"] = Target(name, module.weight.shape[1], module.weight.shape[0], transposed=True)
        elif isinstance(module, nn.Linear) and not isinstance(module, LowRALinear):
            targets[f"{name}.weight"] = Target(name, module.out_features, module.in_features)
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and _taken_one_by_one(module):
                    count, rows, columns = parameter.shape
                    targets[f"{name}.{leaf}"] = Target(
                        f"{name}.{leaf}", count * rows, columns, experts=count, adapted=False
                    )
                elif parameter.dim() == 3:
                    dense[f"{name}.{leaf}"] = parameter.numel()
    if dense:
        logger.warning(
            "lowra: %d fused expert weights (%.1f million parameters, first: %s) stay dense: %s",
            len(dense),
            sum(dense.values()) / 1e6,
            next(iter(dense)),
            "this model multiplies them all at once or transposed.",
        )
    if head:
        targets.update(_head_target(model, output))
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantise in its blocks"
            + (f" outside modules_to_not_convert={skip}." if skip else ".")
        )
    return targets


def _head_target(model: nn.Module, head: nn.Module | None) -> dict[str, Target]:
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear output head to quantise: leave quantize_head out.")
    if f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}):
        raise ValueError(
            f"{name} of this {type(model).__name__} is tied to the embeddings, which stay dense: leave "
            "quantize_head out."
        )
    return {f"{name}.weight": Target(name, head.out_features, head.in_features, adapted=False)}


def _taken_one_by_one(module: nn.Module) -> bool:
    """Whether the module is of Transformers' common form, whose eager forward is `F.linear(x, weight[expert])`."""
    return hasattr(module, "_apply_gate") and getattr(module, "is_transposed", True) is False


def replace_module(model: nn.Module, name: str, new: nn.Module | nn.Parameter) -> None:
    """Puts `new` where the module or parameter `name` stands."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if child in parent._parameters and isinstance(new, nn.Module):
        delattr(parent, child)
    setattr(parent, child, new)
