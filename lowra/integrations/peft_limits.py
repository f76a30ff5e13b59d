"""What PEFT cannot do with packed layers, said before PyTorch says something about shapes of bytes."""

import functools
import logging

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..nn.embedding import LowRAEmbedding
from ..nn.experts import LowRAExperts
from ..nn.linear import PackedModule

logger = logging.getLogger(__name__)

# Methods that read values, shape or type of the base weight. Lily and UniLoRA would run and compute something else.
_READ_THE_WEIGHT = frozenset(
    "ADAMSS DEFT DELORA FROD GLORA HIRA HRA LILY LOHA LOKR OSF PEANUT PSOFT SHIRA SUPERTUNING TINYLORA UNILORA".split()
)
_STARTS_FROM_THE_WEIGHT = ("pissa", "corda", "olora", "loftq", "mica", "lora_ga")


def check_start(config: LoraConfig) -> None:
    """Raises ValueError for a LoRA that begins with, or goes on reading, the original weights."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_STARTS_FROM_THE_WEIGHT):
        raise ValueError(
            f"init_lora_weights={init!r} needs the original weights, and a packed model does not hold them. Write "
            "the initial adapter with the packed checkpoint (`lowra quantize MODEL --rank R --init loftq|pissa`) "
            "and load it with PeftModel.from_pretrained(model, 'DIR/initial_adapter', is_trainable=True)."
        )
    if getattr(config, "kasa_config", None) is not None:
        raise ValueError("kasa_config takes apart the original weights, and a packed model does not hold them.")


def refuse_embeddings(base_layer: LowRAEmbedding, *args, **kwargs):
    """Stands in the place of an adapter layer for packed embeddings."""
    raise ValueError(
        "Packed embeddings take no adapter: leave them out of target_modules, or quantise without quantize_embeddings."
    )


def _check_method(tuner: BaseTuner, model: nn.Module, config: PeftConfig) -> None:
    """Raises ValueError where a method that reads the dense weight is to be put on packed layers."""
    method = str(getattr(config.peft_type, "value", config.peft_type))
    packed = (name for name, module in model.named_modules() if isinstance(module, PackedModule))
    if method in _READ_THE_WEIGHT and any(_is_targeted(tuner, config, name) for name in packed):
        raise ValueError(
            f"{method} reads the dense weight of its layers, and packed layers have none. Take a method that only uses "
            "their inputs and outputs, such as LoRA (with rsLoRA and DoRA), AdaLoRA, IA3, VeRA, OFT or BOFT, or keep "
            "its layers dense when quantising (modules_to_not_convert)."
        )


def _packed_experts(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LowRAExperts)]


def _check_experts(model: nn.Module, config: PeftConfig) -> None:
    """Raises ValueError where packed experts are to be adapted, and warns of names that may mean single ones."""
    experts = _packed_experts(model)
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


def _refuse_methods() -> None:
    start, inject = BaseTuner.__init__, BaseTuner.inject_adapter

    @functools.wraps(start)
    def __init__(self, model, peft_config, adapter_name, *args, **kwargs):
        # some methods look at the weights before they inject their first adapter
        _check_method(self, model, peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config)
        start(self, model, peft_config, adapter_name, *args, **kwargs)

    @functools.wraps(inject)
    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        _check_method(self, model, self.peft_config[adapter_name])
        _check_experts(model, self.peft_config[adapter_name])
        return inject(self, model, adapter_name, *args, **kwargs)

    BaseTuner.__init__, BaseTuner.inject_adapter = __init__, inject_adapter


def _keep_names_beside_packed_experts() -> None:
    """PEFT takes every `gate_proj` of a mixture (of shared experts, of dense blocks) for fused experts of today.

    It moves such names from target_modules to parameters that packed experts do not have, and what was meant goes
    without an adapter.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # before PEFT did that
        return
    convert = conversion.convert_peft_config_for_transformers

    @functools.wraps(convert)
    def convert_peft_config_for_transformers(peft_config, model, *args, **kwargs):
        if not _packed_experts(model):
            convert(peft_config, model, *args, **kwargs)

    conversion.convert_peft_config_for_transformers = convert_peft_config_for_transformers


def _refuse_merging_into_bytes() -> None:
    """Our LoRA layer merges by itself; the layers of other methods would add to the packed bytes."""
    check = BaseTuner._check_merge_allowed

    @functools.wraps(check)
    def _check_merge_allowed(self):
        for name, module in self.model.named_modules():
            of_peft = isinstance(module, BaseTunerLayer) and not getattr(module, "merges_packed", False)
            if of_peft and isinstance(module.get_base_layer(), PackedModule):
                raise ValueError(
                    f"{type(module).__name__} {name} cannot merge into a packed layer: use "
                    "lowra.merge_into_dense(peft_model), which makes a dense model of it."
                )
        check(self)

    BaseTuner._check_merge_allowed = _check_merge_allowed


def _refuse_training_of_packed_weights() -> None:
    """Says why modules_to_save and trainable_token_indices cannot name a packed module; PyTorch's message would not."""
    original = AuxiliaryTrainingWrapper.__init__

    @functools.wraps(original)
    def __init__(self, module_to_save, *args, **kwargs):
        if isinstance(module_to_save, PackedModule):
            raise ValueError(
                f"{type(self).__name__} would train a packed weight (modules_to_save, trainable_token_indices): leave "
                "it out there, or keep it dense when quantising (modules_to_not_convert, or no quantize_head and "
                "quantize_embeddings)."
            )
        original(self, module_to_save, *args, **kwargs)

    AuxiliaryTrainingWrapper.__init__ = __init__


_refuse_methods()
_keep_names_beside_packed_experts()
_refuse_merging_into_bytes()
_refuse_training_of_packed_weights()
