"""Through which names forwards find what they call: a function may be put in the place of another while a model trains.

Transformers keeps functions by name (`AttentionInterface.register("sdpa", other)`), and others are replaced where a
module has them (`torch.nn.functional.scaled_dot_product_attention = other`). Neither leaves a trace in a layer.
"""

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_DEPTH = 2  # a forward, what it calls, and what that calls

Place = tuple[dict[str, Any], str]


def called_names(forwards: Iterable[Callable[..., Any]]) -> tuple[Place, ...]:
    """Dictionaries, and names in them, by which these functions find others: of modules, and of registries."""
    places: dict[tuple[int, str], Place] = {}
    known: set[Any] = set()
    waiting: list[Any] = list(forwards)
    for _ in range(_DEPTH):
        functions = [part for function in waiting for part in _with_wrapped(function) if part not in known]
        known.update(functions)
        waiting = []
        for function in functions:
            for space, name in _names(function):
                places[id(space), name] = space, name
                waiting.append(space.get(name))
    return tuple(places.values())


def _with_wrapped(function: Any) -> Iterator[types.FunctionType]:
    """Functions of Python in it: of a method, a partial and behind decorators.

    Types are asked, since objects such as `torch.ops` make an attribute of any name that they are asked for.
    """
    while True:
        if isinstance(function, types.FunctionType):
            yield function
            function = vars(function).get("__wrapped__")
        elif isinstance(function, types.MethodType):
            function = function.__func__
        elif isinstance(function, functools.partial):
            function = function.func
        else:
            return


def _names(function: types.FunctionType) -> Iterator[Place]:
    """What the code of a function names, in its module and in modules and registries that are named there."""
    names = set(_named(function.__code__))
    spaces, seen = [function.__globals__], set()
    while spaces:
        space = spaces.pop()
        if id(space) in seen:
            continue
        seen.add(id(space))
        for name in names & space.keys():
            yield space, name
            value = space[name]
            if isinstance(value, types.ModuleType):
                spaces.append(vars(value))
            elif isinstance(getattr(type(value), "_global_mapping", None), dict):  # of AttentionInterface, say
                mappings = value._global_mapping, value._local_mapping
                yield from ((mapping, key) for mapping in mappings for key in value)


def _named(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a comprehension or a function in it
            yield from _named(constant)
