"""Generation at the speed of the packed weights: `model.generate(..., custom_generate=lowra.fast_decoding)`.

Everything that `generate` prepares (processors, stopping criteria, lengths) stays Transformers'; its loop is replaced.
A prompt goes through `Decoder.prompt`; after it one step, from a token to the next, is captured as a CUDA graph over a
static cache and replayed. Choosing the token is part of the graph, and the host reads a token while the GPU works on
the next one. What the decoder does not cover runs in Transformers' own loop, and a warning says why.
"""

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from ..nn.walk import modules_of
from .decoder import Decoder
from .mixed_batches import adapter_names, forget_adapter_names
from .projections import Unsupported
from .request import Request
from .session import Session

logger = logging.getLogger(__name__)

_SLOTS = 256  # caches are multiples of so many slots, so that requests of like lengths share a graph
_CHECKED_TOKENS = 16  # more than a group of products takes: the prompt by the kernels of the model itself
_LARGEST_DEVIATION = 0.1  # of logits, relative: rounding leaves 0.01, another architecture about 1
_NEVER_MORE = 0.5  # of a model that makes much of a rounding: logits that have nothing in common are about 1 away too


def fast_decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_model: PreTrainedModel | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    wants_cache: bool = False,
    exact: bool = False,
    **model_kwargs: Any,
) -> Any:
    """A decoding loop for `generate(custom_generate=...)`; greedy and sampling, with everything that `generate` takes.

    The graph and its cache are kept with the model for the next call; `release(model)` frees them.

    Args:
        input_ids: [batch, tokens], padded on the left.
        tokenizer, assistant_model, assistant_tokenizer: what Transformers' loop is given where that generates.
        wants_cache: the caller has given a cache, which is to be filled.
        exact: on a CPU, take activations of 16 bits as they are. Otherwise steps round them to 8 or 13 bits where the
            processor has kernels for that (docs/guide/cpu.md). A GPU never rounds them.

    Returns:
        ids [batch, tokens + new tokens], as Transformers' loop; where that falls back, what it returns.

    Raises:
        ValueError: prompt and new tokens exceed the model's positions; there is no prompt; a mode that Transformers
            does not have itself; probabilities that are none; what was called meanwhile has changed the model.
    """
    arguments = input_ids, logits_processor, stopping_criteria, generation_config
    try:
        try:
            if synced_gpus:
                raise Unsupported("several GPUs generate in step")
            if wants_cache:
                raise Unsupported("the cache that was given is to be filled")
            with _alone(model), torch.inference_mode():
                request = Request(model, *arguments, model_kwargs, assistant_model)
                session, first = _session(request, exact)
                ids = session.run(request, first, streamer)
                if request.calls_others(streamer) and not session.decoder.is_current(model):
                    raise ValueError(
                        "The model was changed while it generated, by a logits processor, a stopping criterion or a "
                        "streamer, and fast decoding went on with it as it was: leave custom_generate out."
                    )
            return ids.clone()  # in the caller's mode: what inference mode has made is not to be trained on
        except Unsupported as reason:
            _warn(f"lowra: Transformers' own loop generates, since {reason}.")
        mode = GENERATION_MODES_MAPPING[generation_config.get_generation_mode(assistant_model)]
        if "/" in mode:
            raise ValueError(f"Transformers keeps this mode at {mode} on the hub: leave custom_generate out.")
        if mode == "_assisted_decoding":
            model_kwargs |= {"assistant_model": assistant_model, "assistant_tokenizer": assistant_tokenizer}
            model_kwargs["tokenizer"] = tokenizer
        loop = getattr(type(model), mode)
        return loop(model, *arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
    except BaseException:
        forget_adapter_names(model)
        raise


@contextlib.contextmanager
def _alone(model: PreTrainedModel) -> Iterator[None]:
    """
    Raises:
        Unsupported: another thread is in it with this model, or a streamer that generates itself.
    """
    lock = _kept(model).lock
    if not lock.acquire(blocking=False):
        raise Unsupported("the model generates already, and its buffers are one request's")
    try:
        yield
    finally:
        lock.release()


def release(model: PreTrainedModel | PeftModel) -> None:
    """Frees the cache and the graph that `fast_decoding` keeps with a model.

    Raises:
        TypeError: it is none that generates.
    """
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(bare, BaseTuner):  # `base_model` of a PeftModel
        bare = bare.model
    if not isinstance(bare, PreTrainedModel):
        raise TypeError(f"A PreTrainedModel or a PeftModel was expected, and {type(model).__name__} came.")
    _kept(bare).session = None


def session_of(model: PreTrainedModel) -> Session | None:
    """What is kept with a model for its next request."""
    return _kept(model).session


class _Kept:
    """What is kept with a model, as an attribute of it.

    A table here would never let go of a model to which one of its modules refers, by a hook or otherwise: sessions hold
    modules. A copy of the model, pickled ones among them, has None there, and begins anew.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = weakref.ref(model)
        self.lock = threading.Lock()
        self.session: Session | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


_PLACE = "_lowra_fast_decoding"
_making = threading.Lock()


def _kept(model: PreTrainedModel) -> _Kept:
    with _making:
        kept = vars(model).get(_PLACE)
        if kept is None or kept.model() is not model:  # a copy's, which shares attributes
            kept = vars(model)[_PLACE] = _Kept(model)
    return kept


def _session(request: Request, exact: bool) -> tuple["Session", torch.Tensor]:
    """The session kept with the model if it serves this request, or a new one; and the request's first tokens.

    Raises:
        Unsupported, ValueError: see there.
    """
    model, first, positions = request.model, request.first_tokens(), request.positions()
    batch = len(request.input_ids)
    kept = session_of(model)
    decoder = None if kept is None else kept.decoder.read_again(model)
    if kept is not None and decoder is not None and kept.decoder.turn_to_those_of(decoder):
        decoder = kept.decoder
    is_known = kept is not None and kept.decoder is decoder
    untouched = decoder.untouched if decoder is not None and is_known else None
    names = adapter_names(modules_of(model) if untouched is None else untouched.awaited(model))
    if names and len(names) != batch:
        raise Unsupported(f"{len(names)} adapters are named for {batch} sequences")
    if kept is not None and is_known and kept.serves(batch, positions, request.choice(), names, exact):
        kept.decoder.turn_to(names)
        kept.decoder.refresh()
        return kept, first
    slots = -(-positions // _SLOTS) * _SLOTS
    if decoder is None or exact != decoder.exact or not decoder.takes(names):
        decoder = Decoder(model, slots, names, exact, () if decoder is None else decoder.others_for(names))
        decoder.untouched = untouched
    # A session whose decoder reaches farther is captured with what lies elsewhere now; and its cache makes room.
    del kept
    _kept(model).session = None
    decoder.reach(slots)
    decoder.turn_to(names)
    decoder.refresh()
    if not is_known:
        tokens = min(_CHECKED_TOKENS, request.input_ids.shape[1] - int(first.max()))
        _check_against_model(decoder, model, request.input_ids[:, -tokens:])
    session = Session(decoder, batch, slots, request)
    _kept(model).session = session
    return session, first


def _check_against_model(decoder: Decoder, model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Holds prompt and step against the model's own forward on a few tokens, once for a model as it is.

    Raises:
        Unsupported: the logits differ by more than rounding explains.
    """
    with torch.inference_mode(False), torch.no_grad():  # what modules keep of it may be trained with
        expected = model(ids, use_cache=False).logits[:, -1].float()
    first = torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
    caches = decoder.caches(len(ids), _SLOTS, first)
    if ids.shape[1] == 1:
        found = decoder.prompt(ids, first, caches)
    else:
        decoder.prompt(ids[:, :-1], first, caches)
        caches[0].slot.fill_(ids.shape[1] - 1)
        found = decoder.step(ids[:, -1], caches)
    deviation = float((found.float() - expected).norm() / expected.norm())
    if deviation < _LARGEST_DEVIATION:
        return
    # Deep models of random weights make that much of a rounding, so this one is asked what it makes of one.
    with torch.inference_mode(False), torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        step = torch.full_like(embedded[0, 0], torch.finfo(embedded.dtype).eps)
        step[::2] *= -1  # norms take back what all values have in common
        rounded = model(inputs_embeds=embedded * (1 + step), use_cache=False).logits[:, -1]
    own = float((rounded.float() - expected).norm() / expected.norm())
    if not deviation < min(4 * own, _NEVER_MORE):
        raise Unsupported(f"its logits differ from the model's own by {deviation:.2g} of their size")


@functools.lru_cache(64)
def _warn(message: str) -> None:
    logger.warning(message)
