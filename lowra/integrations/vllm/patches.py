"""Where vLLM does something else for packed models, as in the table of `lowra.integrations.patches`."""

import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

from ..patching import Patch
from .adapters import check_adapter_for


def _checked(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        from vllm.lora.utils import get_adapter_absolute_path

        from .layers import PackedLinearMethod

        methods = (getattr(module, "quant_method", None) for module in self._adapter_manager.model.modules())
        method = next((method for method in methods if isinstance(method, PackedLinearMethod)), None)
        if method is not None:
            folder = pathlib.Path(get_adapter_absolute_path(lora_request.lora_path))
            if folder.is_dir():  # otherwise vLLM says what is missing
                check_adapter_for(folder, method.config.config)
        return original(self, lora_request)

    return load_adapter


def _told(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config_or_none

        from .config import PackedConfig

        given = signature.bind(*args, **kwargs)
        current = get_current_vllm_config_or_none()
        method = None if current is None else current.quant_config
        if given.arguments.get("quant_config") is None and isinstance(method, PackedConfig):
            given.arguments["quant_config"] = method
        original(*given.args, **given.kwargs)

    return init


PATCHES = (
    Patch(
        target="vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
        why="An adapter of another packing, or one that is damaged, answers as if nothing were wrong.",
        door="a check of adapters that a quantisation method may bring",
        since="none",
        rests_on=("lora_request",),
        also={"vllm.lora.utils:get_adapter_absolute_path": ("lora_path",)},
        wrap=_checked,
    ),
    Patch(
        target="vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.__init__",
        why="Gemma and others do not tell their embeddings how the model is quantised, and cannot load packed ones.",
        door="`quant_config` for the embeddings of every architecture, as LLaMA's and Qwen's have it",
        since="none",
        rests_on=("quant_config", "prefix"),
        also={"vllm.config:get_current_vllm_config_or_none": ()},
        wrap=_told,
    ),
)
