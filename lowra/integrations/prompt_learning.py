"""PEFT's prompt methods (prompt tuning, prefix tuning, P-tuning and others) on packed embeddings."""

import contextlib
from collections.abc import Iterator

from torch import nn

from ..nn.embedding import LowRAEmbedding

_PLACE = "embeddings"  # PEFT looks for "embeddings.word_embeddings" before it looks at shapes


@contextlib.contextmanager
def table_in_sight(model: nn.Module) -> Iterator[None]:
    """Within the block PEFT finds packed embeddings, which it otherwise seeks by the shape [vocabulary, ...]."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(table, LowRAEmbedding) or _PLACE in model._modules:
        yield
        return
    model._modules[_PLACE] = nn.ModuleDict({"word_embeddings": table})
    try:
        yield
    finally:
        del model._modules[_PLACE]
