"""Patches of single models: attributes of a packed model, not of its class, so that dense models never meet them.

They are objects and functions of this module and no closures: `torch.save(model)` and `copy.deepcopy` keep them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.casts import is_mended
from ..checkpoints.targets import Target
from ..nn.linear import LowRALinear
from ..nn.packed_module import PackedModule
from ..weights.packed import TENSOR_NAMES
from .patching import Patch

if TYPE_CHECKING:
    from transformers import TrainingArguments

_MODEL = "transformers.modeling_utils:PreTrainedModel."
_CONFIG = "transformers.configuration_utils:PreTrainedConfig."

TIES = Patch(
    target=f"{_MODEL}get_expanded_tied_weights_keys",
    why="Tied modules share five packed tensors, and Transformers ties `weight` alone.",
    door="HfQuantizer could name the ties of a module, as it names what is serialised",
    since="none",
)
BIAS = Patch(
    target=f"{_MODEL}_adjust_bias",
    why="The bias of a tied head would be padded to the bytes of its packed weight.",
    door="HfQuantizer could say that the out_features of a tied module stay",
    since="none",
    rests_on=("output_embeddings", "input_embeddings"),
)
RESIZING = Patch(
    target=f"{_MODEL}resize_token_embeddings",
    why="A packed table cannot be resized, and Transformers would make a dense one of its bytes.",
    door="HfQuantizer could refuse it, as it refuses `model.to(dtype)` and saving",
    since="none",
    rests_on=("new_num_tokens", "pad_to_multiple_of"),
)
EXPERTS = Patch(
    target=f"{_CONFIG}_experts_implementation",
    why="grouped_mm and the like multiply with the dense weights of all experts at once.",
    door="set_experts_implementation('eager'), once get_experts_implementation tells what to go back to: before, the "
    "former leaves configs of submodels out and nothing tells what they were",
    since="transformers 5.16",
)
CAST = Patch(
    target="transformers.models.t5.modeling_t5:T5DenseActDense.forward",
    why="T5 and its kin cast the input of `wo` to the dtype of `wo.weight`, which would cut activations down to bytes.",
    door="a cast that asks whether `wo.weight` is floating; Transformers leaves out int8 alone",
    since="none",
    rests_on=("hidden_states",),
)
VALUES = Patch(
    target=f"{_MODEL}_initialize_missing_keys",
    why="Packed bytes that go past Transformers' loader would be initialised with random numbers.",
    door="HfQuantizer could name parameters that it loads itself; torch's hooks leave them out of the state dict here",
    since="none",
)
UNEXPECTED = Patch(
    target=f"{_MODEL}_keys_to_ignore_on_load_unexpected",
    why="Tensors that go past Transformers' loader would be reported as unexpected.",
    door="HfQuantizer.update_unexpected_keys, which Transformers 5.0 took away",
    since="none",
)
CONVERSIONS = Patch(
    target="transformers.core_model_loading:revert_weight_conversion",
    why="Saving would undo the original's renamings and split merged experts again, on packed bytes.",
    door="HfQuantizer.update_weight_conversions is asked when loading, not when saving",
    since="none",
    rests_on=("model", "state_dict"),
)
DEVICES = Patch(
    target="transformers.training_args:TrainingArguments.n_gpu",
    why="One process on several GPUs would copy the model between them at every step (DataParallel) and multiply the "
    "batch.",
    door="one visible GPU, which is chosen before the process starts",
    since="none",
)
CHECKPOINTING = Patch(
    target=f"{_MODEL}_set_gradient_checkpointing",
    why="Enabling gradient checkpointing, as every trainer does, would take captured layers back to launching kernels.",
    door="a checkpointing function that the model itself is given; Trainer and TRL enable it again with their own",
    since="none",
    rests_on=("enable", "gradient_checkpointing_func"),
    also={"transformers.modeling_layers:GradientCheckpointingLayer": ()},
)
MODEL_PATCHES = (TIES, BIAS, RESIZING, EXPERTS, CAST, VALUES, UNEXPECTED, CONVERSIONS, DEVICES, CHECKPOINTING)


def keep_values(members: Iterable[Any]) -> None:
    """Has Transformers leave parameters, or whole modules, as they are that it does not load."""
    VALUES.check()
    for member in members:
        member._is_hf_initialized = True


def ignore_unexpected(model: PreTrainedModel, patterns: set[str]) -> Callable[[], None]:
    """Has Transformers keep silent on keys of a checkpoint that a model lacks.

    Args:
        model: before it is loaded.
        patterns: regular expressions.

    Returns:
        what takes it back.
    """
    UNEXPECTED.check()
    former = model._keys_to_ignore_on_load_unexpected
    kind = set if isinstance(former, set) else list  # Transformers adds patterns of its own kind
    model._keys_to_ignore_on_load_unexpected = kind([*(former or ()), *sorted(patterns)])
    return functools.partial(setattr, model, "_keys_to_ignore_on_load_unexpected", former)


def forget_conversions(model: Any) -> None:
    """Has a packed model saved under its own names, as it is."""
    CONVERSIONS.check()
    model._weight_conversions = []


def declare_ties(model: PreTrainedModel, targets: dict[str, Target]) -> None:
    """Tells Transformers that tied modules share all packed tensors, for loading and saving."""
    sources = {name: target.name for target in targets.values() for name in target.tied}
    if sources:
        TIES.check()
        BIAS.check()
        vars(model)["_adjust_bias"] = _leave_bias
        _declare(model, sources)
        model.register_load_state_dict_post_hook(_TiesKept(sources))


def _declare(model: PreTrainedModel, sources: dict[str, str]) -> None:
    """Names the tensors that modules share now: scales of another storage may have been loaded."""
    shared = {
        f"{name}.{leaf}": f"{source}.{leaf}"
        for name, source in sources.items()
        for leaf in TENSOR_NAMES
        if _packed(model, source)._parameters[leaf] is not None
    }
    absent = {f"{name}.{leaf}" for name in sources for leaf in TENSOR_NAMES} - shared.keys()
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        former = getattr(model, attribute) or {}
        declared = {tied: source for tied, source in former.items() if tied not in absent}
        setattr(model, attribute, {**declared, **shared})


def _packed(model: nn.Module, name: str) -> Any:
    """The packed module of a name, below an adapter's layer if there is one; None where it is dense."""
    module = model.get_submodule(name)
    module = getattr(module, "base_layer", module)
    return module if isinstance(module, PackedModule) else None


class _TiesKept:
    """After `load_state_dict`: what is tied stays tied, which `assign=True` undoes, and is declared anew."""

    def __init__(self, sources: dict[str, str]):
        """Args: sources: names of tied modules, and of those that they are tied to."""
        self.sources = sources

    def __call__(self, model: PreTrainedModel, incompatible: Any) -> None:
        if not all(_packed(model, name) for names in self.sources.items() for name in names):
            return
        for name, source_name in self.sources.items():
            module, source = _packed(model, name), _packed(model, source_name)
            if module.weight is not source.weight:
                missing = any(key.endswith((f"{name}.weight", f"{name}.base_layer.weight")) for key in incompatible[0])
                same = not source.weight.is_meta and module.weight.data_ptr() == source.weight.data_ptr()
                if missing or same:
                    module.share(source)
        _declare(model, self.sources)


def _leave_bias(output_embeddings: nn.Module, input_embeddings: nn.Module | torch.Tensor) -> None:
    """In the place of `PreTrainedModel._adjust_bias`: a packed head keeps its bias."""


def forget_ties(model: PreTrainedModel) -> None:
    """Takes back what `declare_ties` and `refuse_resizing` did, for a model that is dense again."""
    for name in ("_tied_weights_keys", "_adjust_bias", "resize_token_embeddings"):
        model.__dict__.pop(name, None)
    hooks = model._load_state_dict_post_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, _TiesKept)]:
        del hooks[number]
    packed = tuple(f".{leaf}" for leaf in TENSOR_NAMES if leaf != "weight")
    ties = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {tied: source for tied, source in ties if not tied.endswith(packed)}


def refuse_resizing(model: PreTrainedModel) -> None:
    """Makes `resize_token_embeddings` say why it cannot change a packed table."""
    RESIZING.check()
    vars(model)["resize_token_embeddings"] = _FixedEmbeddings(model.get_input_embeddings())


class _FixedEmbeddings:
    """In the place of `PreTrainedModel.resize_token_embeddings`."""

    def __init__(self, table: Any):
        self.table = table

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        rows = self.table.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows != self.table.num_embeddings:
            raise ValueError(
                f"The packed embeddings have {self.table.num_embeddings} rows and cannot be resized to {rows}: resize "
                "the dense model and quantise that, or leave quantize_embeddings out."
            )
        return self.table


def use_experts_one_by_one(model: PreTrainedModel, targets: dict[str, Target]) -> None:
    """The other implementations (grouped_mm and the like) need the dense weights of all experts at once."""
    modules = _experts_modules(model, targets)
    if modules:
        EXPERTS.check()
    for experts in modules:
        experts._implementation_when_dense = experts.config._experts_implementation
    for experts in modules:  # only now: they share one config
        experts.config._experts_implementation = "eager"
        experts._is_hf_initialized = True  # its own initialisation writes into parameters that are not there


def use_experts_as_before(model: PreTrainedModel, targets: dict[str, Target]) -> None:
    """Takes back what `use_experts_one_by_one` did, for a model that is dense again."""
    for experts in _experts_modules(model, targets):
        experts.config._experts_implementation = experts.__dict__.pop("_implementation_when_dense")


def _experts_modules(model: PreTrainedModel, targets: dict[str, Target]) -> list[Any]:
    names = {target.name.rpartition(".")[0] for target in targets.values() if target.experts is not None}
    return [model.get_submodule(name) for name in sorted(names)]


def mend_casts_to_weight_dtype(model: PreTrainedModel) -> None:
    """T5 and its kin cast the input of `wo` to the dtype of `wo.weight`, which would cut activations down to bytes."""
    for module in model.modules():
        if is_mended(module) and isinstance(module.wo, LowRALinear):
            CAST.check()
            vars(module)["forward"] = _FeedForwardWithoutCast(module)


def cast_to_weight_dtype_again(model: PreTrainedModel) -> None:
    """Takes back what `mend_casts_to_weight_dtype` did, for a model that is dense again."""
    for module in model.modules():
        if is_mended(module):
            module.__dict__.pop("forward", None)


class _FeedForwardWithoutCast:
    """`T5DenseActDense.forward` and `T5DenseGatedActDense.forward` in the dtype of the input."""

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        module = self.module
        if hasattr(module, "wi_0"):
            hidden_states = module.act(module.wi_0(hidden_states)) * module.wi_1(hidden_states)
        else:
            hidden_states = module.act(module.wi(hidden_states))
        return module.wo(module.dropout(hidden_states))


def use_one_gpu(arguments: "TrainingArguments") -> None:
    """Has the Trainer use one GPU for each process, however many it sees."""
    if arguments.n_gpu > 1:
        DEVICES.check()
        arguments._n_gpu = 1
