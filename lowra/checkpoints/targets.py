"""Which layers of a model are quantised, and putting `LowRALinear` in their place."""

import dataclasses
import logging

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .casts import cast_layers

logger = logging.getLogger(__name__)

# Shorter sides belong to gates and the like: nothing to save, and an adapter of more than this rank has no place there.
_LEAST_SIDE = 8
_COMPUTES_AS_LINEAR = ("FalconLinear",)


@dataclasses.dataclass(frozen=True)
class Target:
    """A layer to quantise.

    Attributes:
        name: of the module; of the parameter for fused experts, which a module of that name replaces.
        out_features, in_features: N and K; for fused experts N counts the rows of all of them.
        transposed: the dense weight is stored [K, N] (GPT-2's Conv1D).
        experts: E of a fused weight [E, N / E, K], or None.
        adapted: whether an adapter goes with it: not with fused experts, which PEFT does not know, and not with head
            and embeddings, because PEFT would save them whole with every adapter.
        tied: further modules that use the same weight, such as a head tied to the embeddings.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool = False
    experts: int | None = None
    adapted: bool = True
    tied: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Weights in it."""
        return self.out_features * self.in_features

    @property
    def in_block(self) -> bool:
        """Whether it is part of a transformer block, not head or embeddings."""
        return self.adapted or self.experts is not None

    @property
    def weight_name(self) -> str:
        """Name of the dense weight."""
        return self.name if self.experts is not None else f"{self.name}.weight"

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored dense weight as [N, K]."""
        if self.experts is not None:
            return weight.reshape(self.out_features, self.in_features)
        return weight.T if self.transposed else weight


def find_targets(
    model: nn.Module, skip: list[str] | None, head: bool = False, embeddings: bool = False
) -> dict[str, Target]:
    """Every linear layer of the transformer blocks by the name of its weight, in model order.

    A block is a member of an `nn.ModuleList`, so embeddings, heads and poolers stay dense; so do layers whose name
    contains an entry of `skip`, tiny ones, subclasses of `nn.Linear` that compute something else (routers), and those
    whose input the model casts to the dtype of their weight. Fused experts [E, N, K] are quantised where the model's
    own forward takes them one by one; other tensors of three dimensions stay dense, with a warning that gives their
    size.

    Args:
        model: may be on "meta".
        skip: parts of names.
        head: take the output head too.
        embeddings: take the token embeddings too, and the head that is tied to them.

    Raises:
        ValueError: nothing is left to quantise, or head or embeddings are asked for that cannot be.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    targets, dense = {}, {}
    cast = cast_layers(model)
    for name, module in model.named_modules():
        skipped = name in cast or any(entry in name for entry in skip or [])
        if not any(name.startswith(block) for block in blocks) or module is output or skipped:
            continue
        if isinstance(module, Conv1D):
            targets[f"{name}.weight"] = Target(name, module.weight.shape[1], module.weight.shape[0], transposed=True)
        elif isinstance(module, nn.Linear):
            if _is_plain_linear(module):
                targets[f"{name}.weight"] = Target(name, module.out_features, module.in_features)
        elif not isinstance(module, _ConvNd):
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
    if embeddings:
        targets.update(_embedding_target(model))
    if head and _name_of(model, output) not in _places(targets):
        targets.update(_head_target(model, output))
    for name in cast & _places(targets):
        raise ValueError(
            f"{type(model).__name__} casts the input of {name} to the dtype of its weight, which of a packed one is a "
            "byte's: leave quantize_head and quantize_embeddings out."
        )
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantise in its blocks"
            + (f" outside modules_to_not_convert={skip}." if skip else ".")
        )
    return targets


def _places(targets: dict[str, Target]) -> set[str]:
    return {name for target in targets.values() for name in (target.name, *target.tied)}


def check_skips(model: nn.Module, skip: list[str] | None) -> None:
    """Raises ValueError where an entry of `skip` is part of no module's name: most likely it is misspelt."""
    names = [name for name, _ in model.named_modules()]
    for entry in skip or []:
        if not any(entry in name for name in names):
            raise ValueError(
                f"No module of this {type(model).__name__} has {entry!r} in its name, so nothing would stay dense for "
                f"it. Its last layer is {names[-1]}."
            )


def _embedding_target(model: nn.Module) -> dict[str, Target]:
    table = getattr(model, "get_input_embeddings", lambda: None)()
    name = _name_of(model, table)
    if name is None or not isinstance(table, nn.Embedding):
        raise ValueError(f"{type(model).__name__} has no token embeddings to quantise: leave quantize_embeddings out.")
    if type(table).forward is not nn.Embedding.forward and not _scale_alone(table):
        raise ValueError(
            f"{name} of this {type(model).__name__} is a {type(table).__name__}, which does more than look rows up: "
            "leave quantize_embeddings out."
        )
    ties = getattr(model, "all_tied_weights_keys", {})
    first = ties.get(f"{name}.weight", f"{name}.weight")
    tied = tuple(key.removesuffix(".weight") for key, source in ties.items() if source == first)
    target = Target(first.removesuffix(".weight"), table.num_embeddings, table.embedding_dim, adapted=False, tied=tied)
    return {first: target}


def _scale_alone(table: nn.Embedding) -> bool:
    """Whether embeddings with a `forward` of their own say by which number it multiplies, and have nothing else."""
    says = hasattr(table, "scalar_embed_scale") or hasattr(table, "embed_scale")
    return says and embedding_scale(table) is not None and len(list(table.parameters())) == 1


def embedding_scale(table: nn.Embedding) -> float | None:
    """What the model multiplies all embeddings with, where its class does that; None where there is no such number."""
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0))
    return float(scale) if isinstance(scale, (int, float)) else None


def _head_target(model: nn.Module, head: nn.Module | None) -> dict[str, Target]:
    name = _name_of(model, head)
    if name is None or not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear output head to quantise: leave quantize_head out.")
    if f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}):
        raise ValueError(
            f"{name} of this {type(model).__name__} is tied to the embeddings: quantise both with "
            "quantize_embeddings=True (--embeddings), or leave quantize_head out."
        )
    return {f"{name}.weight": Target(name, head.out_features, head.in_features, adapted=False)}


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _is_plain_linear(module: nn.Linear) -> bool:
    """Whether a layer computes x W^T + bias, with its own `forward`, and is worth packing."""
    kind = type(module)
    plain = kind.forward is nn.Linear.forward or kind.__name__ in _COMPUTES_AS_LINEAR
    used_by_itself = not isinstance(module, NonDynamicallyQuantizableLinear)  # nn.MultiheadAttention reads its weight
    return plain and used_by_itself and min(module.weight.shape) >= _LEAST_SIDE


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
