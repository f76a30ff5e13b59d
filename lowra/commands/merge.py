"""`lowra merge`: a packed base and its adapter to a plain dense checkpoint."""

import argparse
import pathlib
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..adapters.storage import PACKED_FILE
from ..checkpoints.atomic import written_beside
from ..checkpoints.companions import companions, copy_companions, with_tokenizer
from ..checkpoints.configs import require_adapter
from ..checkpoints.dense import empty_model, read_config
from ..checkpoints.guarded import read_json
from ..checkpoints.hub import local_folder, resolve_folder
from ..checkpoints.places import expanded
from ..checkpoints.records import ADAPTER_CONFIG, TABLES_FILE, WITHOUT_TABLES
from ..device import choose_device
from ..integrations.adapter_records import record_of
from ..integrations.missing_start import stored_start
from ..integrations.peft import merge_into_dense, refuse_packed_original
from ..quantization.initial_adapter import ADAPTER_FOLDER


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError, ValueError: no packed base, an adapter of another one, a base without the adapter that holds
            a part of it, weights that are not finite.
    """
    base, adapter = _places(args)
    _check_original(args.original, adapter)
    with written_beside(args.output) as folder:
        model = _load(base, choose_device(args.device), args.trust_remote_code)
        merged = _merged(model, base, adapter, args)
        _check_finite(merged)
        merged.save_pretrained(folder)
        for source in filter(None, (with_tokenizer(adapter), base)):
            copy_companions(source, companions(source, [folder]), folder)
    parameters = merged.num_parameters()
    print(f"{args.output}: {parameters:,} parameters in {_dtype(merged)}, which need no lowra")
    return {
        "output": str(args.output),
        "base": str(base),
        "adapter": None if adapter is None else str(adapter),
        "original": args.original,
        "parameters": parameters,
        "dtype": _dtype(merged),
    }


def _places(args: argparse.Namespace) -> tuple[pathlib.Path, pathlib.Path | None]:
    """Folders of base and adapter."""
    given = expanded(args.model)
    adapter = None if args.adapter is None else expanded(args.adapter)
    if (given / ADAPTER_CONFIG).is_file() and not (given / "config.json").is_file():
        if adapter is not None:
            raise ValueError(f"{given} is an adapter itself: give its packed base, or leave --adapter out.")
        name = read_json(given / ADAPTER_CONFIG, "an adapter's settings").get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{given} does not say which base it belongs to: lowra merge BASE --adapter {given}.")
        try:
            return resolve_folder(str(name)), given
        except (OSError, ValueError) as error:  # most often its base has been moved since
            raise FileNotFoundError(
                f"The base that {given} names is not there ({str(error).rstrip('.')}): give the folder where it is "
                f"now, lowra merge BASE --adapter {given}."
            ) from error
    for folder in filter(None, (given, adapter)):
        if (folder / PACKED_FILE).is_file():
            raise ValueError(f"{folder} is a packed adapter, which does not merge: give the one that it was made from.")
    if adapter is not None:
        require_adapter(adapter)
    return resolve_folder(args.model), adapter


def _check_original(original: str | None, adapter: pathlib.Path | None) -> None:
    """Raises FileNotFoundError or ValueError where there is nothing to merge into what --original names."""
    if original is None:
        return
    if adapter is None:
        raise ValueError("Without an adapter there is nothing to put onto the original: give --adapter.")
    folder = local_folder(original)
    if folder is not None:
        refuse_packed_original(folder)
    if (adapter / TABLES_FILE).exists():
        raise ValueError(
            f"{adapter} was trained with levels and scales of its packed base ({TABLES_FILE}), which the original does "
            f"not have: leave --original out, which merges into the packed base; {WITHOUT_TABLES}."
        )


def _load(base: pathlib.Path, device: torch.device, trust_remote_code: bool) -> Any:
    described = getattr(read_config(base, trust_remote_code), "quantization_config", None)
    method = described.get("quant_method") if isinstance(described, dict) else getattr(described, "quant_method", None)
    if method != "lowra":
        raise ValueError(
            f"{base} is no packed base of lowra: merge adapters of dense models in PEFT (merge_and_unload)."
        )
    architecture: Any = type(empty_model(base, trust_remote_code))
    return architecture.from_pretrained(base, dtype="auto", device_map={"": device})


def _merged(model: Any, base: pathlib.Path, adapter: pathlib.Path | None, args: argparse.Namespace) -> PreTrainedModel:
    if adapter is not None:
        adapted: Any = PeftModel.from_pretrained(model, adapter)
        began = record_of(adapted, "default").get("init")
        if args.original is not None and began == "unknown":
            raise ValueError(
                f"Nothing tells what {adapter} began with, since its factors came without a folder, and what makes up "
                "for the quantisation does not belong on the original: leave --original out, or in Python give "
                "lowra.merge_into_dense(initial=)."
            )
        initial = base / ADAPTER_FOLDER if args.original is not None and began not in (None, "lora") else None
        return merge_into_dense(adapted, args.original, initial, trust_remote_code=args.trust_remote_code)
    start = stored_start(model)
    if start is not None:
        raise ValueError(
            f"{base} was packed together with an initial adapter ({start.what}) that holds a part of its weights: give "
            f"--adapter {start.folder}, or one trained from it."
        )
    return model.dequantize()


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"{name} is not finite once merged: the adapter diverged in training.")


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
