"""The output head and its loss by parts of the tokens: the logits of a whole batch are never held.

A vocabulary of 128,256 makes half a megabyte of float32 logits for each token, and a backward pass holds them three
times; that, and not the base, is what limits a context. Within `active()` the head hands on the hidden states, and the
model's loss is computed from them, some tokens at a time: tokens with an ignored label never reach the head, the others
pass through it once more in the backward pass. The values are those of Transformers' own loss up to the order of a sum.

Some models change the logits between head and loss (Gemma 2 caps them, Granite scales them). That cannot be seen in the
configuration, but the loss is then not given the very tensor that the head returned: a probe asks once, and each step
again. Such models keep their whole logits.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from ..nn.row_layout import is_sharded
from .data import IGNORED


class _LogitsChanged(RuntimeError):
    """Between head and loss."""


logger = logging.getLogger(__name__)

_LOGITS = 1 << 24  # at a time: 64 MiB in float32


class HeadByParts:
    """The head of a causal language model, applied when its loss is computed.

    Args:
        model: a Transformers model whose `loss_function` can be set.
    """

    def __init__(self, model: Any):
        self.model = model
        self.head: Any = model.get_output_embeddings()
        self._hidden: torch.Tensor | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within, a forward pass gives hidden states in place of logits, and its loss is `self.loss`."""
        places: tuple[tuple[Any, str, Any], ...] = (
            (self.head, "forward", self._hand_on),
            (self.model, "_loss_function", self.loss),
        )
        before = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
        for owner, name, value in places:
            vars(owner)[name] = value
        try:
            yield
        finally:
            self._hidden = None
            for owner, name, value in before:
                vars(owner).pop(name)
                if value is not None:
                    vars(owner)[name] = value

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """What `transformers.loss.loss_utils.ForCausalLMLoss` returns for the logits of these hidden states.

        Args:
            logits: the hidden states [B, T, K].
            labels: [B, T]; the label of a token is the next one. Or `shift_labels`, already moved.
            num_items_in_batch: what the sum is divided by; without it the number of labels.
        """
        if logits is not self._hidden:
            raise _LogitsChanged(f"{type(self.model).__name__} changes what its head returns before the loss.")
        hidden = logits
        if shift_labels is None:
            assert labels is not None  # Transformers gives either
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
        total = torch.zeros((), device=hidden.device)
        count = 0
        for states, targets in self.parts(hidden, shift_labels.to(hidden.device), ignore_index):
            count += len(targets)
            if torch.is_grad_enabled():
                total = total + checkpoint(self._summed, states, targets, use_reentrant=False)
            else:
                total = total + self._summed(states, targets)
        if not count:  # the loss of nothing is NaN in Transformers, and keeps the graph of what came before
            total = total + 0 * hidden.float().sum()
        divisor = count if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(divisor, device=total.device)

    def run(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The hidden states [B, T, K] that reach the head in a forward pass of the model or of what is around it."""
        with self.active():
            model(**inputs)
            assert self._hidden is not None
            return self._hidden

    def parts(
        self, hidden: torch.Tensor, targets: torch.Tensor, ignored: int = IGNORED
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Hidden states [tokens, K] and targets [tokens] of the tokens that are predicted, some at a time."""
        wanted = targets != ignored
        states, targets = hidden[wanted], targets[wanted]
        tokens = max(1, _LOGITS // self.model.config.get_text_config().vocab_size)
        yield from zip(states.split(tokens), targets.split(tokens), strict=True) if len(targets) else ()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of some tokens [tokens, V], float32."""
        return type(self.head).forward(self.head, states).float()

    def _summed(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.logits(states), targets, reduction="sum")

    def _hand_on(self, states: torch.Tensor) -> torch.Tensor:
        self._hidden = states
        return states


def head_by_parts(model: nn.Module) -> HeadByParts | None:
    """The head of a model by parts, or None where the model needs its logits whole.

    Args:
        model: a causal language model of Transformers, or a PeftModel around it.
    """
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if bare.get_output_embeddings() is None or "forward" in vars(bare.get_output_embeddings()):
        return None  # the latter is accelerate's, where the model lies on several devices
    if any(map(is_sharded, model.parameters())):
        return None  # its parts are gathered when the whole is called
    found = HeadByParts(bare)
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(bare.parameters()).device)
    training = bare.training
    bare.eval()
    try:
        with torch.no_grad(), found.active():
            bare(input_ids=ids, labels=ids, use_cache=False)
    except _LogitsChanged as error:
        logger.info("The logits of whole batches are held: %s", error)
        return None
    finally:
        bare.train(training)
    return found
