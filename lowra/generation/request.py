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
from transformers.generation.utils import GenerationMode

from .projections import Unsupported

# Functions of scores, and at most of which tokens have occurred: they can be captured over a buffer of fixed length.
_CAPTURED = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)
_CACHES = ("cache", "past_key_values")  # the latter before Transformers 5.24
_IGNORED = {"attention_mask", *_CACHES, "cache_position", "use_cache", "logits_to_keep", "position_ids"}


@dataclasses.dataclass
class Request:
    """What `generate` hands to its loop, and what this loop makes of it."""

    model: PreTrainedModel
    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict

    def __post_init__(self) -> None:
        """
        Raises:
            Unsupported: another mode than sampling, or inputs beside the ids.
        """
        mode = self.config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise Unsupported(f"the mode is {mode.value.replace('_', ' ')}")
        if self.config.return_dict_in_generate:
            raise Unsupported("scores or states are asked for (return_dict_in_generate)")
        others = sorted(name for name, value in self.model_kwargs.items() if name not in _IGNORED and value is not None)
        if others:
            raise Unsupported(f"the model is given {', '.join(others)}")
        if any(self.model_kwargs[name].get_seq_length() for name in _CACHES if self.model_kwargs.get(name) is not None):
            raise Unsupported("it goes on from a cache")
        self._check_inputs()

    def first_tokens(self) -> torch.Tensor:
        """int32 [batch]: the first token of each sequence that is no padding.

        Raises:
            Unsupported: padding elsewhere than on the left.
        """
        mask = self.model_kwargs.get("attention_mask")
        if mask is None:
            return torch.zeros(len(self.input_ids), dtype=torch.int32, device=self.input_ids.device)
        mask = mask.bool()
        first = (~mask).sum(dim=1)
        if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device)[None] >= first[:, None]):
            raise Unsupported("the batch is padded elsewhere than on the left")
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

    def choice(self) -> tuple:
        """What decides how a token is chosen, to be compared; processors outside of a graph are each request's."""
        eos = [c.eos_token_id.flatten().tolist() for c in self.criteria if isinstance(c, EosTokenCriteria)]
        pad = self.config._pad_token_tensor
        settings = None
        if self.in_graph():
            settings = [(type(p).__name__, repr(sorted(vars(p).items(), key=str))) for p in self.processors]
        return settings, self.config.do_sample, eos, None if pad is None else int(pad.flatten()[0])

    def in_graph(self) -> bool:
        """Whether all processors can be part of a captured step."""
        return all(type(p) in _CAPTURED and _is_plain(p) for p in self.processors)

    def max_length(self) -> int:
        """Tokens at which to stop: a criterion that the caller gives counts in the place of the configuration's."""
        given = [c.max_length for c in self.criteria if isinstance(c, MaxLengthCriteria)]
        return min([self.config.max_length, *given])

    def other_criteria(self) -> StoppingCriteriaList:
        """What each token is held against beside length and end."""
        return StoppingCriteriaList([c for c in self.criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)])

    def _check_inputs(self) -> None:
        """
        Raises:
            Unsupported: they are prepared by somebody else, or their positions are not those of the mask.
        """
        prepares = vars(self.model).get("prepare_inputs_for_generation")
        if prepares is not None and getattr(prepares, "__self__", None) is not self.model:
            raise Unsupported("inputs are prepared by another than the model, as for prompts that were trained")
        positions, mask = self.model_kwargs.get("position_ids"), self.model_kwargs.get("attention_mask")
        if positions is None:
            return
        expected = torch.arange(self.input_ids.shape[1], device=positions.device).expand_as(self.input_ids)
        if mask is not None:
            expected = (mask.long().cumsum(-1) - 1).to(positions.device)
            positions, expected = positions * mask.to(positions.device), expected * mask.to(positions.device)
        if positions.shape != expected.shape or not torch.equal(positions, expected):
            raise Unsupported("positions are given (position_ids)")


def _is_plain(processor: object) -> bool:
    """False for a penalty that leaves the prompt out: the buffer's places to come hold a token of the prompt."""
    return not isinstance(getattr(processor, "prompt_ignore_length", None), int)
