"""Metrics: perplexity and next-token accuracy of a language model, ROUGE of generated summaries."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import IGNORED
from .head_by_parts import HeadByParts, head_by_parts
from .sharding import computing_device


@torch.no_grad()
def language_model_metrics(
    model: nn.Module,
    examples: list[dict],
    collate: Callable,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> dict:
    """Perplexity = exp(mean loss) over all predicted tokens, and the share of them that the argmax predicts.

    Args:
        model: causal language model on its device.
        examples: `input_ids` and `labels`; labels of -100 are not predicted.
        collate: examples to padded tensors [B, T].
        batch_size: sequences at a time.
        dtype: of autocast, as in training; float32 is none. The loss is float32 in any case.

    Returns:
        loss, perplexity, accuracy, tokens.

    Raises:
        ValueError: there is nothing to predict.
    """
    device = computing_device(model)
    head = head_by_parts(model)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.long, device=device)
    tokens = 0
    with _evaluating(model), autocast(device, dtype):
        for start in tqdm(range(0, len(examples), batch_size), desc="evaluating", leave=False, disable=not progress):
            batch = collate(examples[start : start + batch_size])
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
            labels = batch.pop("labels").to(device)
            inputs = {key: tensor.to(device) for key, tensor in batch.items()}
            for logits, targets in _predictions(model, inputs, labels, head):
                loss += nn.functional.cross_entropy(logits, targets, reduction="sum").double()
                right += (logits.argmax(-1) == targets).sum()
    if not tokens:
        raise ValueError(f"None of the {len(examples)} examples has a token to predict: give longer ones.")
    mean = loss.item() / tokens
    return {
        "loss": mean,
        "perplexity": math.inf if mean >= 700 else math.exp(mean),
        "accuracy": right.item() / tokens,
        "tokens": tokens,
    }


def _predictions(
    model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor, head: HeadByParts | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Float32 logits [tokens, V] and targets [tokens] of the predicted tokens of a batch, some at a time."""
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    if head is not None:
        for states, of_states in head.parts(head.run(model, inputs), targets):
            yield head.logits(states), of_states
        return
    # one sequence at a time: float32 logits of a whole batch would be the largest tensor of the run
    for sequence, of_sequence in zip(model(**inputs).logits, targets, strict=True):
        wanted = of_sequence != IGNORED
        if wanted.any():
            yield sequence[wanted].float(), of_sequence[wanted]


@torch.no_grad()
def summary_metrics(
    model: PreTrainedModel | PeftModel,
    examples: list[dict],
    references: list[str],
    tokenizer: PreTrainedTokenizerBase,
    collate: Callable,
    batch_size: int,
    max_new_tokens: int,
    *,
    num_beams: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> dict:
    """ROUGE of generated summaries against their references, in percent.

    Returns:
        rouge1, rouge2, rougeL, rougeLsum, and mean_length in generated tokens.
    """
    device = next(model.parameters()).device
    speaker: Any = model  # both kinds have `generate`, which PeftModel takes from its base
    summaries, length = [], 0
    beams = {} if num_beams is None else {"num_beams": num_beams}
    with _evaluating(model), autocast(device, dtype):
        for start in tqdm(range(0, len(examples), batch_size), desc="generating", leave=False, disable=not progress):
            batch = collate(examples[start : start + batch_size])
            batch.pop("labels")
            inputs = {key: tensor.to(device) for key, tensor in batch.items()}
            generated = speaker.generate(**inputs, max_new_tokens=max_new_tokens, **beams)
            length += int((generated != tokenizer.pad_token_id).sum())
            summaries += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return {**rouge(summaries, references), "mean_length": length / len(summaries)}


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean F-measures in percent, with Porter stemming: ROUGE-1, -2, -L, and -Lsum over sentences on separate lines.

    Sentences end at a full stop, question or exclamation mark before a blank; the usual scripts split with NLTK's
    trained splitter, which has to be downloaded.
    """
    from rouge_score import rouge_scorer  # brings NLTK with it; language models do without

    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    totals = dict.fromkeys(kinds, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score(_sentences(reference), _sentences(prediction))
        for kind in kinds:
            totals[kind] += scores[kind].fmeasure
    return {kind: 100 * total / len(predictions) for kind, total in totals.items()}


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to a type of 16 bits on the device, or nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def _sentences(text: str) -> str:
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
