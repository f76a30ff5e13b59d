"""An adapter trained on a packed base as an adapter for the dense original.

What was learned is the difference of the adapter's product from that of its start: s B A - s0 B0 A0. As one LoRA that
is [B, -B0 s0/s] [A; A0], of the sum of both ranks and the same scaling. It is exact, and tensors are all it takes.
"""

import math
import pathlib

import torch

from ..checkpoints.atomic import save_json, save_tensors, written_beside
from ..checkpoints.companions import companions, copy_companions
from ..checkpoints.configs import require_adapter
from ..checkpoints.guarded import read_json, read_tensors
from ..checkpoints.places import lasting_name
from ..checkpoints.records import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    TABLES_FILE,
    WITHOUT_TABLES,
    check_adapter_folder,
    check_trained,
    digest_of_adapter,
    record_of_folder,
    save_record,
)
from ..quantization.initial_adapter import ADAPTER_FOLDER

_PLAIN = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication", "use_dora")


def export_adapter(adapter: pathlib.Path, initial: pathlib.Path | None, output: pathlib.Path) -> dict:
    """Writes an adapter for the original of a packed base.

    Args:
        adapter: a plain LoRA that was trained on the packed base.
        initial: the initial adapter that it began with; None takes the one beside its base.
        output: folder to create.

    Returns:
        output, base (the original), rank, start.

    Raises:
        FileNotFoundError, ValueError: no such adapter, one of another kind, trained tables, another start.
    """
    settings, record = _read(adapter)
    if (adapter / TABLES_FILE).exists():
        raise ValueError(
            f"{adapter} was trained with levels and scales of its packed base ({TABLES_FILE}), which the original does "
            f"not have: `lowra merge` makes a dense model of both, and {WITHOUT_TABLES}."
        )
    if record.get("fingerprint") is None or record.get("nominal_bits") is None:
        raise ValueError(f"{adapter} was not trained on a packed base, or was converted already: use it as it is.")
    tensors, _ = read_tensors(adapter / ADAPTER_WEIGHTS, "the factors of an adapter")
    check_trained(tensors.items(), adapter)
    whole = [name for name in tensors if ".lora_" not in name]
    if whole and _trained_end_to_end(record):
        raise ValueError(
            f"{adapter} holds {whole[0]}, which was trained with the packed weights of its base before: `lowra merge` "
            "makes a dense model of both."
        )
    start, rank = record.get("init", "lora"), settings["r"]
    if start == "lora" and initial is not None:
        raise ValueError(f"{adapter} started anew, so that nothing is taken off: leave --initial out.")
    if start != "lora":
        if start == "unknown" and initial is None:
            raise ValueError(
                f"Nothing tells what {adapter} began with (its factors came without a folder): give --initial PATH "
                "if it began with an adapter that makes up for the quantisation."
            )
        if initial is None:
            initial = pathlib.Path(str(settings.get("base_model_name_or_path"))) / ADAPTER_FOLDER
        if not (initial / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"There is no {initial}, with which {adapter} began: give --initial PATH.")
        tensors = _less_start(tensors, settings, initial, record)
        rank += read_json(initial / ADAPTER_CONFIG, "an adapter's settings")["r"]
    base = record.get("base")
    exported = {
        **settings,
        "r": rank,
        "lora_alpha": _scaling(settings) * rank,
        "use_rslora": False,
        "base_model_name_or_path": base and lasting_name(base),
        "init_lora_weights": True,
    }
    with written_beside(output) as folder:
        save_tensors(tensors, folder / ADAPTER_WEIGHTS)
        save_json(exported, folder / ADAPTER_CONFIG)
        kept = {"base": record.get("base"), "fingerprint": record["fingerprint"], "converted_from": start}
        save_record(kept, folder)
        copy_companions(adapter, companions(adapter, [folder]), folder)
    return {"output": str(output), "base": record.get("base"), "rank": rank, "start": start}


def _read(adapter: pathlib.Path) -> tuple[dict, dict]:
    """Settings and record of a plain LoRA."""
    require_adapter(adapter)
    check_adapter_folder(adapter)
    settings = read_json(adapter / ADAPTER_CONFIG, "an adapter's settings")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{adapter} is {settings.get('peft_type')}; only LoRA has a difference to its start.")
    record = record_of_folder(adapter)
    if not record:
        raise ValueError(f"{adapter} has no {BASE_RECORD}: it was not trained on a packed base. Use it as it is.")
    special = [name for name in _PLAIN if settings.get(name)]
    if special or settings.get("bias", "none") != "none":
        raise ValueError(
            f"{adapter} has {special[0] if special else 'biases'}, which a difference of factors cannot hold: use "
            f"`lowra merge{'' if _trained_end_to_end(record) else ' --original'}`."
        )
    return settings, record


def _trained_end_to_end(record: dict) -> bool:
    """Whether embeddings and head of the packed base may be others than those of the original."""
    return bool((record.get("recipe") or {}).get("end_to_end"))


def _less_start(tensors: dict, settings: dict, initial: pathlib.Path, record: dict) -> dict:
    """Factors of the difference to the initial adapter."""
    if record.get("start") not in (None, digest_of_adapter(initial / ADAPTER_WEIGHTS)):
        raise ValueError(
            f"{initial} is not what the adapter began with: give the initial_adapter of the packed base "
            f"({record.get('base')}) that it was trained on."
        )
    began, _ = read_tensors(initial / ADAPTER_WEIGHTS, "the factors of the initial adapter")
    of_start = read_json(initial / ADAPTER_CONFIG, "an adapter's settings")
    if tensors.keys() != began.keys():
        raise ValueError(f"{initial} has factors for other layers than the adapter: it is not what that began with.")
    factor = _scaling(of_start) / _scaling(settings)
    joined = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            joined[name] = torch.cat([tensor.float(), began[name].float()], 0)
        elif name.endswith(".lora_B.weight"):
            joined[name] = torch.cat([tensor.float(), began[name].float() * -factor], 1)
        else:
            raise ValueError(f"The adapter has {name}, which is no factor of LoRA: use `lowra merge --original`.")
    return joined


def _scaling(settings: dict) -> float:
    rank = settings["r"]
    return settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
