"""Packed modules put into a Transformers model and taken out again, with what single architectures need for it."""

import functools
import types

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoints.packed import PackedFiles
from ..checkpoints.targets import Target, embedding_scale, replace_module
from ..nn.embedding import LowRAEmbedding
from ..nn.experts import LowRAExperts
from ..nn.linear import LowRALinear, PackedModule
from ..weights.packed import TENSOR_NAMES


def make_dense(model: PreTrainedModel, targets: dict[str, Target], dtype: torch.dtype) -> None:
    """Puts dequantised layers, of the kinds the model's class has, in the place of the packed ones."""
    modules = dict(model.named_modules())
    for target in targets.values():
        module = modules.get(target.name)  # None where fused experts are dense parameters again
        if isinstance(module, LowRAExperts):
            weight = module.dequantize(dtype).view(target.experts, -1, target.in_features)
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
    for experts in _experts_modules(model, targets):
        experts.config._experts_implementation = experts.__dict__.pop("_implementation_when_dense")
    for module in model.modules():
        if _casts_to_weight_dtype(module):
            module.__dict__.pop("forward", None)


def make_embedding_dense(model: nn.Module, target: Target, weight: torch.Tensor) -> None:
    """Puts dense modules that share a weight [V, K] in the place of packed embeddings and what is tied to them."""
    weight = nn.Parameter(weight, requires_grad=False)
    for name in (target.name, *target.tied):
        module = model.get_submodule(name)
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
    sizes = (target.in_features, target.out_features, group_size, packed)
    modules: list[PackedModule] = []
    for name in (target.name, *target.tied):
        if target.experts is not None:
            module = LowRAExperts(target.experts, *sizes, model.get_parameter(name).dtype)
        else:
            module = _packed_layer(model.get_submodule(name), *sizes)
        replace_module(model, name, module)
        modules.append(module)
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


def _packed_layer(dense: nn.Linear | Conv1D | nn.Embedding, *sizes) -> PackedModule:
    if not isinstance(dense, nn.Embedding):
        return LowRALinear(*sizes, None if dense.bias is None else dense.bias.detach(), dense.weight.dtype)
    rounded = hasattr(dense, "scalar_embed_scale")
    packed = LowRAEmbedding(*sizes, dense.weight.dtype, dense.padding_idx, embedding_scale(dense), rounded)
    packed.dense_form.append(dense)
    return packed


def declare_ties(model: PreTrainedModel, targets: dict[str, Target]) -> None:
    """Tells Transformers that tied modules share all packed tensors, for loading and saving."""
    ties = {
        f"{name}.{leaf}": f"{target.name}.{leaf}"
        for target in targets.values()
        for name in target.tied
        for leaf in TENSOR_NAMES
        if model.get_submodule(target.name)._parameters[leaf] is not None
    }
    if ties:
        model._adjust_bias = lambda head, table: None  # would pad a tied head's bias to the bytes of its weight
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **ties}
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **ties}


def forget_ties(model: PreTrainedModel) -> None:
    """Takes back what `declare_ties` and `refuse_resizing` did, for a model that is dense again."""
    for name in ("_tied_weights_keys", "_adjust_bias", "resize_token_embeddings"):
        model.__dict__.pop(name, None)
    packed = tuple(f".{leaf}" for leaf in TENSOR_NAMES if leaf != "weight")
    ties = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {tied: source for tied, source in ties if not tied.endswith(packed)}


def refuse_resizing(model: PreTrainedModel) -> None:
    """Makes `resize_token_embeddings` say why it cannot change a packed table."""
    table = model.get_input_embeddings()

    @functools.wraps(model.resize_token_embeddings)
    def resize_token_embeddings(new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **kwargs):
        rows = table.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows != table.num_embeddings:
            raise ValueError(
                f"The packed embeddings have {table.num_embeddings} rows and cannot be resized to {rows}: resize the "
                "dense model and quantise that, or leave quantize_embeddings out."
            )
        return table

    model.resize_token_embeddings = resize_token_embeddings


def share_tied(model: PreTrainedModel, target: Target) -> None:
    """Lets the modules tied to a packed one hold its parameters."""
    source = model.get_submodule(target.name)
    for name in target.tied:
        module = model.get_submodule(name)
        module._parameters.update(source.packed_tensors())
        module.prepare()


def use_experts_one_by_one(model: PreTrainedModel, targets: dict[str, Target]) -> None:
    """The other implementations (grouped_mm and the like) need the dense weights of all experts at once."""
    modules = _experts_modules(model, targets)
    for experts in modules:
        experts._implementation_when_dense = experts.config._experts_implementation
    for experts in modules:  # only now: they share one config
        experts.config._experts_implementation = "eager"
        experts._is_hf_initialized = True  # its own initialisation writes into parameters that are not there


def _experts_modules(model: PreTrainedModel, targets: dict[str, Target]) -> list[nn.Module]:
    names = {target.name.rpartition(".")[0] for target in targets.values() if target.experts is not None}
    return [model.get_submodule(name) for name in sorted(names)]


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
