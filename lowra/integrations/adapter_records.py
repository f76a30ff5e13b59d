"""Whose base an adapter belongs to: the record beside it, and adapters that are refused when they are loaded.

The record is a file of its own, because adapter_config.json takes no new keys.
"""

import contextlib
import functools
import json
import pathlib

from peft import PeftModel, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import cached_file

from ..checkpoints.atomic import save_json
from ..checkpoints.dense import count_and_names
from ..checkpoints.reading import stored_tensors
from ..quantization.initial_adapter import BASE_RECORD


def packing(model: PreTrainedModel, name: str):
    """`fingerprint` or another attribute of a packed base's LowRAConfig; None where the base is not packed."""
    return getattr(getattr(getattr(model, "config", None), "quantization_config", None), name, None)


def records(model: PeftModel) -> dict[str, dict]:
    """What is known of the start of each loaded adapter: the content of its record."""
    return model.__dict__.setdefault("_lowra_records", {})


def check_fingerprint(found: str | None, base: PreTrainedModel, what: str, remedy: str) -> None:
    """Raises ValueError where a fingerprint is not that of the packed base."""
    expected = packing(base, "fingerprint")
    if found and expected and found != expected:
        raise ValueError(
            f"{what} belongs to another base: its fingerprint is {found[:16]}…, this model was packed from "
            f"{packing(base, 'base')} with fingerprint {expected[:16]}…. {remedy}"
        )


def _check_base(record: dict, base: PreTrainedModel, adapter: str) -> None:
    """
    Raises:
        ValueError: the adapter belongs to another base, to one of other bits, or to a packed one where this is dense.
    """
    remedy = "Load its own base, or pass any_base=True."
    check_fingerprint(record.get("fingerprint"), base, f"The adapter {adapter}", remedy)
    bits, here = record.get("nominal_bits"), packing(base, "nominal_bits")
    if bits and here and bits != here:
        raise ValueError(
            f"The adapter {adapter} was trained on the same base at {bits:.4f} nominal bits, this model has "
            f"{here:.4f}: an adapter also makes up for the errors of its own packing. {remedy}"
        )
    if bits and here is None and record.get("init") not in (None, "lora"):
        raise ValueError(
            f"The adapter {adapter} began as {record['init']} on {record.get('base')} at {bits:.4f} nominal bits: part "
            "of it makes up for the quantisation, and this model is dense. Load its packed base, or pass any_base=True "
            "for the same base dequantised."
        )


def _check_file(adapter: str | pathlib.Path, subfolder: str | None) -> None:
    """
    Raises:
        FileNotFoundError: a local folder with an adapter's configuration and no weights.
        ValueError: weights that are cut short.
    """
    folder = pathlib.Path(adapter) / (subfolder or "")
    if not (folder / "adapter_config.json").is_file():
        return  # on the hub, or PEFT says what is missing
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if weights.is_file():
        stored_tensors(weights)
    elif not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{folder} has an adapter_config.json and no {SAFETENSORS_WEIGHTS_NAME}.")


def _check_fit(loaded, adapter: str | pathlib.Path) -> None:
    """Raises ValueError for tensors that a LoRA lacks or has too many of; PEFT warns of the former only."""
    for keys, what in ((loaded.missing_keys, "lacks"), (loaded.unexpected_keys, "holds, without a place for them,")):
        if keys:
            raise ValueError(
                f"The adapter {adapter} {what} {count_and_names(keys)}. It is damaged, or its config was changed."
            )


def _read_record(adapter: str | pathlib.Path, subfolder: str | None) -> dict:
    """The record of a local or hub adapter; empty where it has none.

    Raises:
        ValueError: a record that is not JSON.
    """
    with contextlib.suppress(OSError):  # a hub that cannot be reached; PEFT says so better
        path = cached_file(
            str(adapter),
            BASE_RECORD,
            subfolder=subfolder or "",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            try:
                return json.loads(pathlib.Path(path).read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is damaged: {error}.") from None
    return {}


def _keep_records() -> None:
    """Lets `PeftModel` write a record beside every adapter on a packed base, and check it and the adapter's tensors."""
    save, load = PeftModel.save_pretrained, PeftModel.load_adapter

    @functools.wraps(save)
    def save_pretrained(self, save_directory, *args, **kwargs):
        save(self, save_directory, *args, **kwargs)
        base = self.get_base_model()
        if packing(base, "fingerprint") is None or not kwargs.get("is_main_process", True):
            return
        here = {name: packing(base, name) for name in ("base", "nominal_bits", "fingerprint")}
        for name in kwargs.get("selected_adapters") or list(self.peft_config):
            folder = pathlib.Path(save_directory) / ("" if name == "default" else name)
            save_json({**records(self).get(name, {}), **here}, folder / BASE_RECORD)

    @functools.wraps(load)
    def load_adapter(self, model_id, adapter_name, *args, any_base: bool = False, **kwargs):
        subfolder = kwargs.get("subfolder")
        record, base = _read_record(model_id, subfolder), self.get_base_model()
        if not any_base:
            _check_base(record, base, model_id)
        if not record and packing(base, "fingerprint") is None:
            return load(self, model_id, adapter_name, *args, **kwargs)
        _check_file(model_id, subfolder)
        try:
            loaded = load(self, model_id, adapter_name, *args, **kwargs)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(f"The adapter {model_id} does not fit this model: {error}") from error
        if self.peft_config[adapter_name].peft_type == PeftType.LORA:  # others share tensors, or keep them elsewhere
            _check_fit(loaded, model_id)
        records(self)[adapter_name] = record
        return loaded

    PeftModel.save_pretrained, PeftModel.load_adapter = save_pretrained, load_adapter


def _check_adapters_of_transformers() -> None:
    """`model.load_adapter` of Transformers goes past `PeftModel`."""
    load = PeftAdapterMixin.load_adapter

    @functools.wraps(load)
    def load_adapter(self, peft_model_id=None, *args, any_base: bool = False, **kwargs):
        if peft_model_id is not None and not any_base:
            _check_base(
                _read_record(peft_model_id, (kwargs.get("adapter_kwargs") or {}).get("subfolder")), self, peft_model_id
            )
        return load(self, peft_model_id, *args, **kwargs)

    PeftAdapterMixin.load_adapter = load_adapter


_keep_records()
_check_adapters_of_transformers()
