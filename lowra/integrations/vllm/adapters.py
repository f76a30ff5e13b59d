"""LoRA adapters that vLLM loads on a packed base: held against their record before they answer anybody.

vLLM knows nothing of the packing that an adapter was trained on, and loads any that has the right shapes.
"""

import functools
import logging
import pathlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ...checkpoints.records import (
    ADAPTER_CONFIG,
    TABLES_FILE,
    check_adapter_folder,
    record_of_folder,
)
from ...config import LowRAConfig
from ..adapter_records import check_base, warn_of_unknown_start
from ..patching import Patch

logger = logging.getLogger(__name__)


def check_adapter_for(folder: pathlib.Path, config: LowRAConfig) -> None:
    """
    Args:
        folder: of the adapter.
        config: of the packed base that is served.

    Raises:
        OSError, ValueError: the adapter belongs to another base or another packing, is damaged, or has trained tables.
    """
    record = record_of_folder(folder)
    if (folder / TABLES_FILE).exists() or TABLES_FILE in (record.get("files") or {}):
        raise ValueError(
            f"The adapter {folder} was trained with levels and scales of its own ({TABLES_FILE}), and vLLM computes "
            "all requests with those of the base: `lowra merge` makes a dense model of both, and `lowra generate`, "
            "`lowra chat` and Transformers take it as it is."
        )
    if record:
        base = SimpleNamespace(config=SimpleNamespace(quantization_config=config))
        check_base(record, base, folder, "Serve its own base.")
    elif config.initial_adapter is not None:
        warn_of_unknown_start(folder)
    _, changes = check_adapter_folder(folder)
    if changes:
        logger.warning(
            "lowra: %s of %s was changed after the adapter was saved: %s.", ADAPTER_CONFIG, folder, "; ".join(changes)
        )


def _checked(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        from vllm.lora.utils import get_adapter_absolute_path

        config = _config_of(self._adapter_manager.model)
        if config is not None:
            folder = pathlib.Path(get_adapter_absolute_path(lora_request.lora_path))
            if folder.is_dir():  # vLLM says what is missing
                check_adapter_for(folder, config)
        return original(self, lora_request)

    return load_adapter


def _config_of(model: Any) -> LowRAConfig | None:
    """Of the packing of vLLM's model; None for one that is not packed."""
    from .layers import PackedLinearMethod

    methods = (getattr(module, "quant_method", None) for module in model.modules())
    return next((method.config.config for method in methods if isinstance(method, PackedLinearMethod)), None)


PATCH = Patch(
    target="vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
    why="An adapter of another packing, or one that is damaged, answers as if nothing were wrong.",
    door="a check of adapters that a quantisation method may bring",
    since="none",
    rests_on=("lora_request",),
    also={"vllm.lora.utils:get_adapter_absolute_path": ("lora_path",)},
    wrap=_checked,
)
