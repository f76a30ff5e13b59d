"""Continuing a prompt, and how fast that went."""

import dataclasses
import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .fast import fast_decoding

# One sequence, token by token, in a cache of our own, whatever the model's generation_config.json says.
_ONE_SEQUENCE = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "is_assistant": False,
    **dict.fromkeys(("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "cache_implementation")),
}
_OF_FILES = {"transformers_version", "_from_model_config"}  # in every generation_config.json; no settings


@dataclasses.dataclass
class Continuation:
    """What a model said.

    Attributes:
        text: prompt and continuation, without special tokens.
        reply: the continuation alone.
        tokens: how many were made.
        first_seconds: until the first of them.
        seconds: of the whole call.
    """

    text: str
    reply: str
    tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, which waits for the prompt; 0 where there is none."""
        rest = self.seconds - self.first_seconds
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else 0.0


@torch.inference_mode()
def continue_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | torch.Tensor,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    *,
    exact: bool = False,
) -> Continuation:
    """Continues a prompt, by `fast_decoding` where the model is one that it covers.

    Args:
        prompt: text, or ids [1, tokens] of a conversation.
        temperature: 0 takes the likeliest token every time.
        streamer: is given every token as it is made, after the prompt.
        exact: see `fast_decoding`.

    Raises:
        ValueError: too long a prompt; settings of the model's own with which nothing can be generated.
    """
    torch.manual_seed(seed)
    if isinstance(prompt, str):
        inputs = {key: tensor for key, tensor in tokenizer(prompt, return_tensors="pt").items()}
        inputs.pop("token_type_ids", None)
    else:
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    inputs = {key: tensor.to(model.device) for key, tensor in inputs.items()}
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    clock = _Clock(streamer)
    started = time.perf_counter()
    try:
        ids = model.generate(
            **inputs,
            **sampling,
            **_ONE_SEQUENCE,
            max_new_tokens=new_tokens,
            custom_generate=fast_decoding,
            streamer=clock,
            tokenizer=tokenizer,
            exact=exact,
        )[0]
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # what Transformers makes of settings at odds
        settings = sorted(model.generation_config.to_diff_dict().keys() - _OF_FILES)
        if not settings:
            raise
        raise ValueError(
            f"Generating ended in {type(error).__name__} ({error}), most likely by what the model's "
            f"generation_config.json says of {', '.join(settings)}: correct it there, or remove it."
        ) from error
    seconds = time.perf_counter() - started
    length = inputs["input_ids"].shape[1]
    reply = str(tokenizer.decode(ids[length:], skip_special_tokens=True))
    first = seconds if clock.first is None else clock.first - started
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Continuation(text, reply, len(ids) - length, first, seconds)


class _Clock(BaseStreamer):
    """Hands everything on, and remembers when the first token came.

    The prompt waits for that token: what is warned of in the first forward then stands before the text, not in it.
    """

    def __init__(self, streamer: BaseStreamer | None):
        self._streamer = streamer
        self._prompt: torch.Tensor | None = None
        self._started = False
        self.first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if not self._started:  # the prompt comes first
            self._started, self._prompt = True, value
            return
        if self.first is None:
            self.first = time.perf_counter()
        self._hand_on(value)

    def end(self) -> None:
        self._hand_on()
        if self._streamer is not None:
            self._streamer.end()

    def _hand_on(self, *values: torch.Tensor) -> None:
        held, self._prompt = self._prompt, None
        for value in (() if held is None else (held,)) + values:
            if self._streamer is not None:
                self._streamer.put(value)
