"""Layers whose input a model casts to the dtype of their weight: of packed weights that is a byte's.

`self.proj(x.to(self.proj.weight.dtype))` stands in the indexers of sparse attention (DeepSeek V3.2, GLM 5), before the
head of Mamba, and in T5, whose kind is mended when it is loaded. Nothing of it shows but in the code of a forward.
"""

import dis
import functools
import inspect
from collections.abc import Callable

from torch import nn

_CAST = ("to", "self", None, "weight", "dtype")  # names in their order in the code; None is the layer's


def cast_layers(model: nn.Module) -> set[str]:
    """Names of the layers of a model that have to stay dense for this."""
    return {
        f"{name}.{layer}".lstrip(".")
        for name, module in model.named_modules()
        if not is_mended(module)
        for layer in _layers_cast_to(inspect.unwrap(type(module).forward))
    }


def is_mended(module: nn.Module) -> bool:
    """Whether the module is T5's feed-forward part, or of its kin, which gets a forward without the cast."""
    return type(module).__name__.endswith(("DenseActDense", "DenseGatedActDense")) and hasattr(module, "wo")


@functools.cache
def _layers_cast_to(forward: Callable) -> frozenset[str]:
    code = getattr(forward, "__code__", None)
    if code is None or "uint8" in code.co_names:  # one that knows of bytes does not cast to them
        return frozenset()
    names = [instruction.argval for instruction in dis.get_instructions(code)]
    names = [name for name in names if isinstance(name, str)]
    windows = zip(*(names[first:] for first in range(len(_CAST))), strict=False)
    return frozenset(window[2] for window in windows if window == (*_CAST[:2], window[2], *_CAST[3:]))
