"""Packed modules put into a Transformers model and taken out again."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoints.packed import PackedFiles
from ..checkpoints.targets import Target, embedding_scale, replace_module
from ..nn.embedding import LowRAEmbedding
from ..nn.experts import LowRAExperts
from ..nn.linear import LowRALinear
from ..nn.packed_module import PackedModule
from .model_patches import cast_to_weight_dtype_again, declare_ties, forget_ties, keep_values, use_experts_as_before


def make_dense(model: PreTrainedModel, targets: dict[str, Target], dtype: torch.dtype) -> None:
    """Puts dequantised layers, of the kinds the model's class has, in the place of the packed ones."""
    modules = dict(model.named_modules())
    for target in targets.values():
        module = modules.get(target.name)  # None where fused experts are dense parameters again
        if isinstance(module, LowRAExperts):
            weight = module.dequantize(dtype).view(module.experts, -1, target.in_features)
            replace_module(model, target.name, nn.Parameter(weight, requires_grad=False))
            continue
        if isinstance(module, LowRAEmbedding):
            make_embedding_dense(model, target, module.dequantize(dtype))
            continue
        if isinstance(module, LowRALinear):
            module = dense_linear(module, dtype)
            replace_module(model, target.name, module)
        if target.transposed and isinstance(module, nn.Linear):
            replace_module(model, target.name, _conv1d(module))
    forget_ties(model)
    use_experts_as_before(model, targets)
    cast_to_weight_dtype_again(model)


def make_embedding_dense(model: nn.Module, target: Target, weight: torch.Tensor) -> None:
    """Puts dense modules that share a weight [V, K] in the place of packed embeddings and what is tied to them."""
    weight = nn.Parameter(weight, requires_grad=False)
    for name in (target.name, *target.tied):
        module = model.get_submodule(name)
        dense: Any
        if isinstance(module, LowRAEmbedding):
            (dense,) = module.dense_form
            if module.round_scale:  # its own buffer is still on "meta"
                dense.embed_scale = torch.tensor(module.scale, device=weight.device)
        elif isinstance(module, LowRALinear):
            dense = dense_linear(module, weight.dtype, weight)
        else:
            continue  # a head that an adapter was merged into
        dense.weight = weight
        replace_module(model, name, dense)


def dense_linear(module: LowRALinear, dtype: torch.dtype, weight: torch.Tensor | None = None) -> nn.Linear:
    """A plain linear layer with the dequantised weight, or with a weight [N, K] that is given."""
    with torch.device("meta"):
        dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    weight = module.dequantize(dtype) if weight is None else weight.to(dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return dense


def _conv1d(linear: nn.Linear) -> Conv1D:
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
    conv.bias = linear.bias
    return conv


def put_packed(model: PreTrainedModel, target: Target, group_size: int, packed: dict) -> list[PackedModule]:
    """Puts packed modules in the place of a dense layer and those tied to it, or of the parameter of fused experts."""
    sizes: tuple[int, int, int, dict] = (target.in_features, target.out_features, group_size, packed)
    modules: list[PackedModule] = []
    for name in (target.name, *target.tied):
        module: PackedModule
        if target.experts is not None:
            module = LowRAExperts(target.experts, *sizes, model.get_parameter(name).dtype)
        else:
            module = _packed_layer(model.get_submodule(name), *sizes)
        replace_module(model, name, module)
        modules.append(module)
    for module in modules:
        module.tied = tuple(other for other in modules if other is not module)
    keep_values(modules)  # initialisation that asks for a matrix (RWKV's, xLSTM's) would fail
    return modules


def put_stored(
    model: PreTrainedModel, targets: dict[str, Target], group_size: int, files: PackedFiles
) -> list[PackedModule]:
    """Puts packed modules on "meta", with the types and shapes in the files, in the place of all targets."""
    modules: list[PackedModule] = []
    for target in targets.values():
        stored = {leaf: place.placeholder() for leaf, place in files.of(target.name).items()}
        modules += put_packed(model, target, group_size, stored)
    declare_ties(model, targets)
    return modules


def _packed_layer(dense: Any, in_features: int, out_features: int, group_size: int, packed: dict) -> PackedModule:
    """dense: a linear layer, GPT-2's Conv1D or embeddings."""
    sizes = in_features, out_features, group_size, packed
    if not isinstance(dense, nn.Embedding):
        bias = None if dense.bias is None else dense.bias.detach()
        return LowRALinear(*sizes, bias, dense.weight.dtype)
    rounded = hasattr(dense, "scalar_embed_scale")
    scale: Any = embedding_scale(dense)
    options = {"padding_idx": dense.padding_idx, "scale": scale, "round_scale": rounded}
    table = LowRAEmbedding(*sizes, dense.weight.dtype, **options)
    table.dense_form.append(dense)
    return table


def share_tied(model: PreTrainedModel, target: Target) -> None:
    """Lets the modules tied to a packed one hold its parameters."""
    source: Any = model.get_submodule(target.name)
    for name in target.tied:
        module: Any = model.get_submodule(name)
        module.share(source)
