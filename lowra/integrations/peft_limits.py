"""What PEFT cannot do with packed layers, said before PyTorch says something about shapes of bytes."""

import logging
from collections.abc import Iterable
from typing import Any, NoReturn

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..nn.embedding import LowRAEmbedding
from ..nn.experts import LowRAExperts
from ..nn.packed_module import PackedModule

logger = logging.getLogger(__name__)

# Methods that read values, shape or type of the base weight. Lily and UniLoRA would run and compute something else.
_READ_THE_WEIGHT = frozenset(
    "ADAMSS DEFT DELORA FROD GLORA HIRA HRA LILY LOHA LOKR OSF PEANUT PSOFT SHIRA SUPERTUNING TINYLORA UNILORA".split()
)
_WRAPPED = "_checkpoint_wrapped_module."  # in the names of layers under FSDP's activation checkpointing
_STARTS_FROM_THE_WEIGHT = ("pissa", "corda", "olora", "loftq", "mica", "lora_ga")


def check_start(init: bool | str, kasa_config: object | None) -> None:
    """Raises ValueError for a LoRA that begins with, or goes on reading, the original weights.

    Args:
        init, kasa_config: fields of the LoraConfig, `init_lora_weights` the former.
    """
    if isinstance(init, str) and init.lower().startswith(_STARTS_FROM_THE_WEIGHT):
        raise ValueError(
            f"init_lora_weights={init!r} needs the original weights, and a packed model does not hold them. Write "
            "the initial adapter with the packed checkpoint (`lowra quantize MODEL --rank R --init loftq|pissa`) "
            "and load it with PeftModel.from_pretrained(model, 'DIR/initial_adapter', is_trainable=True)."
        )
    if kasa_config is not None:
        raise ValueError("kasa_config takes apart the original weights, and a packed model does not hold them.")


def refuse_embeddings(base_layer: LowRAEmbedding, *args: Any, **kwargs: Any) -> NoReturn:
    """Stands in the place of an adapter layer for packed embeddings."""
    raise ValueError(
        "Packed embeddings take no adapter: leave them out of target_modules, or quantise without quantize_embeddings."
    )


def check_method(tuner: BaseTuner, model: nn.Module, config: PeftConfig) -> None:
    """Raises ValueError where a method that reads the dense weight is to be put on packed layers."""
    method = str(getattr(config.peft_type, "value", config.peft_type))
    packed = (name for name, module in model.named_modules() if isinstance(module, PackedModule))
    if method in _READ_THE_WEIGHT and any(_is_targeted(tuner, config, name) for name in packed):
        raise ValueError(
            f"{method} reads the dense weight of its layers, and packed layers have none. Take a method that only uses "
            "their inputs and outputs, such as LoRA (with rsLoRA and DoRA), AdaLoRA, IA3, VeRA, OFT or BOFT, or keep "
            "its layers dense when quantising (modules_to_not_convert)."
        )


def is_packed(model: nn.Module) -> bool:
    """Whether any module of the model holds packed weights."""
    return any(isinstance(module, PackedModule) for module in model.modules())


def packed_experts(model: nn.Module) -> list[str]:
    """Names of the packed experts of a model."""
    return [name for name, module in model.named_modules() if isinstance(module, LowRAExperts)]


def check_experts(model: nn.Module, config: PeftConfig) -> None:
    """Raises ValueError where packed experts are to be adapted, and warns of names that may mean single ones."""
    experts = packed_experts(model)
    for parameter in getattr(config, "target_parameters", None) or ():
        for name in experts:
            if f".{name}".endswith(f".{parameter}"):
                raise ValueError(
                    f"{name} is packed, and packed experts take no adapter (target_parameters): leave it out there, or "
                    "keep the experts dense when quantising (modules_to_not_convert)."
                )
    targets = getattr(config, "target_modules", None)
    if experts and targets is not None and not isinstance(targets, str):
        names = [f".{name}" for name, _ in model.named_modules()]
        unmatched = sorted(target for target in targets if not any(name.endswith(f".{target}") for name in names))
        if unmatched:
            logger.warning(
                "lowra: packed experts take no adapter; %s of target_modules left out.", ", ".join(unmatched)
            )


def _is_targeted(tuner: BaseTuner, config: PeftConfig, name: str) -> bool:
    targets = getattr(config, "target_modules", None)
    if targets is None or targets == "all-linear":  # PEFT's own choice of layers
        return True
    return bool(tuner._check_target_module_exists(config, name))


def check_merge(model: nn.Module) -> None:
    """Raises ValueError where a layer of PEFT's own would add to packed bytes; our LoRA layer merges by itself."""
    for name, module in model.named_modules():
        of_peft = isinstance(module, BaseTunerLayer) and not getattr(module, "merges_packed", False)
        if of_peft and isinstance(module.get_base_layer(), PackedModule):
            raise ValueError(
                f"{type(module).__name__} {name} cannot merge into a packed layer: use "
                "lowra.merge_into_dense(peft_model), which makes a dense model of it."
            )


def refuse_training(wrapper: str) -> None:
    """Raises ValueError: modules_to_save or trainable_token_indices name a packed module."""
    raise ValueError(
        f"{wrapper} would train a packed weight (modules_to_save, trainable_token_indices): leave it out there, or "
        "keep it dense when quantising (modules_to_not_convert, or no quantize_head and quantize_embeddings)."
    )


def refuse_saving_parts(model: PeftModel, names: Iterable[str], state_dict: dict[str, Any] | None) -> None:
    """
    Args:
        names: of adapters that are to be saved.
        state_dict: they come from; None for that of the model.

    Raises:
        ValueError: an adapter that the model does not have, or tensors of one are missing, none, or of another shape.
            PEFT would write what there is.
    """
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"There is no adapter {name!r}; there are {', '.join(model.peft_config)}.")
        own = get_peft_model_state_dict(model, None, name, save_embedding_layers=False)
        given = own if state_dict is None else get_peft_model_state_dict(model, state_dict, name, False)
        plain = {key.replace(_WRAPPED, ""): tensor.shape for key, tensor in own.items()}
        others = [
            key for key, shape in plain.items() if key not in given or getattr(given[key], "shape", None) != shape
        ]
        if others or not given:
            which = f"{len(others)} of its {len(plain)} tensors ({', '.join(others[:2])})" if plain else "a tensor"
            raise ValueError(
                f"Adapter {name!r} would be saved without {which}: they are called otherwise, are not there or have "
                "other shapes. FSDP's own activation_checkpointing and wrappers of DDP and torch.compile change names: "
                "save the unwrapped model, and use gradient_checkpointing=True of the Trainer."
            )
