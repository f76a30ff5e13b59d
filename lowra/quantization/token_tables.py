"""Embeddings and output head while they are trained: they stay in 16 bits, and make up for what codes lose.

They take part in the type that they are stored in, so that what was trained is what is stored.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from .block_training import RATES
from .trained_weight import AsStored


def token_tables(model: PreTrainedModel) -> list[str]:
    """Names of the embeddings and of the output head in a model; one where they are tied."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {id(module.weight) for module in modules if module is not None}
    return [name for name, parameter in model.named_parameters() if id(parameter) in tables]


class TokenTables:
    """Tables [vocabulary, hidden] by name.

    Attributes:
        now: what is trained of each, float32.
    """

    def __init__(self, tables: Mapping[str, torch.Tensor], stored_as: Mapping[str, torch.dtype]):
        """
        Args:
            tables: float32.
            stored_as: the type of each in the checkpoint.
        """
        self._stored_as = stored_as
        self.now = {name: tables[name].detach().clone().requires_grad_() for name in stored_as}

    def __call__(self) -> dict[str, torch.Tensor]:
        """float32, in the values that are stored."""
        return {name: AsStored.apply(table, self._stored(name).float()) for name, table in self.now.items()}

    def rates(self, share: float) -> dict[str, torch.Tensor]:
        """A share of the rate of codes, over the root mean square of each table."""
        return {name: share * RATES["dense"] * now.detach().square().mean().sqrt() for name, now in self.now.items()}

    def stored(self) -> dict[str, torch.Tensor]:
        """As they are now, in the checkpoint's type."""
        return {name: self._stored(name) for name in self.now}

    def _stored(self, name: str) -> torch.Tensor:
        return self.now[name].detach().to(self._stored_as[name])
