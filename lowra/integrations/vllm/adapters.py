"""LoRA adapters that vLLM loads on a packed base: held against their record before they answer anybody.

vLLM knows nothing of the packing that an adapter was trained on, and loads any that has the right shapes.
"""

import logging
import pathlib
from types import SimpleNamespace

from ...checkpoints.records import (
    ADAPTER_CONFIG,
    TABLES_FILE,
    WITHOUT_TABLES,
    check_adapter_folder,
    record_of_folder,
)
from ...config import LowRAConfig
from ..adapter_records import check_base, warn_of_unknown_start

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
            "all requests with those of the base: `lowra merge` makes a dense model of both, `lowra generate`, `lowra "
            f"chat` and Transformers take it as it is, and {WITHOUT_TABLES}."
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
