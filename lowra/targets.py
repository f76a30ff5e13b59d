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
        name: of the module.
        out_features, in_features: N and K.
        transposed: the dense weight is stored [K, N] (GPT-2's Conv1D).
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored dense weight as [N, K]."""
        return weight.T if self.transposed else weight


def find_targets(model: nn.Module, skip: list[str] | None) -> dict[str, Target]:
    """Every linear layer of the transformer blocks by the name of its weight, in model order.

    A block is a member of an `nn.ModuleList`, so embeddings, heads and poolers stay dense; so do layers whose name
    contains an entry of `skip`. Fused expert tensors (three dimensions) stay dense, with a warning that gives their size.

    Raises:
        ValueError: nothing is left to quantise.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    targets, experts = {}, {}
    for name, module in model.named_modules():
        skipped = any(entry in name for entry in skip or [])
        if not any(name.startswith(block) for block in blocks) or module is head or skipped:
            continue
        if isinstance(module, Conv1D):
            targets[f"{name}.weight"] = Target(name, module.weight.shape[1], module.weight.shape[0], True)
        elif isinstance(module, nn.Linear) and not isinstance(module, LowRALinear):
            targets[f"{name}.weight"] = Target(name, module.out_features, module.in_features, False)
        else:
            fused = [p for p in module.parameters(recurse=False) if p.dim() == 3]
            if fused:
                experts[name] = sum(p.numel() for p in fused)
    if experts:
        logger.warning(
            "lowra: %d modules with fused expert weights (%.1f million parameters, first: %s) stay dense; "
            "only plain linear layers are quantised.",
            len(experts),
            sum(experts.values()) / 1e6,
            next(iter(experts)),
        )
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantise in its blocks"
            + (f" outside modules_to_not_convert={skip}." if skip else ".")
        )
    return targets


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where the module `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
