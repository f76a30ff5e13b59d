"""Generation at the speed of the packed weights: `model.generate(..., custom_generate=lowra.fast_decoding)`.

Everything that `generate` prepares (processors, stopping criteria, lengths) stays Transformers'; its loop is replaced.
A prompt goes through `Decoder.prompt`; after it one step, from a token to the next, is captured as a CUDA graph over a
static cache and replayed. Choosing the token is part of the graph, and the host reads a token while the GPU works on
the next one. What the decoder does not cover runs in Transformers' own loop, and a warning says why.
"""

import functools
import logging
import threading
import weakref
from typing import Any, cast

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

from ..nn.recording import record
from .decoder import Decoder
from .mixed_batches import adapter_names, forget_adapter_names
from .projections import Unsupported
from .request import Request

logger = logging.getLogger(__name__)

_SLOTS = 256  # caches are multiples of so many slots, so that requests of like lengths share a graph
_STEPS = 4  # of a graph: between two graphs the GPU waits for some 20 us
_CHECKED_TOKENS = 16  # more than a group of products takes: the prompt by the kernels of the model itself
_LARGEST_DEVIATION = 0.1  # of logits, relative: rounding leaves 0.01, another architecture about 1
_NEVER_MORE = 0.5  # of a model that makes much of a rounding: logits that have nothing in common are about 1 away too


@torch.inference_mode()
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
    wants_cache: bool = False,
    exact: bool = False,
    **model_kwargs: Any,
) -> Any:
    """A decoding loop for `generate(custom_generate=...)`; greedy and sampling, with everything that `generate` takes.

    The graph and its cache are kept with the model for the next call; `release(model)` frees them.

    Args:
        input_ids: [batch, tokens], padded on the left.
        tokenizer: `generate` has made the criterion of stop strings with it; not used here.
        wants_cache: the caller has given a cache, which is to be filled.
        exact: on a CPU, take activations of 16 bits as they are. Otherwise steps round them to 8 or 13 bits where the
            processor has kernels for that (docs/guide/cpu.md). A GPU never rounds them.

    Returns:
        ids [batch, tokens + new tokens], as Transformers' loop; where that falls back, what it returns.

    Raises:
        ValueError: prompt and new tokens exceed the model's positions.
    """
    lock = _locks.setdefault(model, threading.Lock())
    alone = lock.acquire(blocking=False)
    try:
        if not alone:  # another thread, or a streamer that generates itself
            raise Unsupported("the model generates already, and its buffers are one request's")
        if synced_gpus:
            raise Unsupported("several GPUs generate in step")
        if wants_cache:
            raise Unsupported("the cache that was given is to be filled")
        request = Request(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        session, first = _session(request, exact)
        return session.run(request, first, streamer)
    except Unsupported as reason:
        _warn(f"lowra: Transformers' own loop generates, since {reason}.")
        mode = GENERATION_MODES_MAPPING[generation_config.get_generation_mode()]
        return getattr(type(model), mode)(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    except BaseException:
        forget_adapter_names(model)
        raise
    finally:
        if alone:
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
    _sessions.pop(bare, None)


_sessions: "weakref.WeakKeyDictionary[PreTrainedModel, Session]" = weakref.WeakKeyDictionary()
_locks: "weakref.WeakKeyDictionary[PreTrainedModel, threading.Lock]" = weakref.WeakKeyDictionary()


def _session(request: Request, exact: bool) -> tuple["Session", torch.Tensor]:
    """The session kept with the model if it serves this request, or a new one; and the request's first tokens.

    Raises:
        Unsupported, ValueError: see there.
    """
    model, first, positions = request.model, request.first_tokens(), request.positions()
    batch = len(request.input_ids)
    names = adapter_names(model)
    if names and len(names) != batch:
        raise Unsupported(f"{len(names)} adapters are named for {batch} sequences")
    kept = _sessions.get(model)
    if kept is not None and kept.serves(model, batch, positions, request.choice(), names, exact):
        kept.decoder.refresh()
        return kept, first
    slots = -(-positions // _SLOTS) * _SLOTS
    decoder = Decoder(model, slots, names, exact)
    decoder.refresh()
    if kept is None:
        tokens = min(_CHECKED_TOKENS, request.input_ids.shape[1] - int(first.max()))
        _check_against_model(decoder, model, request.input_ids[:, -tokens:])
    del kept
    _sessions.pop(model, None)  # its cache makes room for the new one
    session = Session(decoder, batch, slots, request)
    _sessions[model] = session
    return session, first


def _check_against_model(decoder: Decoder, model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Holds prompt and step against the model's own forward on a few tokens, once for a model.

    Raises:
        Unsupported: the logits differ by more than rounding explains.
    """
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
    embedded = model.get_input_embeddings()(ids)
    step = torch.full_like(embedded[0, 0], torch.finfo(embedded.dtype).eps)
    step[::2] *= -1  # norms take back what all values have in common
    rounded = model(inputs_embeds=embedded * (1 + step), use_cache=False).logits[:, -1]
    own = float((rounded.float() - expected).norm() / expected.norm())
    if not deviation < min(4 * own, _NEVER_MORE):
        raise Unsupported(f"its logits differ from the model's own by {deviation:.2g} of their size")


class Session:
    """Buffers of one shape of request, and the captured step over them."""

    def __init__(self, decoder: Decoder, batch: int, slots: int, request: Request):
        self.decoder = decoder
        self._batch, self._slots = batch, slots
        self._choice = request.choice()
        self._processors, self._sample = LogitsProcessorList(), request.config.do_sample  # the former for a run
        _, _, eos, self._pad = self._choice
        device = decoder.device
        self._eos = torch.tensor(eos[0], device=device) if eos else None
        self._ids = torch.zeros(batch, slots, dtype=torch.long, device=device)
        self._first = torch.zeros(batch, dtype=torch.int32, device=device)
        self._unfinished = torch.ones(batch, dtype=torch.long, device=device)
        # of each step of a graph: tokens, and whether any sequence goes on
        self._latest = torch.zeros(_STEPS, batch + 1, dtype=torch.long, device=device)
        self._caches = decoder.caches(batch, slots, self._first)
        self._slot = self._caches[0].slot
        self._in_graph = request.in_graph()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits = torch.empty(0)

    def serves(
        self,
        model: PreTrainedModel,
        batch: int,
        positions: int,
        choice: tuple,
        names: tuple[str, ...],
        exact: bool,
    ) -> bool:
        """Whether a request can run here: shape, choice and adapters are the same, and no tensor has moved since."""
        asked = batch, choice, names, exact
        own = self._batch, self._choice, self.decoder.names, self.decoder.exact
        same = asked == own and positions <= self._slots
        return same and self.decoder.is_current(model)

    def run(self, request: Request, first: torch.Tensor, streamer: BaseStreamer | None) -> torch.Tensor:
        """Prompt [batch, tokens] to ids [batch, up to max_length]."""
        self._processors = request.processors
        try:
            return self._run(request.input_ids, first, request.max_length(), request.other_criteria(), streamer)
        finally:
            self._processors = LogitsProcessorList()  # they may hold the model

    def _run(
        self,
        prompt: torch.Tensor,
        first: torch.Tensor,
        max_length: int,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ) -> torch.Tensor:
        length = prompt.shape[1]
        self._ids[:, :length] = prompt
        self._ids[:, length:] = prompt[:, -1:]  # tokens that have occurred, so that nothing else counts as seen
        self._first.copy_(first)
        self._unfinished.fill_(1)
        self._latest.fill_(1)
        self._slot.fill_(length - 1)
        self._choose(self.decoder.prompt(prompt, first, self._caches), 0)
        if criteria or not self._in_graph or not prompt.is_cuda:
            length = self._go_on(length + 1, max_length, criteria, streamer)
        else:
            length = self._run_ahead(length + 1, max_length, streamer)
        if streamer is not None:
            streamer.end()
        return self._ids[:, :length].clone()

    def _go_on(
        self, length: int, max_length: int, criteria: StoppingCriteriaList, streamer: BaseStreamer | None
    ) -> int:
        """One token after the other, each looked at before the next; returns the length reached."""
        while True:
            if streamer is not None:
                streamer.put(self._ids[:, length - 1].cpu())
            if criteria:
                ids = self._ids[:, :length]
                self._unfinished &= ~criteria(ids, None)
            if length == max_length or not bool(self._unfinished.any()):
                return length
            self._step()
            length += 1

    def _run_ahead(self, length: int, max_length: int, streamer: BaseStreamer | None) -> int:
        """The GPU is given steps before the tokens of the last ones are read; returns the length reached.

        Args:
            length: of the prompt and its first token, which is chosen but not read.
        """
        read = [torch.empty_like(self._latest, device="cpu", pin_memory=True) for _ in range(2)]
        ready, counts = [torch.cuda.Event(), torch.cuda.Event()], [1, 0]

        def ask(turn: int) -> None:
            read[turn].copy_(self._latest, non_blocking=True)
            ready[turn].record()

        ask(0)
        turn, asked, length = 0, length, length - 1
        while True:
            steps = _STEPS if asked + _STEPS <= max_length else min(1, max_length - asked)
            if steps:
                self._step(steps)
                ask(1 - turn)
            counts[1 - turn], asked = steps, asked + steps
            ready[turn].synchronize()
            for row in read[turn][: counts[turn]]:
                length += 1
                if streamer is not None:
                    streamer.put(row[:-1].clone())
                if not row[-1]:
                    return length
            if not steps:
                return length
            turn = 1 - turn

    def _step(self, steps: int = 1) -> None:
        if not self._ids.is_cuda:
            self._body(0)
            return
        if steps not in self._graphs:
            self._graphs[steps] = self._captured(steps)
        self._graphs[steps].replay()
        if not self._in_graph:
            self._choose(self._logits, 0)

    def _body(self, number: int) -> None:
        """One step. number: of the step in its graph."""
        tokens = self._ids.index_select(1, self._slot)[:, 0]
        self._logits = self.decoder.step(tokens, self._caches)
        if self._in_graph or not self._ids.is_cuda:
            self._choose(self._logits, number)

    def _choose(self, logits: torch.Tensor, number: int) -> None:
        """Puts the next token of each sequence behind the slot, and moves the slot."""
        seen = self._ids if self._in_graph else self._ids[:, : int(self._slot) + 1]
        # the likeliest is the same in 16 bits; whatever changes scores gets them in float32, as from Transformers
        scores = logits.float() if self._processors or self._sample else logits
        scores = self._processors(cast(torch.LongTensor, seen), cast(torch.FloatTensor, scores))
        if self._sample:
            # torch.multinomial by its own trick for one sample, without its check that waits for the GPU
            shares = scores.softmax(dim=-1)
            tokens = (shares / torch.empty_like(shares).exponential_()).argmax(dim=-1)
        else:
            tokens = scores.argmax(dim=-1)
        if self._eos is not None:
            tokens = tokens * self._unfinished + (self._pad or 0) * (1 - self._unfinished)
        self._ids.index_copy_(1, self._slot.long() + 1, tokens[:, None])
        if self._eos is not None:
            self._unfinished *= ~torch.isin(tokens, self._eos)
            self._latest[number, -1] = self._unfinished.max()
        self._latest[number, :-1] = tokens
        self._slot += 1

    def _captured(self, steps: int) -> torch.cuda.CUDAGraph:
        """So many steps as a graph; what the trial run before changes is put back."""
        changed = (self._ids, self._slot, self._unfinished, self._latest)
        before = [tensor.clone() for tensor in changed]
        random = torch.cuda.get_rng_state(self._ids.device)
        side = torch.cuda.Stream(self._ids.device)
        side.wait_stream(torch.cuda.current_stream())

        def body() -> None:
            for number in range(steps):
                self._body(number)

        with torch.cuda.stream(side):
            self._body(0)
            graph = record(body)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(random, self._ids.device)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        return graph


@functools.lru_cache(64)
def _warn(message: str) -> None:
    logger.warning(message)
