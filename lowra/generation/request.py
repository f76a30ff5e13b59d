"""What `generate` hands to its loop, read for a loop that calls no module: what it covers, and what it leaves."""

import dataclasses

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMode

from ..nn.authors import home_of
from .projections import Unsupported

# Functions of scores, and at most of which tokens have occurred: they can be captured over a buffer of fixed length.
_CAPTURED = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)
# Whoever asks for one of these is short of memory.
_SMALLER_CACHES = {"quantized": "quantized", "offloaded": "offloaded", "offloaded_static": "offloaded"}
_CACHES = ("cache", "past_key_values")  # the latter before Transformers 5.24
_IGNORED = {"attention_mask", *_CACHES, "cache_position", "use_cache", "logits_to_keep", "position_ids"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What decides how a token is chosen; a session serves requests of one.

    Attributes:
        settings: of processors that are part of a captured step; None where they are not.
        samples: at random.
        ends: tokens that end a sequence.
        pad: follows in a sequence that has ended; None where tokens are chosen for it as before.
    """

    settings: list[tuple[str, str]] | None
    samples: bool
    ends: list[int]
    pad: int | None


@dataclasses.dataclass
class Request:
    """What `generate` hands to its loop, and what this loop makes of it."""

    model: PreTrainedModel
    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict
    assistant: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            Unsupported: another mode than sampling, another cache, or inputs beside the ids.
            ValueError: no prompt.
        """
        mode = self.config.get_generation_mode(self.assistant)
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise Unsupported(f"the mode is {mode.value.replace('_', ' ')}")
        if self.config.return_dict_in_generate:
            raise Unsupported("scores or states are asked for (return_dict_in_generate)")
        if self.config.cache_implementation in _SMALLER_CACHES:
            raise Unsupported(f"its cache is to be {_SMALLER_CACHES[self.config.cache_implementation]}")
        if self.config.prefill_chunk_size is not None:
            raise Unsupported("the prompt is to be taken in chunks (prefill_chunk_size)")
        others = sorted(name for name, value in self.model_kwargs.items() if name not in _IGNORED and value is not None)
        if others:
            raise Unsupported(f"the model is given {', '.join(others)}")
        if any(self.model_kwargs[name].get_seq_length() for name in _CACHES if self.model_kwargs.get(name) is not None):
            raise Unsupported("it goes on from a cache")
        self._check_inputs()

    def first_tokens(self) -> torch.Tensor:
        """int32 [batch]: the first token of each sequence that is no padding.

        Raises:
            Unsupported: padding elsewhere than on the left, or nothing but padding.
        """
        mask = self.model_kwargs.get("attention_mask")
        if mask is None:
            return torch.zeros(len(self.input_ids), dtype=torch.int32, device=self.input_ids.device)
        if mask.shape != self.input_ids.shape:
            raise Unsupported(f"the attention mask is {list(mask.shape)} for ids of {list(self.input_ids.shape)}")
        seen = mask.bool()
        if not torch.equal(seen.to(mask.dtype), mask):
            raise Unsupported("the attention mask has other values than 0 and 1")
        first = (~seen).sum(dim=1)
        if not torch.equal(seen, torch.arange(seen.shape[1], device=seen.device)[None] >= first[:, None]):
            raise Unsupported("the batch is padded elsewhere than on the left")
        if int(first.max()) == seen.shape[1]:
            raise Unsupported("a sequence is padding alone")
        return first.to(torch.int32)

    def positions(self) -> int:
        """Positions that prompt and new tokens take.

        Raises:
            ValueError: more than the model has.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and self.max_length() > limit:
            raise ValueError(
                f"A prompt of {self.input_ids.shape[1]} tokens and up to "
                f"{self.max_length() - self.input_ids.shape[1]} new ones exceed the {limit} positions of "
                f"{self.model.config.model_type}: shorten the prompt, or lower max_new_tokens."
            )
        return self.max_length()

    def choice(self) -> "Choice":
        """How a token is chosen; processors outside of a graph are each request's own."""
        ends = [c.eos_token_id.flatten().tolist() for c in self.criteria if type(c) is EosTokenCriteria]
        pad = self.config._pad_token_tensor
        settings = None
        if self.in_graph():
            settings = [(type(p).__name__, repr(sorted(vars(p).items(), key=str))) for p in self.processors]
        pads = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)  # as Transformers asks
        return Choice(
            settings=settings,
            samples=bool(self.config.do_sample),
            ends=sorted({token for tokens in ends for token in tokens}),
            pad=(0 if pad is None else int(pad.flatten()[0])) if pads else None,
        )

    def in_graph(self) -> bool:
        """Whether all processors can be part of a captured step."""
        length = self.input_ids.shape[1]
        return all(type(p) in _CAPTURED and _is_plain(p, length) for p in self.processors)

    def max_length(self) -> int:
        """Tokens at which to stop; a criterion that the caller gives stands in the place of the configuration's."""
        given = [c.max_length for c in self.criteria if type(c) is MaxLengthCriteria]
        return min(given, default=self.config.max_length)

    def other_criteria(self) -> StoppingCriteriaList:
        """What each token is held against beside length and end; subclasses of their criteria may stop elsewhere."""
        return StoppingCriteriaList([c for c in self.criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)])

    def calls_others(self, streamer: BaseStreamer | None) -> bool:
        """Whether functions that are not Transformers' are called while tokens are generated."""
        called = [*self.processors, *self.criteria, *([] if streamer is None else [streamer])]
        return not all(home_of(type(each)).startswith("transformers.") for each in called)

    def _check_inputs(self) -> None:
        """
        Raises:
            Unsupported: they are prepared by somebody else, lie elsewhere than the model, or their positions are not
                those of the mask.
            ValueError: there are none.
        """
        if self.input_ids.numel() == 0:
            raise ValueError("The prompt has no tokens: give at least one, such as the tokenizer's bos_token_id.")
        if self.input_ids.device != self.model.device:
            raise Unsupported(f"the prompt lies on {self.input_ids.device} and the model on {self.model.device}")
        prepares = vars(self.model).get("prepare_inputs_for_generation")
        if prepares is not None and getattr(prepares, "__self__", None) is not self.model:
            raise Unsupported("inputs are prepared by another than the model, as for prompts that were trained")
        if "_update_model_kwargs_for_generation" in vars(self.model):
            raise Unsupported("what goes from one step to the next is chosen by another than the model")
        positions, mask = self.model_kwargs.get("position_ids"), self.model_kwargs.get("attention_mask")
        if positions is None:
            return
        expected = torch.arange(self.input_ids.shape[1], device=positions.device).expand_as(self.input_ids)
        if mask is not None:
            expected = (mask.long().cumsum(-1) - 1).to(positions.device)
            positions, expected = positions * mask.to(positions.device), expected * mask.to(positions.device)
        if positions.shape != expected.shape or not torch.equal(positions, expected):
            raise Unsupported("positions are given (position_ids)")


def _is_plain(processor: object, prompt: int) -> bool:
    """False for a penalty that leaves the prompt out: the buffer's places to come hold its last token.

    Args:
        prompt: its tokens.
    """
    left_out = getattr(processor, "prompt_ignore_length", None)
    if isinstance(left_out, torch.Tensor):  # padding of each sequence, from `generate` itself
        return bool((left_out < prompt).all())
    return not isinstance(left_out, int)
