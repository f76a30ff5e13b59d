"""Labels of packed adapters: what an adapter is, what base it belongs to, and when it must not be loaded.

A label is a record, not a signature: the hash shows that bytes have changed since packing, by accident or by a careless
edit. Someone who can rewrite the adapter can rewrite its label too.
"""

import datetime
import hashlib
import warnings
from typing import NamedTuple

import torch
from torch import nn

from ..checkpoints.records import differences, record_of_base
from ..config import LowRAConfig
from ..integrations.adapter_keys import base_name
from ..integrations.integrity import describe_again
from .storage import PackedAdapter

LABEL_FORMAT = 1
SAMPLE = 4096  # numbers of each parameter that go into a fingerprint


class LabelError(ValueError):
    """A packed adapter must not be loaded; the message gives every reason."""


def _quantization_config(model: nn.Module) -> dict:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return {}
    return dict(config) if isinstance(config, dict) else dict(config.to_dict())


def _method_name(quantization: dict) -> str:
    method = quantization.get("quant_method", "")
    return str(getattr(method, "value", method))


def base_fingerprint(model: nn.Module) -> str:
    """Fingerprint of a base model, the same before and after PEFT wraps it.

    A base quantised by lowra carries its own in `config.quantization_config`. For any other base it is the sha256
    over name, shape, type and up to 4096 evenly spaced numbers of every parameter that is not an adapter's, in order
    of name. The type counts: the same checkpoint loaded in another precision is another base, since its outputs
    differ.

    Raises:
        ValueError: parameters are on the meta device and have no bytes.
    """
    quantization = _quantization_config(model)
    if _method_name(quantization) == "lowra" and quantization.get("fingerprint"):
        return str(quantization["fingerprint"])
    named = {base: p for name, p in model.named_parameters() if (base := base_name(name)) is not None}
    hasher = hashlib.sha256()
    for name in sorted(named):
        weight = named[name].detach()
        if weight.is_meta:
            raise ValueError(f"Parameter {name} is on the meta device; expected loaded weights. Load the model first.")
        flat = weight.reshape(-1)
        count = min(SAMPLE, flat.numel())
        places = torch.arange(count, device=flat.device) * flat.numel() // max(1, count)
        hasher.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        hasher.update(flat[places].contiguous().view(torch.uint8).cpu().numpy().data)
    return hasher.hexdigest()


def base_quantization(model: nn.Module) -> str:
    """How the base is stored, in words that differ wherever two bases of the same weights differ.

    Such as "lowra 2.0 bits, 2.2506 stored, learned codebook, layer sensitivity", "bitsandbytes" or "none (bfloat16)".
    """
    quantization = _quantization_config(model)
    if not quantization:
        return f"none ({str(next(model.parameters()).dtype).removeprefix('torch.')})"
    method = _method_name(quantization)
    if method != "lowra":
        return method
    words = [f"lowra {quantization.get('bits')} bits"]
    if quantization.get("true_bits") is not None:
        words.append(f"{quantization['true_bits']:.4f} stored")
    words += [f"{quantization[key]} {key}" for key in ("codebook", "sensitivity") if quantization.get(key)]
    return ", ".join(words)


class BaseIdentity(NamedTuple):
    """What tells one base from another.

    The fingerprint that a base quantised by lowra carries is that of the weights it was made from, so the same model at
    2 and at 1.5 bits has one fingerprint, and only the quantisation tells the two apart. Two packings of the same bits
    are told apart by the digests in `packing`, and `recipe` says what differs; None for bases of another kind.
    """

    fingerprint: str
    quantization: str
    packing: dict | None = None
    recipe: dict | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "BaseIdentity":
        config = getattr(getattr(model, "config", None), "quantization_config", None)
        describe_again(model)
        record = record_of_base(config) if isinstance(config, LowRAConfig) else {}
        return cls(base_fingerprint(model), base_quantization(model), record.get("packing"), record.get("recipe"))


def parse_retirement(date: str) -> str:
    """Checks a date of retirement, YYYY-MM-DD; raises ValueError otherwise."""
    try:
        return datetime.date.fromisoformat(date).isoformat()
    except (TypeError, ValueError) as error:
        raise ValueError(f"Retirement date {date!r} is no date; expected YYYY-MM-DD, such as 2027-12-31.") from error


def check_retirement(date: str) -> None:
    """Raises ValueError for what is no date of retirement, and for one that is past: nobody could load the adapter."""
    if datetime.date.fromisoformat(parse_retirement(date)) < _today():
        raise ValueError(f"Retirement date {date} is past: nobody could load the adapter. Give a later one, or none.")


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.timezone.utc).date()


def make_label(
    packed: PackedAdapter,
    *,
    base_name: str | None = None,
    base: nn.Module | None = None,
    task: str | None = None,
    training_data: str | None = None,
    evaluation: dict[str, str] | None = None,
    licence: str | None = None,
    retire: str | None = None,
) -> dict:
    """Label of a packed adapter; fields not given are recorded as null, and a null fingerprint fits no base."""
    return {
        "format": LABEL_FORMAT,
        "base": {"name": base_name, **_of_base(base)},
        "task": task,
        "training_data": training_data,
        "evaluation": evaluation or {},
        "licence": licence,
        "retire": None if retire is None else parse_retirement(retire),
        "method": packed.method,
        "average_bits": packed.average_bits,
        "parameters": packed.parameters,
    }


def _of_base(base: nn.Module | None) -> dict:
    """What a label says of the base; packing and recipe only of one that has them."""
    if base is None:
        return {"fingerprint": None, "quantization": None}
    return {name: value for name, value in BaseIdentity.of(base)._asdict().items() if value is not None}


def bytes_problem(packed: PackedAdapter) -> str | None:
    """Why the bytes are not those that were packed; None if they are."""
    recorded, found = packed.label.get("sha256"), packed.sha256
    if recorded == found:
        return None
    return f"its bytes have changed: the label says sha256 {str(recorded)[:16]}, the tensors give {found[:16]}"


def retirement_problem(label: dict, today: datetime.date | None = None) -> str | None:
    """Why the date forbids loading; None if it does not. The day of retirement itself is the last good one, in UTC."""
    retire = label.get("retire")
    if retire is None:
        return None
    today = today or _today()
    if today <= datetime.date.fromisoformat(parse_retirement(retire)):
        return None
    return f"it was retired on {retire} and today is {today}"


def base_problem(label: dict, base: BaseIdentity) -> str | None:
    """Why the adapter does not belong on this base; None if it does."""
    recorded = label.get("base") or {}
    if not isinstance(recorded, dict) or not isinstance(recorded.get("packing") or {}, dict):
        return "its label is damaged: what it says of the base is no record"
    fingerprint, quantization = recorded.get("fingerprint"), recorded.get("quantization")
    if fingerprint is None:
        return "its label names no base fingerprint, so nothing says that it belongs on this base"
    if (fingerprint, quantization) == (base.fingerprint, base.quantization):
        difference = differences(recorded, base._asdict())
        return None if difference is None else f"it was trained on another packing of this base: {difference}"
    return (
        f"it was trained on another base: {recorded.get('name')}, {quantization}, fingerprint {str(fingerprint)[:16]}; "
        f"this base is {base.quantization}, fingerprint {base.fingerprint[:16]}"
    )


def check_label(packed: PackedAdapter, base: BaseIdentity, source: str, force: bool = False) -> None:
    """Refuses an adapter for another base, past its retirement or with changed bytes.

    Args:
        base: what it is to be loaded on.
        source: what the message calls the adapter.
        force: load all the same, with a warning that gives the reasons.

    Raises:
        LabelError: with every reason found.
    """
    problems = [bytes_problem(packed), retirement_problem(packed.label), base_problem(packed.label, base)]
    reasons = [problem for problem in problems if problem]
    if not reasons:
        return
    message = f"Adapter {source} must not be loaded: {'; '.join(reasons)}."
    if not force:
        raise LabelError(
            f"{message} Use an adapter made for this base, or load it all the same with force=True (on the command "
            "line --force)."
        )
    warnings.warn(f"Forced. {message}", stacklevel=3)
