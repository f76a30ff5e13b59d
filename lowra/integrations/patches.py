"""The table of patches: every place where Transformers, PEFT or PyTorch does something else for packed models.

The replacements stand in `transformers_replacements`, `peft_replacements` and `fsdp_replacements`, what they check in
`adapter_records`, `peft_limits` and `transformers`; patches of single models, which no dense one ever meets, in
`model_patches`.
"""

import torch

from . import fsdp_replacements as of_fsdp
from . import peft_replacements as of_peft
from . import transformers_replacements as of_transformers
from .model_patches import MODEL_PATCHES
from .patching import Patch, install_patches

_MODEL = "transformers.modeling_utils:PreTrainedModel."
_CONFIG = "transformers.configuration_utils:PreTrainedConfig."
_TUNER = "peft.tuners.tuners_utils:BaseTuner."
_SHARDED = "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam."

TABLE = (
    Patch(
        target=f"{_MODEL}from_pretrained",
        why="Transformers refuses keywords it does not know, load_in_lowra and lowra_bits among them; and damaged JSON "
        "files of a packed checkpoint end in errors of whatever line meets them, a named pipe as a shard never ends.",
        door="quantization_config=LowRAConfig(bits=1.5), of which the keywords are the short form; a quantizer that is "
        "told the folder before anything in it is read",
        since="transformers 5.0",
        wrap=of_transformers.load_in_lowra,
    ),
    Patch(
        target=f"{_CONFIG}get_config_dict",
        why="A config.json of a packed checkpoint that is no JSON object, or nested deeply, ends in a TypeError or "
        "RecursionError.",
        door="errors of one kind for files that cannot be read",
        since="none",
        rests_on=("pretrained_model_name_or_path",),
        wrap=of_transformers.checked_config,
    ),
    Patch(
        target=f"{_CONFIG}from_dict",
        why="A value that a config class cannot use ends in an error that is no ValueError.",
        door="the same",
        since="none",
        rests_on=("config_dict",),
        wrap=of_transformers.built_config,
    ),
    Patch(
        target=f"{_MODEL}save_pretrained",
        why="A packed checkpoint would be without digests of its tensors and without a model card.",
        door="HfQuantizer could be told the folder that is saved to; a hook on one model does not survive pickling",
        since="none",
        rests_on=("save_directory", "is_main_process"),
        also={"transformers.utils.hub:PushToHubMixin._upload_modified_files": ()},
        wrap=of_transformers.described,
    ),
    Patch(
        target="transformers.modeling_utils:ModuleUtilsMixin.dtype",
        why="`model.dtype` is that of the first floating parameter: with packed embeddings, of one of their tables.",
        door="none: a property is looked up in the class",
        since="none",
        wrap=of_transformers.dtype,
    ),
    Patch(
        target="transformers.modeling_utils:ModuleUtilsMixin.num_parameters",
        why="Bytes of packed codes would be counted as parameters, about half of those of the model.",
        door="a parameter could say how many numbers it stands for; only bitsandbytes' Params4bit is asked",
        since="none",
        rests_on=("only_trainable", "exclude_embeddings"),
        wrap=of_transformers.counted,
    ),
    Patch(
        target="peft.peft_model:PeftModel.get_nb_trainable_parameters",
        why="The same in PEFT's print_trainable_parameters.",
        door="a parameter could say how many numbers it stands for; only classes named Params4bit are asked",
        since="none",
        wrap=of_peft.counted_by_peft,
    ),
    Patch(
        target="peft.mixed_model:PeftMixedModel.get_nb_trainable_parameters",
        why="The same for several kinds of adapters at once.",
        door="as above",
        since="none",
        wrap=of_peft.counted_by_peft,
    ),
    Patch(
        target="peft.peft_model:PeftModel._setup_prompt_encoder",
        why="Prompt methods seek the embeddings by a parameter whose first size is the vocabulary, and find row_bits.",
        door="get_input_embeddings(), which PEFT could ask",
        since="none",
        also={"torch.nn:Module.get_submodule": ("target",)},
        wrap=of_peft.with_packed_table,
    ),
    Patch(
        target="transformers.integrations.peft:PeftAdapterMixin.load_adapter",
        why="`model.load_adapter` goes past PeftModel, and an adapter of another base would be put on a packed one.",
        door="a hook on loading adapters",
        since="none",
        rests_on=("peft_model_id", "adapter_name", "adapter_kwargs"),
        wrap=of_transformers.checked_adapter_of_transformers,
    ),
    Patch(
        target="transformers.generation.utils:GenerationMixin._extract_generation_mode_kwargs",
        why="generate(custom_generate=FUNCTION) drops the streamer and the tokenizer it was given: nothing is printed, "
        "and stop strings are refused.",
        door="custom_generate itself, once it hands on what _sample takes",
        since="none",
        rests_on=("custom_generate", "kwargs", "synced_gpus", "assistant_model", "streamer"),
        wrap=of_transformers.all_of_generate,
    ),
    Patch(
        target="peft.peft_model:PeftModel.save_pretrained",
        why="adapter_config.json takes no new keys, so whose base an adapter belongs to would be lost.",
        door="PeftConfig could keep keys that it does not know",
        since="none",
        rests_on=(
            "save_directory",
            "selected_adapters",
            "is_main_process",
            "path_initial_model_for_weight_conversion",
        ),
        wrap=of_peft.with_records,
    ),
    Patch(
        target="peft.peft_model:PeftModel.from_pretrained",
        why="What adapter_config.json says is used before load_adapter sees it, and ends in errors of any line.",
        door="PeftConfig could check the values that it is given",
        since="none",
        rests_on=("model", "model_id", "config"),
        wrap=of_peft.checked_folder,
    ),
    Patch(
        target="peft.mixed_model:PeftMixedModel.from_pretrained",
        why="The same through the class for adapters of several methods.",
        door="PeftConfig could check the values that it is given",
        since="none",
        rests_on=("model", "model_id", "config"),
        wrap=of_peft.checked_folder,
    ),
    Patch(
        target="peft.peft_model:PeftModel.load_adapter",
        why="An adapter of another base, or a damaged one, would be loaded with a warning at most.",
        door="a hook on loading adapters",
        since="none",
        rests_on=("model_id", "adapter_name"),
        wrap=of_peft.checked_adapter,
    ),
    Patch(
        target="peft.mixed_model:PeftMixedModel.load_adapter",
        why="The same through the class for adapters of several methods.",
        door="a hook on loading adapters",
        since="none",
        rests_on=("model_id", "adapter_name"),
        wrap=of_peft.checked_adapter,
    ),
    Patch(
        target="peft.auto:_BaseAutoPeftModel.from_pretrained",
        why="It reads adapter_config.json by itself, to find the base, and a damaged one ends in errors of any line.",
        door="errors of one kind for files that cannot be read",
        since="none",
        rests_on=("pretrained_model_name_or_path",),
        wrap=of_peft.auto_loaded,
    ),
    Patch(
        target="peft.utils.hotswap:load_peft_weights",
        why="A hotswap_adapter that was imported by name before lowra goes past the replacement below.",
        door="a hook on loading adapters",
        since="none",
        rests_on=("model_id",),
        wrap=of_peft.remembered,
    ),
    *(
        Patch(
            target=f"{module}:load_peft_weights",
            why="Factors that are read with it and put in with set_peft_model_state_dict go past every door.",
            door="a hook on loading adapters",
            since="none",
            rests_on=("model_id",),
            wrap=of_peft.remembered,
        )
        for module in ("peft", "peft.utils", "peft.utils.save_and_load")
    ),
    Patch(
        target=f"{_TUNER}_remap_adapter_state_dict_for_load",
        why="It makes a state dict of the model to find names, and factors that nobody read out would seem to be.",
        door="none",
        since="none",
        wrap=of_peft.names_alone,
        optional=True,  # before PEFT did that
    ),
    Patch(
        target="peft.utils.hotswap:hotswap_adapter",
        why="Factors of another base would be put in an adapter's place, which would keep its record and tables.",
        door="a hook on loading adapters",
        since="none",
        rests_on=("model", "model_name_or_path", "adapter_name"),
        wrap=of_peft.checked_swap,
    ),
    Patch(
        target="peft.utils.hotswap:hotswap_adapter_from_state_dict",
        why="Factors without a folder have no record, and would be saved with that of the adapter before.",
        door="none",
        since="none",
        rests_on=("model", "state_dict", "adapter_name"),
        wrap=of_peft.swap_without_record,
    ),
    Patch(
        target=f"{_TUNER}_unload_and_optionally_merge",
        why="Tables trained with an adapter would go on counting, or be lost, when it is taken off or merged.",
        door="a layer could be told that it is unloaded",
        since="none",
        rests_on=("merge", "adapter_names"),
        wrap=of_peft.unloaded,
    ),
    Patch(
        target="peft.tuners.lora.model:LoraModel.add_weighted_adapter",
        why="The new adapter would be without the tables that its parts were trained with.",
        door="none",
        since="none",
        rests_on=("adapters",),
        wrap=of_peft.weighted,
    ),
    Patch(
        target="peft.tuners.lora.model:LoraModel._enable_peft_forward_hooks",
        why="Naming the adapters of a batch walks twice through all modules, some thousand: with four adapters 13 ms "
        "before the first token of a request, more than what is asked of a model that nobody has touched. After an "
        "error in the call the names stay, and calls that name nobody go by them.",
        door="PEFT could keep a list of its layers, and take its hooks off in a `finally`",
        since="none",
        rests_on=("kwargs",),
        wrap=of_peft.named_for_a_call,
    ),
    Patch(
        target="peft.tuners.lora.conversion:_convert_module_to_lora",
        why="A LoRA made of an adapter of another method would be without the tables that it was trained with.",
        door="none",
        since="none",
        rests_on=("module", "adapter_name"),
        wrap=of_peft.converted,
        optional=True,  # before PEFT converted adapters
    ),
    *(
        Patch(
            target=f"{module}:save_as_lora",
            why="It goes past save_pretrained, and the LoRA would be without the record of its base and packing.",
            door="none",
            since="none",
            rests_on=("path", "model", "adapter_name"),
            wrap=of_peft.saved_as_lora,
            optional=True,
        )
        for module in ("peft", "peft.tuners", "peft.tuners.lora", "peft.tuners.lora.conversion")
    ),
    Patch(
        target=f"{_TUNER}__init__",
        why="Methods that read the dense weight would read packed bytes, some before they inject an adapter.",
        door="peft.utils.register_peft_method knows nothing of the layers of a method",
        since="none",
        rests_on=("model", "peft_config", "adapter_name"),
        also={f"{_TUNER}_check_target_module_exists": ()},
        wrap=of_peft.checked_method,
    ),
    Patch(
        target=f"{_TUNER}inject_adapter",
        why="PEFT's own LoRA layer would merge into packed bytes, and its other methods would read them.",
        door="LoraConfig._register_custom_module, which PEFT calls experimental: it is used here, since PEFT does not "
        "save it and a reloaded adapter must find it too",
        since="none",
        rests_on=("model", "adapter_name"),
        also={"peft:LoraConfig._register_custom_module": ("mapping",)},
        wrap=of_peft.with_our_layers,
    ),
    Patch(
        target=f"{_TUNER}_check_merge_allowed",
        why="The layers of other methods than LoRA would merge into packed bytes.",
        door="a layer could refuse to be merged before any other is",
        since="none",
        wrap=of_peft.checked_merge,
    ),
    Patch(
        target="peft.utils.other:AuxiliaryTrainingWrapper.__init__",
        why="modules_to_save and trainable_token_indices would train packed bytes; PyTorch's message does not say so.",
        door="none",
        since="none",
        rests_on=("module_to_save",),
        wrap=of_peft.checked_training,
    ),
    Patch(
        target="peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers",
        why="PEFT takes every gate_proj of a mixture for fused experts, moves such names to parameters that packed "
        "experts do not have, and what was meant goes without an adapter.",
        door="none",
        since="none",
        rests_on=("peft_config", "model"),
        wrap=of_peft.names_kept,
        optional=True,  # from PEFT 0.19 on
    ),
    Patch(
        target="transformers.integrations.peft:convert_peft_config_for_transformers",
        why="The same in Transformers' own loading of adapters.",
        door="none",
        since="none",
        rests_on=("peft_config", "model"),
        wrap=of_peft.names_kept,
        optional=True,  # before PEFT did that
    ),
    Patch(
        target=f"{_SHARDED}_init_sharded_param",
        why="FSDP2 makes a parameter with gradients of every share before it says that there are none, which integers "
        "cannot have.",
        door="PyTorch's own way",
        since="torch 2.12",
        rests_on=("param",),
        also={"torch.distributed.fsdp._fully_shard._fsdp_param:nn": ()},
        optional=of_fsdp.SHARDS_INTEGERS or not torch.distributed.is_available(),
        wrap=of_fsdp.integers_without_gradients,
    ),
    Patch(
        target=f"{_SHARDED}init_dtype_attrs",
        why="Under mixed precision FSDP2 gathers every floating tensor in bfloat16, levels and scales of packed "
        "weights too, which would lose digits.",
        door="fully_shard(mp_policy=...) of each packed layer, which would be gathered by itself; Accelerate shards "
        "whole blocks",
        since="none",
        rests_on=("mp_policy",),
        optional=not torch.distributed.is_available(),
        wrap=of_fsdp.packed_as_they_are,
    ),
    Patch(
        target="bitsandbytes.backends.cpu.ops:logger",
        why="On some CPUs it warns at every import of a kernel for NF4 that concerns nothing here (lowra/backend.py).",
        door="a debug message",
        since="none",
    ),
    *MODEL_PATCHES,
)


def apply_patches() -> None:
    install_patches(TABLE)
