"""Packed modules put into a Transformers model and taken out again, with what single architectures need for it."""

import types

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitsandbytes.backends.lowra import layout

from ..experts import LowRAExperts
from ..linear import LowRALinear, PackedModule
from ..targets import Target, replace_module


def make_dense(model: PreTrainedModel, targets: dict[str, Target], dtype: torch.dtype) -> None:
    """Puts dequantised layers, of the kinds the model's class has, in the place of the packed ones."""
    modules = dict(model.named_modules())
    for target in targets.values():
        module = modules.get(target.name)  # None where fused experts are dense parameters again
        if isinstance(module, LowRAExperts):
            weight = module.dequantize(dtype).view(target.experts, -1, target.in_features)
            replace_module(model, target.name, nn.Parameter(weight, requires_grad=False))
            continue
        if isinstance(module, LowRALinear):
            module = dense_linear(module, dtype)
            replace_module(model, target.name, module)
        if target.transposed and isinstance(module, nn.Linear):
            replace_module(model, target.name, _conv1d(module))
    for module in model.modules():
        if _casts_to_weight_dtype(module):
            module.__dict__.pop("forward", None)


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


def packed_module(model: PreTrainedModel, target: Target, group_size: int, packed: dict) -> PackedModule:
    """The module that takes the place of a dense layer, or of the parameter of fused experts."""
    sizes = (target.in_features, target.out_features, group_size, packed)
    if target.experts is not None:
        return LowRAExperts(target.experts, *sizes, model.get_parameter(target.name).dtype)
    dense = model.get_submodule(target.name)
    return LowRALinear(*sizes, None if dense.bias is None else dense.bias.detach(), dense.weight.dtype)


def count_rows(name: str, module: PackedModule, row_bits: torch.Tensor) -> None:
    """`module.count_rows`, whose errors say which layer."""
    try:
        module.count_rows(row_bits)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def check_sizes(name: str, module: PackedModule) -> None:
    """Raises ValueError where the loaded tensors of a layer do not fit one another."""
    if module.row_counts is None:
        count_rows(name, module, module.row_bits.cpu())
    rows = module.out_features, *module.row_counts
    groups = layout.group_count(module.in_features, module.group_size)
    sizes = {
        "weight": layout.codes_size(*rows, module.in_features),
        "scales": module.out_features * groups,
        "levels": layout.levels_size(*rows),
    }
    if module.scale_steps is not None:
        sizes["scale_steps"] = layout.scale_step_count(module.out_features, module.in_features, module.group_size)
    for tensor, size in sizes.items():
        if getattr(module, tensor).numel() != size:
            raise ValueError(
                f"{name}.{tensor} has {getattr(module, tensor).numel()} elements where {size} belong to its row_bits "
                f"and groups of {module.group_size}: the packed checkpoint is damaged or its config.json was changed."
            )


def use_experts_one_by_one(model: PreTrainedModel, targets: dict[str, Target]) -> None:
    """The other implementations (grouped_mm and the like) need the dense weights of all experts at once."""
    for target in targets.values():
        if target.experts is not None:
            experts = model.get_submodule(target.name.rpartition(".")[0])
            experts.config._experts_implementation = "eager"
            experts._is_hf_initialized = True  # its own initialisation writes into parameters that are not there


def mend_casts_to_weight_dtype(model: PreTrainedModel) -> None:
    """T5 and its kin cast the input of `wo` to the dtype of `wo.weight`, which would cut activations down to bytes."""
    for module in model.modules():
        if _casts_to_weight_dtype(module) and isinstance(module.wo, LowRALinear):
            module.forward = types.MethodType(_feed_forward_without_cast, module)


def _casts_to_weight_dtype(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("DenseActDense", "DenseGatedActDense")) and hasattr(module, "wo")


def _feed_forward_without_cast(self, hidden_states: torch.Tensor) -> torch.Tensor:
    """`T5DenseActDense.forward` and `T5DenseGatedActDense.forward` in the dtype of the input."""
    if hasattr(self, "wi_0"):
        hidden_states = self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
    else:
        hidden_states = self.act(self.wi(hidden_states))
    return self.wo(self.dropout(hidden_states))
