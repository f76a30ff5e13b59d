"""The table of patches: every place where Transformers, PEFT or bitsandbytes does something else for packed models.

Each replacement hands dense models to the original: arguments, results, exceptions and state are its own. What the
replacements check stands in `adapter_records`, `peft_limits` and `transformers`; patches of single models, which no
dense one ever meets, in `model_patches`.
"""

import functools
import inspect
import logging
import pathlib
from collections.abc import Callable
from typing import Any

from peft import LoraConfig

from ..checkpoints.configs import packing_described
from ..config import LowRAConfig
from ..nn.adapter_tables import release_adapter_tables
from ..nn.embedding import LowRAEmbedding
from ..nn.linear import LowRALinear
from ..nn.packed_module import PackedModule
from .adapter_records import (
    UNKNOWN,
    Arriving,
    check_adapter,
    check_loaded_by_transformers,
    check_saved,
    check_settings,
    forget_tables,
    is_packed_base,
    load_checked,
    refuse_losing_tables,
    settle,
    tables_set_aside,
    write_records,
)
from .folders import build_config, describes_packing, load_adapter_folder, load_folder, local_packed_folder
from .model_patches import MODEL_PATCHES
from .parameter_counts import uncounted
from .patching import Patch, install_patches
from .peft import LowRALoraLinear
from .peft_limits import (
    check_experts,
    check_merge,
    check_method,
    is_packed,
    packed_experts,
    refuse_embeddings,
    refuse_training,
)
from .prompt_learning import table_in_sight
from .transformers import describe_saved, dtype_of_packed

logger = logging.getLogger(__name__)


def _load_in_lowra(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(
        cls: Any, *args: Any, load_in_lowra: bool = False, lowra_bits: float | None = None, **kwargs: Any
    ) -> Any:
        if load_in_lowra:
            if kwargs.get("quantization_config") is not None:
                raise ValueError("Give either load_in_lowra=True or quantization_config, not both.")
            kwargs["quantization_config"] = LowRAConfig() if lowra_bits is None else LowRAConfig(bits=lowra_bits)
        elif lowra_bits is not None:
            raise ValueError("lowra_bits has no effect without load_in_lowra=True.")
        folder = local_packed_folder(args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        if folder is None:
            return original(cls, *args, **kwargs)
        return load_folder(functools.partial(original, cls, *args, **kwargs), folder, kwargs)

    return from_pretrained


def _checked_config(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_config_dict(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        folder = local_packed_folder(pretrained_model_name_or_path, kwargs)
        if folder is not None:
            packing_described(folder)
        return original(cls, pretrained_model_name_or_path, **kwargs)

    return get_config_dict


def _built_config(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_dict(cls: Any, config_dict: Any, **kwargs: Any) -> Any:
        if not describes_packing(config_dict):
            return original(cls, config_dict, **kwargs)
        return build_config(functools.partial(original, cls, config_dict, **kwargs))

    return from_dict


def _described(original: Callable) -> Callable:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        result = original(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            describe_saved(self, pathlib.Path(save_directory))
        return result

    return save_pretrained


def _dtype(original: property) -> property:
    get: Any = original.fget

    def dtype(self: Any) -> Any:
        return dtype_of_packed(self) or get(self)

    return property(functools.wraps(get)(dtype), doc=original.__doc__)


def _checked_method(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, model: Any, peft_config: Any, adapter_name: Any, *args: Any, **kwargs: Any) -> Any:
        if is_packed(model):
            check_method(self, model, peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config)
        original(self, model, peft_config, adapter_name, *args, **kwargs)

    return __init__


def _with_our_layers(original: Callable) -> Callable:
    @functools.wraps(original)
    def inject_adapter(self: Any, model: Any, adapter_name: Any, *args: Any, **kwargs: Any) -> Any:
        if is_packed(model):
            forget_tables(model, adapter_name)
            config = self.peft_config[adapter_name]
            check_method(self, model, config)
            check_experts(model, config)
            if isinstance(config, LoraConfig):
                ours: dict[Any, Any] = {LowRALinear: LowRALoraLinear, LowRAEmbedding: refuse_embeddings}
                config._register_custom_module(ours)
        return original(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _names_kept(original: Callable) -> Callable:
    @functools.wraps(original)
    def convert_peft_config_for_transformers(peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if packed_experts(model):
            return peft_config
        return original(peft_config, model, *args, **kwargs)

    return convert_peft_config_for_transformers


def _checked_merge(original: Callable) -> Callable:
    @functools.wraps(original)
    def _check_merge_allowed(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_merge(self.model)
        return original(self, *args, **kwargs)

    return _check_merge_allowed


def _checked_training(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, module_to_save: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(module_to_save, PackedModule):
            refuse_training(type(self).__name__)
        original(self, module_to_save, *args, **kwargs)

    return __init__


def _with_records(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_packed_base(self):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        names = given.arguments["selected_adapters"] or list(self.peft_config)
        converted = given.arguments["path_initial_model_for_weight_conversion"] is not None
        if converted:
            refuse_losing_tables(self, names, "the original weights, for which it is converted,")
        result = original(self, *args, **kwargs)
        if given.arguments["is_main_process"]:
            write_records(self, pathlib.Path(given.arguments["save_directory"]), names, converted)
        return result

    return save_pretrained


def _checked_folder(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        load = functools.partial(original, cls, model, model_id, *args, **kwargs)
        if not is_packed(model):
            return load()
        if kwargs.get("config") is None:
            check_settings(model_id, kwargs)
        return load_adapter_folder(load, model_id)

    return from_pretrained


def _checked_adapter(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_adapter(
        self: Any, model_id: Any, adapter_name: Any, *args: Any, any_base: bool = False, **kwargs: Any
    ) -> Any:
        load = functools.partial(original, self, model_id, adapter_name, *args, **kwargs)
        return load_checked(self, model_id, adapter_name, load, kwargs, any_base)

    return load_adapter


def _checked_adapter_of_transformers(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, any_base: bool = False, **kwargs: Any) -> Any:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            return original(self, *args, **kwargs)  # which says what is wrong with them
        path, name = given.get("peft_model_id"), given.get("adapter_name") or "default"
        arriving = Arriving(UNKNOWN)
        options = {**given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
        if path is not None:
            arriving = check_adapter(self, path, options, any_base)
        result = original(self, *args, **kwargs)
        if is_packed_base(self):
            check_loaded_by_transformers(self, name, result, str(path))
            check_saved(str(path), options, arriving.record)
            settle(self, name, arriving)
        return result

    return load_adapter


def _counted(original: Callable) -> Callable:
    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> Any:
        count = original(self, only_trainable, exclude_embeddings)
        return count if only_trainable else count + uncounted(self, exclude_embeddings)

    return num_parameters


def _counted_by_peft(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_nb_trainable_parameters(self: Any) -> Any:
        trainable, every = original(self)
        return trainable, every + uncounted(self)

    return get_nb_trainable_parameters


def _with_packed_table(original: Callable) -> Callable:
    @functools.wraps(original)
    def _setup_prompt_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
        with table_in_sight(self.base_model):
            return original(self, *args, **kwargs)

    return _setup_prompt_encoder


def _all_of_generate(original: Callable) -> Callable:
    @functools.wraps(original)
    def _extract_generation_mode_kwargs(
        self: Any, custom_generate: Any, kwargs: Any, synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> Any:
        tokenizer = kwargs.get("tokenizer")
        found = original(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        if getattr(custom_generate, "__module__", "").startswith("lowra."):  # fast_decoding
            kept = {"streamer": streamer, "synced_gpus": synced_gpus, "tokenizer": tokenizer}
            found |= {name: value for name, value in kept.items() if value is not None}
        return found

    return _extract_generation_mode_kwargs


def _checked_swap(original: Callable) -> Callable:
    @functools.wraps(original)
    def hotswap_adapter(
        model: Any, model_name_or_path: Any, adapter_name: Any, *args: Any, any_base: bool = False, **kwargs: Any
    ) -> Any:
        inner = getattr(model, "_orig_mod", model)  # of a compiled model
        arriving = check_adapter(inner, model_name_or_path, kwargs, any_base)
        check_saved(model_name_or_path, kwargs, arriving.record)
        with tables_set_aside(inner, adapter_name):  # or the swap below would refuse to lose them
            original(model, model_name_or_path, adapter_name, *args, **kwargs)
        settle(inner, adapter_name, arriving)

    return hotswap_adapter


def _swap_without_record(original: Callable) -> Callable:
    @functools.wraps(original)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: Any, adapter_name: Any, *args: Any, **kwargs: Any
    ) -> Any:
        inner = getattr(model, "_orig_mod", model)
        if is_packed_base(inner):
            refuse_losing_tables(inner, [adapter_name], "factors from a state dict")
        original(model, state_dict, adapter_name, *args, **kwargs)
        settle(inner, adapter_name, Arriving(UNKNOWN))

    return hotswap_adapter_from_state_dict


def _unloaded(original: Callable) -> Callable:
    @functools.wraps(original)
    def _unload_and_optionally_merge(self: Any, merge: Any = True, *args: Any, **kwargs: Any) -> Any:
        if is_packed(self.model):
            if merge:
                self._check_merge_allowed()  # before anything is changed
            release_adapter_tables(self.model, kwargs.get("adapter_names") if merge else [])
        return original(self, merge, *args, **kwargs)

    return _unload_and_optionally_merge


def _weighted(original: Callable) -> Callable:
    @functools.wraps(original)
    def add_weighted_adapter(self: Any, adapters: Any, *args: Any, **kwargs: Any) -> Any:
        if is_packed(self.model):
            refuse_losing_tables(self.model, adapters, "an adapter made of several")
        return original(self, adapters, *args, **kwargs)

    return add_weighted_adapter


_MODEL = "transformers.modeling_utils:PreTrainedModel."
_CONFIG = "transformers.configuration_utils:PreTrainedConfig."
_TUNER = "peft.tuners.tuners_utils:BaseTuner."

TABLE = (
    Patch(
        target=f"{_MODEL}from_pretrained",
        why="Transformers refuses keywords it does not know, load_in_lowra and lowra_bits among them; and damaged JSON "
        "files of a packed checkpoint end in errors of whatever line meets them, a named pipe as a shard never ends.",
        door="quantization_config=LowRAConfig(bits=1.5), of which the keywords are the short form; a quantizer that is "
        "told the folder before anything in it is read",
        since="transformers 5.0",
        wrap=_load_in_lowra,
    ),
    Patch(
        target=f"{_CONFIG}get_config_dict",
        why="A config.json of a packed checkpoint that is no JSON object, or nested deeply, ends in a TypeError or "
        "RecursionError.",
        door="errors of one kind for files that cannot be read",
        since="none",
        rests_on=("pretrained_model_name_or_path",),
        wrap=_checked_config,
    ),
    Patch(
        target=f"{_CONFIG}from_dict",
        why="A value that a config class cannot use ends in an error that is no ValueError.",
        door="the same",
        since="none",
        rests_on=("config_dict",),
        wrap=_built_config,
    ),
    Patch(
        target=f"{_MODEL}save_pretrained",
        why="A packed checkpoint would be without digests of its tensors and without a model card.",
        door="HfQuantizer could be told the folder that is saved to; a hook on one model does not survive pickling",
        since="none",
        rests_on=("save_directory", "is_main_process"),
        wrap=_described,
    ),
    Patch(
        target="transformers.modeling_utils:ModuleUtilsMixin.dtype",
        why="`model.dtype` is that of the first floating parameter: with packed embeddings, of one of their tables.",
        door="none: a property is looked up in the class",
        since="none",
        wrap=_dtype,
    ),
    Patch(
        target="transformers.modeling_utils:ModuleUtilsMixin.num_parameters",
        why="Bytes of packed codes would be counted as parameters, about half of those of the model.",
        door="a parameter could say how many numbers it stands for; only bitsandbytes' Params4bit is asked",
        since="none",
        rests_on=("only_trainable", "exclude_embeddings"),
        wrap=_counted,
    ),
    Patch(
        target="peft.peft_model:PeftModel.get_nb_trainable_parameters",
        why="The same in PEFT's print_trainable_parameters.",
        door="a parameter could say how many numbers it stands for; only classes named Params4bit are asked",
        since="none",
        wrap=_counted_by_peft,
    ),
    Patch(
        target="peft.mixed_model:PeftMixedModel.get_nb_trainable_parameters",
        why="The same for several kinds of adapters at once.",
        door="as above",
        since="none",
        wrap=_counted_by_peft,
    ),
    Patch(
        target="peft.peft_model:PeftModel._setup_prompt_encoder",
        why="Prompt methods seek the embeddings by a parameter whose first size is the vocabulary, and find row_bits.",
        door="get_input_embeddings(), which PEFT could ask",
        since="none",
        also={"torch.nn:Module.get_submodule": ("target",)},
        wrap=_with_packed_table,
    ),
    Patch(
        target="transformers.integrations.peft:PeftAdapterMixin.load_adapter",
        why="`model.load_adapter` goes past PeftModel, and an adapter of another base would be put on a packed one.",
        door="a hook on loading adapters",
        since="none",
        rests_on=("peft_model_id", "adapter_name", "adapter_kwargs"),
        wrap=_checked_adapter_of_transformers,
    ),
    Patch(
        target="transformers.generation.utils:GenerationMixin._extract_generation_mode_kwargs",
        why="generate(custom_generate=FUNCTION) drops the streamer and the tokenizer it was given: nothing is printed, "
        "and stop strings are refused.",
        door="custom_generate itself, once it hands on what _sample takes",
        since="none",
        rests_on=("custom_generate", "kwargs", "synced_gpus", "assistant_model", "streamer"),
        wrap=_all_of_generate,
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
        wrap=_with_records,
    ),
    Patch(
        target="peft.peft_model:PeftModel.from_pretrained",
        why="What adapter_config.json says is used before load_adapter sees it, and ends in errors of any line.",
        door="PeftConfig could check the values that it is given",
        since="none",
        rests_on=("model", "model_id", "config"),
        wrap=_checked_folder,
    ),
    Patch(
        target="peft.mixed_model:PeftMixedModel.from_pretrained",
        why="The same through the class for adapters of several methods.",
        door="PeftConfig could check the values that it is given",
        since="none",
        rests_on=("model", "model_id", "config"),
        wrap=_checked_folder,
    ),
    Patch(
        target="peft.peft_model:PeftModel.load_adapter",
        why="An adapter of another base, or a damaged one, would be loaded with a warning at most.",
        door="a hook on loading adapters",
        since="none",
        rests_on=("model_id", "adapter_name"),
        wrap=_checked_adapter,
    ),
    Patch(
        target="peft.mixed_model:PeftMixedModel.load_adapter",
        why="The same through the class for adapters of several methods.",
        door="a hook on loading adapters",
        since="none",
        rests_on=("model_id", "adapter_name"),
        wrap=_checked_adapter,
    ),
    Patch(
        target="peft.utils.hotswap:hotswap_adapter",
        why="Factors of another base would be put in an adapter's place, which would keep its record and tables.",
        door="a hook on loading adapters",
        since="none",
        rests_on=("model", "model_name_or_path", "adapter_name"),
        wrap=_checked_swap,
    ),
    Patch(
        target="peft.utils.hotswap:hotswap_adapter_from_state_dict",
        why="Factors without a folder have no record, and would be saved with that of the adapter before.",
        door="none",
        since="none",
        rests_on=("model", "state_dict", "adapter_name"),
        wrap=_swap_without_record,
    ),
    Patch(
        target=f"{_TUNER}_unload_and_optionally_merge",
        why="Tables trained with an adapter would go on counting, or be lost, when it is taken off or merged.",
        door="a layer could be told that it is unloaded",
        since="none",
        rests_on=("merge", "adapter_names"),
        wrap=_unloaded,
    ),
    Patch(
        target="peft.tuners.lora.model:LoraModel.add_weighted_adapter",
        why="The new adapter would be without the tables that its parts were trained with.",
        door="none",
        since="none",
        rests_on=("adapters",),
        wrap=_weighted,
    ),
    Patch(
        target=f"{_TUNER}__init__",
        why="Methods that read the dense weight would read packed bytes, some before they inject an adapter.",
        door="peft.utils.register_peft_method knows nothing of the layers of a method",
        since="none",
        rests_on=("model", "peft_config", "adapter_name"),
        also={f"{_TUNER}_check_target_module_exists": ()},
        wrap=_checked_method,
    ),
    Patch(
        target=f"{_TUNER}inject_adapter",
        why="PEFT's own LoRA layer would merge into packed bytes, and its other methods would read them.",
        door="LoraConfig._register_custom_module, which PEFT calls experimental: it is used here, since PEFT does not "
        "save it and a reloaded adapter must find it too",
        since="none",
        rests_on=("model", "adapter_name"),
        also={"peft:LoraConfig._register_custom_module": ("mapping",)},
        wrap=_with_our_layers,
    ),
    Patch(
        target=f"{_TUNER}_check_merge_allowed",
        why="The layers of other methods than LoRA would merge into packed bytes.",
        door="a layer could refuse to be merged before any other is",
        since="none",
        wrap=_checked_merge,
    ),
    Patch(
        target="peft.utils.other:AuxiliaryTrainingWrapper.__init__",
        why="modules_to_save and trainable_token_indices would train packed bytes; PyTorch's message does not say so.",
        door="none",
        since="none",
        rests_on=("module_to_save",),
        wrap=_checked_training,
    ),
    Patch(
        target="peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers",
        why="PEFT takes every gate_proj of a mixture for fused experts, moves such names to parameters that packed "
        "experts do not have, and what was meant goes without an adapter.",
        door="none",
        since="none",
        rests_on=("peft_config", "model"),
        wrap=_names_kept,
        optional=True,  # from PEFT 0.19 on
    ),
    Patch(
        target="transformers.integrations.peft:convert_peft_config_for_transformers",
        why="The same in Transformers' own loading of adapters.",
        door="none",
        since="none",
        rests_on=("peft_config", "model"),
        wrap=_names_kept,
        optional=True,  # before PEFT did that
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
