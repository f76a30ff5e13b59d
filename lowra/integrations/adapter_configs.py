"""adapter_config.json held against the fields of PEFT's own config classes, before PEFT meets what does not fit.

PEFT takes what stands there as it comes: a list in the place of a rank ends in a TypeError of whatever line divides it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import reprlib
import typing
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from ..checkpoints.guarded import read_json
from ..quantization.initial_adapter import MOST_RANK

if typing.TYPE_CHECKING:
    import pydantic  # otherwise where it is used: it is 1 % of the time of `import lowra`

_MOST = (2 - 2**-23) * 2.0**127


def check_adapter_config(path: pathlib.Path) -> None:
    """
    Raises:
        OSError, ValueError: no JSON object, a method that PEFT does not have, or a value that a field does not take.
    """
    content = read_json(path, "the configuration of a PEFT adapter")
    method = content.get("peft_type")
    if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{path}: peft_type is {reprlib.repr(method)}, and PEFT has no such method.")
    by_name: dict[Any, Any] = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    kind = by_name[method]
    fields, kinds = {field.name: field.default for field in dataclasses.fields(kind)}, _kinds_of(kind)
    for name, value in content.items():
        default = fields.get(name)
        if name == "init_lora_weights" and isinstance(value, str):
            fits = True  # PEFT takes patterns there too, such as pissa_niter_16
        elif value is not None and _is_number(default):
            whole = isinstance(default, int) and name != "lora_alpha" and _can_be_computed_with(value)
            fits = _is_number(value) and (not whole or value == int(value))
        else:
            # PEFT leaves fields at None that it declares as numbers
            fits = name not in kinds or value is default is None or _fits(kinds[name], value)
        if not (fits and _can_be_computed_with(value, MOST_RANK if name in ("r", "rank_pattern") else _MOST)):
            raise ValueError(f"{path}: {name} is {reprlib.repr(value)}, which {kind.__name__} does not take.")


@functools.cache
def _kinds_of(kind: type) -> dict[str, pydantic.TypeAdapter]:
    """By field, what values it takes; fields whose annotations cannot be read take all."""
    import pydantic

    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):  # names that are imported for a type checker only
        return {}
    kinds = {}
    for field in dataclasses.fields(kind):
        try:
            kinds[field.name] = pydantic.TypeAdapter(hints[field.name])
        except pydantic.errors.PydanticUserError:  # of classes that pydantic does not know
            continue
    return kinds


def _fits(kind: pydantic.TypeAdapter, value: object) -> bool:
    import pydantic

    try:
        kind.validate_python(value, strict=isinstance(value, (str, int, float)))
    except pydantic.ValidationError:
        return False
    return True


def _can_be_computed_with(value: object, most: float = _MOST) -> bool:
    """Whether no number in a value is larger than that; by default than float32 holds, in which factors are scaled.

    Integers of JSON have no end, and other functions than comparisons fail on them.
    """
    if isinstance(value, (dict, list)):
        inner = value.values() if isinstance(value, dict) else value
        return all(_can_be_computed_with(one, most) for one in inner)
    return not _is_number(value) or abs(typing.cast(float, value)) <= most


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
