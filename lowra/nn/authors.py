"""Who wrote a function, and what it names: a decorator gives a function the name and the module of another.

What computes in the place of a module's forward has to know that the forward is the one it stands for.
"""

import functools
import types
from typing import Any

from torch.nn import functional


def parts_of(function: Any) -> list[Any]:
    """A function and those that it is put around, the innermost last: of decorators, bound methods and partials."""
    found: list[Any] = []
    while function is not None and not any(function is part for part in found):
        found.append(function)
        inner = function.func if isinstance(function, functools.partial) else getattr(function, "__func__", None)
        function = inner if inner is not None else getattr(function, "__wrapped__", None)
    return found


def home_of(function: Any) -> str:
    """The module in which a function was written, whatever it says of itself; of another object that of its class."""
    if isinstance(function, types.MethodType):
        function = function.__func__
    if isinstance(function, types.FunctionType):
        return str(function.__globals__.get("__name__", ""))
    if isinstance(function, types.BuiltinFunctionType):
        return str(function.__module__)
    return str(function.__module__ if isinstance(function, type) else type(function).__module__)


def is_by(function: Any, homes: str | tuple[str, ...]) -> bool:
    """Whether all that a function is made of was written in modules whose names begin so."""
    return all(home_of(part).startswith(homes) for part in parts_of(function))


def names_in(function: Any) -> frozenset[str]:
    """All names and strings in the code of the innermost of a function: what is not there it does not read."""
    code = getattr(parts_of(function)[-1], "__code__", None)
    return frozenset() if code is None else _names_in(code)


@functools.lru_cache(512)
def _names_in(code: types.CodeType) -> frozenset[str]:
    found = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names_in(constant)
    return frozenset(found)


def called_by(function: Any) -> list[Any]:
    """A function's own parts, and all functions and classes that it calls by names of its module or of torch's."""
    found: dict[int, Any] = {}
    waiting = parts_of(function)
    own: dict[str, Any] = getattr(waiting[-1], "__globals__", {})
    while waiting:
        part = waiting.pop()
        if id(part) in found:
            continue
        found[id(part)] = part
        if getattr(part, "__globals__", None) is own:
            names = names_in(part)
            named = [*map(own.get, names), *map(vars(functional).get, names)]  # by whatever name functions of torch go
            waiting += (
                each for value in named if isinstance(value, types.FunctionType | type) for each in parts_of(value)
            )
    return list(found.values())
