"""One shape of request on one decoder: its buffers, the captured step over them, and how the next token is chosen."""

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..nn.recording import aside, record, side_stream
from .decoder import Decoder
from .request import Choice, Request

_STEPS = 4  # of a graph: between two graphs the GPU waits for some 20 us


class Session:
    """Buffers of one shape of request, and the captured step over them."""

    def __init__(self, decoder: Decoder, batch: int, slots: int, request: Request):
        self.decoder = decoder
        self._batch, self._slots = batch, slots
        choice = self._choice = request.choice()
        self._processors = LogitsProcessorList()  # of a run
        device = decoder.device
        self._ends = torch.tensor(choice.ends, device=device) if choice.ends else None
        self._ids = torch.zeros(batch, slots, dtype=torch.long, device=device)
        self._first = torch.zeros(batch, dtype=torch.int32, device=device)
        self._unfinished = torch.ones(batch, dtype=torch.long, device=device)
        # sums: not a number once a share was none
        self._drawn = torch.zeros(batch, dtype=torch.float32, device=device)
        # of each step of a graph: tokens, and whether any sequence goes on
        self._latest = torch.zeros(_STEPS, batch + 1, dtype=torch.long, device=device)
        self._caches = decoder.caches(batch, slots, self._first)
        self._slot = self._caches[0].slot
        self._in_graph = request.in_graph()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits = torch.empty(0)

    def serves(self, batch: int, positions: int, choice: Choice, names: tuple[str, ...], exact: bool) -> bool:
        """Whether a request can run here, with a decoder that is current and turned to its adapters."""
        asked, own = (batch, choice, exact), (self._batch, self._choice, self.decoder.exact)
        return asked == own and positions <= self._slots and self.decoder.takes(names)

    def run(self, request: Request, first: torch.Tensor, streamer: BaseStreamer | None) -> torch.Tensor:
        """Prompt [batch, tokens] to ids [batch, up to max_length], a view of what the next request is written into.

        Raises:
            ValueError: tokens were to be drawn by scores that are no numbers.
        """
        self._processors = request.processors
        try:
            ids = self._run(request.input_ids, first, request.max_length(), request.other_criteria(), streamer)
        finally:
            self._processors = LogitsProcessorList()  # they may hold the model
        if self._choice.samples and bool(self._drawn.isnan().any()):
            raise ValueError(
                "No token could be drawn, since scores were no numbers or all -inf: a logits processor leaves no "
                "token, or the model overflows."
            )
        return ids

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
        self._drawn.zero_()
        self._slot.fill_(length - 1)
        self._choose(self.decoder.prompt(prompt, first, self._caches), 0)
        if criteria or not self._in_graph or not prompt.is_cuda:
            length = self._go_on(length + 1, max_length, criteria, streamer)
        else:
            length = self._run_ahead(length + 1, max_length, streamer)
        if streamer is not None:
            with _as_in_generate():
                streamer.end()
        return self._ids[:, :length]

    def _go_on(
        self, length: int, max_length: int, criteria: StoppingCriteriaList, streamer: BaseStreamer | None
    ) -> int:
        """One token after the other, each looked at before the next; returns the length reached."""
        while True:
            if streamer is not None:
                with _as_in_generate():
                    streamer.put(self._ids[:, length - 1].clone().cpu())
            if criteria:
                with _as_in_generate():
                    met = criteria(cast(torch.LongTensor, self._ids[:, :length].clone()), cast(torch.FloatTensor, None))
                self._unfinished &= ~met
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
                    with _as_in_generate():
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
        # the likeliest is the same in 16 bits; whatever changes scores gets them in float32, as from Transformers
        scores = logits.float() if self._processors or self._choice.samples else logits
        if self._in_graph:
            scores = self._processors(cast(torch.LongTensor, self._ids), cast(torch.FloatTensor, scores))
        else:
            with _as_in_generate():
                seen, scores = self._ids[:, : int(self._slot) + 1].clone(), scores.clone()
                scores = self._processors(cast(torch.LongTensor, seen), cast(torch.FloatTensor, scores))
        if self._choice.samples:
            # torch.multinomial by its own trick for one sample, without its check that waits for the GPU
            shares = scores.softmax(dim=-1)
            best = (shares / torch.empty_like(shares).exponential_()).max(dim=-1)
            self._drawn += best.values
            tokens = best.indices
        else:
            tokens = scores.argmax(dim=-1)
        if self._choice.pad is not None:
            tokens = tokens * self._unfinished + self._choice.pad * (1 - self._unfinished)
        self._ids.index_copy_(1, self._slot.long() + 1, tokens[:, None])
        if self._ends is not None:
            self._unfinished *= ~torch.isin(tokens, self._ends)
            self._latest[number, -1] = self._unfinished.max()
        self._latest[number, :-1] = tokens
        self._slot += 1

    def _captured(self, steps: int) -> torch.cuda.CUDAGraph:
        """So many steps as a graph; what the trial run before changes is put back."""
        changed = (self._ids, self._slot, self._unfinished, self._latest, self._drawn)
        before = [tensor.clone() for tensor in changed]
        random = torch.cuda.get_rng_state(self._ids.device)

        def body() -> None:
            for number in range(steps):
                self._body(number)

        with aside(side_stream(self._ids.device)):
            self._body(0)
            graph = record(body)
        torch.cuda.set_rng_state(random, self._ids.device)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        return graph


@contextlib.contextmanager
def _as_in_generate() -> Iterator[None]:
    """In it functions of others run in the mode in which `generate` calls them: what they keep may be trained on."""
    with torch.inference_mode(False), torch.no_grad():
        yield
