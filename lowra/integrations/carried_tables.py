"""Whole state dicts of a packed model with adapters bring the adapters' levels and scales, or are refused.

Each packed layer writes and takes its own (`lowra.nn.tables_in_state`). Two things only the model knows: that a model
whose adapters have no tables yet can have some, and that a state dict brings an adapter without those it has here.
"""

from typing import Any

from torch import nn

from ..nn.adapter_tables import adapter_tables, hold_adapter_tables, packed_linears
from ..nn.tables_in_state import KEY
from .adapter_keys import adapters_in


def watch_tables(model: nn.Module) -> None:
    """Has a packed model look at the tables of adapters in what it loads."""
    model.register_load_state_dict_pre_hook(_look_for_tables)


def _look_for_tables(  # noqa: PLR0917 - as PyTorch calls it
    model: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    if any(key.endswith(f".{KEY}") for key in state_dict):
        hold_adapter_tables(model)
    held = adapter_tables(model)
    if held is None or not held.adapters:
        return
    names = {id(module): name for name, module in model.named_modules()}
    for adapter in adapters_in(state_dict, model):
        for layer, module in packed_linears(model).items():
            place = f"{prefix}{names[id(module)]}."
            if (
                held.of_adapter(adapter).get(layer)
                and f"{place}row_bits" in state_dict
                and place + KEY not in state_dict
            ):
                error_msgs.append(
                    f"{place[:-1]}: this state dict was made beside other levels and scales of adapter {adapter!r} "
                    "than this model has, and they are no part of it: load the adapter's folder "
                    "(PeftModel.from_pretrained or load_adapter)."
                )
                return
