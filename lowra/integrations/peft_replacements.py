"""What the functions of PEFT in the table of patches are replaced by.

Each takes the original and hands dense models to it: arguments, results, exceptions and state are the original's own.
"""

import contextlib
import functools
import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.hooks import RemovableHandle

from ..checkpoints.records import BASE_RECORD
from ..nn.adapter_tables import adapter_tables, release_adapter_tables
from ..nn.embedding import LowRAEmbedding
from ..nn.linear import LowRALinear
from ..nn.packed_module import PackedModule
from ..nn.walk import modules_of
from .adapter_places import check_settings, reached
from .adapter_records import (
    UNKNOWN,
    Arriving,
    base_of,
    check_adapter,
    check_saved,
    forget_tables,
    is_packed_base,
    load_checked,
    refuse_inheriting,
    refuse_losing_tables,
    settle,
    tables_set_aside,
    write_record,
    write_records,
)
from .folders import load_adapter_folder
from .loose_factors import (
    already_checked,
    is_checked,
    putting_in,
    read_from,
    refuse_unknown_origin,
    remember_reading,
)
from .missing_start import expect_start, stored_start
from .parameter_counts import uncounted
from .peft import LowRALoraLinear
from .peft_limits import (
    check_experts,
    check_merge,
    check_method,
    is_packed,
    packed_experts,
    refuse_embeddings,
    refuse_saving_parts,
    refuse_training,
)
from .prompt_learning import table_in_sight
from .stored_start import begin_from_start, choose_layers, filled_from_file


def checked_method(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, model: Any, peft_config: Any, adapter_name: Any, *args: Any, **kwargs: Any) -> Any:
        if is_packed(model):
            check_method(self, model, peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config)
        original(self, model, peft_config, adapter_name, *args, **kwargs)

    return __init__


def with_our_layers(original: Callable) -> Callable:
    @functools.wraps(original)
    def inject_adapter(self: Any, model: Any, adapter_name: Any, *args: Any, **kwargs: Any) -> Any:
        if is_packed(model):
            refuse_inheriting(model, adapter_name)
            forget_tables(model, adapter_name)
            config = self.peft_config[adapter_name]
            check_method(self, model, config)
            check_experts(model, config)
            if isinstance(config, LoraConfig):
                ours: dict[Any, Any] = {LowRALinear: LowRALoraLinear, LowRAEmbedding: refuse_embeddings}
                config._register_custom_module(ours)
                choose_layers(model, config)
        original(self, model, adapter_name, *args, **kwargs)
        if is_packed(model) and isinstance(self.peft_config[adapter_name], LoraConfig):
            begin_from_start(model, self.peft_config[adapter_name], adapter_name)

    return inject_adapter


def names_kept(original: Callable) -> Callable:
    @functools.wraps(original)
    def convert_peft_config_for_transformers(peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if packed_experts(model):
            return peft_config
        return original(peft_config, model, *args, **kwargs)

    return convert_peft_config_for_transformers


def checked_merge(original: Callable) -> Callable:
    @functools.wraps(original)
    def _check_merge_allowed(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_merge(self.model)
        return original(self, *args, **kwargs)

    return _check_merge_allowed


def checked_training(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, module_to_save: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(module_to_save, PackedModule):
            refuse_training(type(self).__name__)
        original(self, module_to_save, *args, **kwargs)

    return __init__


def with_records(original: Callable) -> Callable:
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
        if given.arguments["is_main_process"]:
            refuse_saving_parts(self, names, given.arguments["kwargs"].get("state_dict"))
        result = original(self, *args, **kwargs)
        if given.arguments["is_main_process"]:
            write_records(self, pathlib.Path(given.arguments["save_directory"]), names, converted)
        return result

    return save_pretrained


def checked_folder(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        load = functools.partial(original, cls, model, model_id, *args, **kwargs)
        if not is_packed(model):
            return load()
        needs_config = kwargs.get("config") is None and args[2:3] in ((), (None,))
        with reached(model_id, kwargs, needs_config), filled_from_file():
            if needs_config:
                check_settings(model_id, kwargs)
            return load_adapter_folder(load, model_id)

    return from_pretrained


def checked_adapter(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_adapter(
        self: Any, model_id: Any, adapter_name: Any, *args: Any, any_base: bool = False, **kwargs: Any
    ) -> Any:
        load = functools.partial(original, self, model_id, adapter_name, *args, **kwargs)
        with filled_from_file():
            return load_checked(self, model_id, adapter_name, load, kwargs, any_base)

    return load_adapter


def auto_loaded(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(pretrained_model_name_or_path, (str, pathlib.Path)):
            folder = pathlib.Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
            if (folder / BASE_RECORD).is_file():  # an adapter of a packed base
                check_settings(folder, {})
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    return from_pretrained


def counted_by_peft(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_nb_trainable_parameters(self: Any) -> Any:
        trainable, every = original(self)
        return trainable, every + uncounted(self)

    return get_nb_trainable_parameters


def with_packed_table(original: Callable) -> Callable:
    @functools.wraps(original)
    def _setup_prompt_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
        with table_in_sight(self.base_model):
            return original(self, *args, **kwargs)

    return _setup_prompt_encoder


def checked_swap(original: Callable) -> Callable:
    @functools.wraps(original)
    def hotswap_adapter(
        model: Any, model_name_or_path: Any, adapter_name: Any, *args: Any, any_base: bool = False, **kwargs: Any
    ) -> Any:
        inner = getattr(model, "_orig_mod", model)  # of a compiled model
        packed = is_packed_base(inner)
        with reached(model_name_or_path, kwargs, True) if packed else contextlib.nullcontext():
            arriving = check_adapter(inner, model_name_or_path, kwargs, any_base)
            check_saved(model_name_or_path, kwargs, arriving.record)
            with tables_set_aside(inner, adapter_name), already_checked():  # or the swap would refuse to lose them
                original(model, model_name_or_path, adapter_name, *args, **kwargs)
        settle(inner, adapter_name, arriving)

    return hotswap_adapter


def remembered(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_peft_weights(model_id: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = original(model_id, *args, **kwargs)
        remember_reading(model_id, kwargs, tensors)
        return tensors

    return load_peft_weights


def names_alone(original: Callable) -> Callable:
    @functools.wraps(original)
    def _remap_adapter_state_dict_for_load(self: Any, *args: Any, **kwargs: Any) -> Any:
        with putting_in():
            return original(self, *args, **kwargs)

    return _remap_adapter_state_dict_for_load


def swap_without_record(original: Callable) -> Callable:
    @functools.wraps(original)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: Any, adapter_name: Any, *args: Any, **kwargs: Any
    ) -> Any:
        inner = getattr(model, "_orig_mod", model)
        if is_checked():  # hotswap_adapter's own call
            original(model, state_dict, adapter_name, *args, **kwargs)
            return
        source = read_from(state_dict)
        if source is not None:
            arriving = check_adapter(inner, *source, any_base=False)
            check_saved(*source, arriving.record)
            with tables_set_aside(inner, adapter_name):
                original(model, state_dict, adapter_name, *args, **kwargs)
            settle(inner, adapter_name, arriving)
            return
        if is_packed_base(inner):
            refuse_unknown_origin(base_of(inner), adapter_name)
            refuse_losing_tables(inner, [adapter_name], "factors from a state dict")
        with putting_in():
            original(model, state_dict, adapter_name, *args, **kwargs)
        settle(inner, adapter_name, Arriving(UNKNOWN))

    return hotswap_adapter_from_state_dict


def unloaded(original: Callable) -> Callable:
    @functools.wraps(original)
    def _unload_and_optionally_merge(self: Any, merge: Any = True, *args: Any, **kwargs: Any) -> Any:
        if is_packed(self.model):
            if (held := adapter_tables(self.model)) is not None and held.in_training is not None:
                raise ValueError(
                    f"Levels and scales are being trained for adapter {held.in_training!r}: bake_tables(model) comes "
                    "before adapters are merged for good or taken off."
                )
            if merge:
                self._check_merge_allowed()  # before anything is changed
            release_adapter_tables(self.model, kwargs.get("adapter_names") if merge else [])
        unloaded = original(self, merge, *args, **kwargs)
        if not merge and (start := stored_start(self.model)) is not None:
            expect_start(self.model, start)  # which may have been there until now
        return unloaded

    return _unload_and_optionally_merge


def weighted(original: Callable) -> Callable:
    @functools.wraps(original)
    def add_weighted_adapter(self: Any, adapters: Any, *args: Any, **kwargs: Any) -> Any:
        if is_packed(self.model):
            refuse_losing_tables(self.model, adapters, "an adapter made of several")
        return original(self, adapters, *args, **kwargs)

    return add_weighted_adapter


def named_for_a_call(original: Callable) -> Callable:
    @functools.wraps(original)
    def _enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = original(self, *args, **kwargs)
        if kwargs.get("adapter_names") is None and kwargs.get("alora_offsets") is None:
            return hooks
        adapted: Any = next((module for module in self.modules() if isinstance(module, BaseTunerLayer)), None)
        is_packed = adapted is not None and isinstance(adapted.get_base_layer(), PackedModule)
        return _ended_by_errors(self, hooks) if is_packed else hooks

    return _enable_peft_forward_hooks


@contextlib.contextmanager
def _ended_by_errors(tuner: Any, hooks: contextlib.AbstractContextManager) -> Iterator[None]:
    """Enters a context of PEFT's that puts hooks on a tuner's modules, by one walk through these.

    PEFT takes them off where nothing was raised alone; the next call would go by the names of the one that failed.
    """
    every, first = modules_of(tuner), RemovableHandle.next_id
    with contextlib.ExitStack() as entered:
        vars(tuner)["modules"] = lambda: iter(every)
        try:
            entered.enter_context(hooks)
        finally:
            vars(tuner).pop("modules", None)
        numbers = range(first, RemovableHandle.next_id)
        try:
            yield
        except BaseException:
            for module in every:
                for number in [number for number in module._forward_pre_hooks if number in numbers]:
                    del module._forward_pre_hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
            raise


def converted(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _convert_module_to_lora(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        refuse_losing_tables(given.arguments["module"], [given.arguments["adapter_name"]], "a LoRA made of it")
        return original(*args, **kwargs)

    return _convert_module_to_lora


def saved_as_lora(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_as_lora(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        if is_packed_base(given.arguments["model"]):
            name = given.arguments["adapter_name"]
            write_record(given.arguments["model"], pathlib.Path(given.arguments["path"]), name)
        return result

    return save_as_lora
