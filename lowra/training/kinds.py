"""The kinds that fields of a recipe are of, and the sentence about a value that is not of its kind.

Kinds and ranges are pydantic's to check, field by field, because its error for a whole recipe is a list of lines where
the command line promises one sentence.
"""

from typing import Annotated, Any, Literal

import pydantic

from ..checkpoints.places import expanded
from ..quantization.initial_adapter import MOST_ALPHA, MOST_RANK


def _reject_booleans(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a truth value")  # which pydantic would take for 0 or 1
    return value


def _at_home(path: str) -> str:
    return str(expanded(path)) if path.startswith("~") else path


_NO_BOOLEAN = pydantic.BeforeValidator(_reject_booleans)
_FINITE = pydantic.Field(allow_inf_nan=False)

Truth = Annotated[bool, pydantic.Strict()]
Place = Annotated[str, pydantic.Field(min_length=1), pydantic.AfterValidator(_at_home)]
_MOST = 2**31 - 1  # what Transformers, tokenizers and NumPy count with
Count = Annotated[int, pydantic.Field(gt=0, le=_MOST), _NO_BOOLEAN]
Limit = Annotated[int, pydantic.Field(ge=1, le=_MOST), _NO_BOOLEAN]
Few = Annotated[int, pydantic.Field(gt=0, le=1000), _NO_BOOLEAN]  # more would be a slip of the keyboard, and hours
Processes = Annotated[int, pydantic.Field(ge=0, le=256), _NO_BOOLEAN]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32), _NO_BOOLEAN]  # what NumPy's generators take
Number = Annotated[float, _FINITE, _NO_BOOLEAN]
Rank = Annotated[int, pydantic.Field(gt=0, le=MOST_RANK), _NO_BOOLEAN]
Alpha = Annotated[float, _FINITE, pydantic.Field(gt=0, le=MOST_ALPHA), _NO_BOOLEAN]
Rate = Annotated[float, _FINITE, pydantic.Field(gt=0), _NO_BOOLEAN]  # a run that diverges says so
Passes = Annotated[float, _FINITE, pydantic.Field(gt=0, le=1e6), _NO_BOOLEAN]
RateOr0 = Annotated[float, _FINITE, pydantic.Field(ge=0), _NO_BOOLEAN]
Share = Annotated[float, _FINITE, pydantic.Field(ge=0, lt=1), _NO_BOOLEAN]
WholeShare = Annotated[float, _FINITE, pydantic.Field(ge=0, le=1), _NO_BOOLEAN]
Tables = Literal["auto", "frozen", "shared", "levels", "levels_and_scales"]


def checked(name: str, value: Any, checker: pydantic.TypeAdapter) -> Any:
    """The value as the field's kind; YAML reads 1e-4 as text and 2 as int.

    Raises:
        ValueError: naming the field, what it may be and what came.
    """
    try:
        return checker.validate_python(value)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
    kind, schema = problem["type"], checker.json_schema()
    optional = "anyOf" in schema
    schema = schema["anyOf"][0] if optional else schema
    if kind == "literal_error":
        expected = f"one of {', '.join(schema['enum'])}"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        expected = _range(schema, "greater" in kind) + (", or left out" if optional else "")
    elif kind == "finite_number":
        expected = "a finite number"
    elif kind == "string_too_short":
        expected = "a name or left out"
    elif kind == "value_error" and isinstance(value, str):
        expected = f"a folder or file ({problem['ctx']['error']})"
    else:
        expected = f"of type {_PYTHON_NAMES[schema['type']]}"
    raise ValueError(f"{name} must be {expected}; got {value!r:.200}.")


_PYTHON_NAMES = {"integer": "int", "number": "float", "boolean": "bool", "string": "str"}
_PYTHON_NAMES |= {"object": "dict", "array": "list"}


def _range(schema: dict, is_too_low: bool) -> str:
    """The range of a number in words, of a positive one only the limit that was passed."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if above == 0 and high is not None:
        return "positive" if is_too_low else f"positive and at most {high:g}"
    if below is not None or schema["type"] == "number" and high is not None:
        return f"in [{low}, {high}]" if below is None else f"in [{low}, {below})"
    least = "positive" if above == 0 else "positive or 0" if low == 0 else f"at least {low}"
    return least if high is None else f"{least} and at most {high}"
