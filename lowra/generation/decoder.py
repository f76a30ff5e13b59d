"""A decoder-only model as the few calls that a token needs: what is read off its modules, its prompt and its step.

Transformers' own forward launches some 40 kernels a layer; this one launches five, four of them packed products
with norms, gates and LoRA adapters in them. It covers decoders of the LLaMA family (`FAMILIES`), and says by
`Unsupported` what it does not cover.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from bitsandbytes.backends.lowra import decoding
from bitsandbytes.backends.lowra.decoding import Attention, Cache, Norm

from ..nn.authors import names_in
from ..nn.hooks import is_awaited
from ..nn.linear import LowRALinear
from ..nn.walk import modules_of
from .blocks import Reading, norm_of
from .coverage import check_mode, check_parts, check_surroundings, check_written, written
from .mixed_batches import NO_ADAPTER
from .projections import KnownShares, Projections, Unsupported, is_packed
from .untouched import Untouched

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2")
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Ranks of adapters that gather in a session beyond what one batch needs: each has a copy of its factors there.
_GATHERED = 64
# Rotary embeddings that are the same however long the text is.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class Decoder:
    """The parts of a model in the order in which a token passes them.

    Holds the modules but not the model, so that a model can go while its decoder is kept for it.

    Attributes:
        layers: blocks.
        names: adapters of the sequences of a mixed batch; empty where the active ones are for all. See `turn_to`.
        positions: that rotary embeddings were made for.
        exact: steps on a CPU do not round activations; see `decoding.Group`.
        device, dtype: of the model.
        untouched: the model as it was when a decoder was last compared with it in full; None before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        positions: int,
        names: tuple[str, ...] = (),
        exact: bool = False,
        others: Iterable[str] = (),
    ):
        """Reads the model's modules.

        Args:
            positions: how many are needed; rotary embeddings are made for so many.
            names, exact: see there.
            others: adapters that other mixed batches go through, to which this can turn.

        Raises:
            Unsupported: this path does not cover the model as it is.
        """
        config = model.config
        if config.model_type not in FAMILIES:
            raise Unsupported(f"{config.model_type} is none of the architectures {', '.join(FAMILIES)}")
        self.positions, self.names, self.exact = positions, names, exact
        self._config, self._body, self._head = config, model.get_decoder(), model.get_output_embeddings()
        weight = norm_of(self._body.norm).weight
        self.device, self.dtype = weight.device, weight.dtype
        if self.dtype not in _TYPES:
            raise Unsupported(f"the model is {self.dtype}")
        modules = modules_of(model)  # some thousand, which this does not go through more often than it must
        parameters = (p for module in modules for p in module._parameters.values() if p is not None)
        if any(parameter.device != self.device for parameter in parameters):
            raise Unsupported("the model is spread over several devices")
        check_mode(modules)
        check_surroundings(self.device.type, self.dtype)
        kinds: set[Any] = set(map(type, modules))
        self._kinds = written(kinds)
        check_parts(model, modules)
        ends = (self._body, self._head, self._body.embed_tokens)
        if any(map(operator.is_not, ends[:2], (getattr(model, "model", None), getattr(model, "lm_head", None)))):
            raise Unsupported("its body or its head is another module than its forward calls")
        called = {part for end in ends[1:] for part in end.modules()}
        check_written(type(model), {type(module) for module in modules if module not in called})
        self._rows = {
            name: torch.tensor([own == name for own in names], device=self.device)
            for name in (dict.fromkeys((*others, *names)) if names else ())
            if name != NO_ADAPTER
        }
        self._packed_head = _packed_head(self._head, self.dtype, exact)
        capped = "final_logit_softcapping" in names_in(type(model).forward)
        self._softcap = (config.final_logit_softcapping or 0.0) if capped else 0.0
        cosine, sine = self._rotary(positions)
        group = functools.partial(Projections, dtype=self.dtype, rows=self._rows if names else None, exact=exact)
        blocks = list(self._body.layers)
        if "num_hidden_layers" in names_in(type(self._body).forward):
            blocks = blocks[: config.num_hidden_layers]
        read = Reading(config, type(self._body), group, (cosine, sine))
        self.layers = [read.layer(number, block) for number, block in enumerate(blocks)]
        most: dict[int, int] = {}  # by the address of its rows, which are an adapter's own
        for adapter in (adapter for group in self._projections() for adapter in group.adapters()):
            most[id(adapter.rows)] = max(len(adapter.source[0]), most.get(id(adapter.rows), 0))
        self._rows = {name: rows for name, rows in self._rows.items() if name in names or id(rows) in most}
        self._ranks = [most.get(id(rows), 0) for rows in self._rows.values()]
        if any(norm.weight.dtype != self.dtype for norm in self._norms()):
            raise Unsupported(f"some of its norms are {self.dtype} and some are not")
        self._adapted: list[Projections] | None = None  # as long as nobody computes with this
        self._shares: KnownShares = {}
        self._was = self._state()
        self._switches = False  # other adapters of the same kind have been in these layers, and may be again
        self.untouched: Untouched | None = None

    def prompt(self, ids: torch.Tensor, first: torch.Tensor, caches: list[Cache]) -> torch.Tensor:
        """Runs a prompt and fills the caches.

        Args:
            ids: [batch, tokens], padded on the left.
            first: int32 [batch], first token of each sequence.

        Returns:
            logits of the last tokens, [batch, vocabulary].

        Raises:
            Unsupported: embeddings are of another type than norms.
        """
        batch, tokens = ids.shape
        places = torch.arange(tokens, device=ids.device)
        positions = (places[None] - first[:, None]).clamp(min=0)
        padded = int(first.max()) > 0
        windows = {layer.attention.window for layer in self.layers}
        masks = {window: _mask(places, first, window) for window in windows if padded or 0 < window < tokens}
        table = self.layers[0].attention  # the same for all layers
        cosine = table.cosine[positions].view(batch * tokens, 1, -1)
        sine = table.sine[positions].view(batch * tokens, 1, -1)

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            attention, cache = self.layers[index].attention, caches[index]
            turned = decoding.rotated(torch.cat(decoding.heads_of(query, key, attention), dim=1), cosine, sine)
            turned = turned.unflatten(0, (batch, tokens)).transpose(1, 2)
            query, key = turned.split((attention.heads, attention.kv_heads), dim=1)
            value = value.view(batch, tokens, attention.kv_heads, attention.dim).transpose(1, 2)
            cache.keys[:, :, :tokens], cache.values[:, :, :tokens] = key, value
            seen = masks.get(attention.window)  # None: causal
            return decoding.weighted_values(query, key, value, seen, attention).reshape(batch * tokens, -1)

        hidden = self._body.embed_tokens(ids)
        if hidden.dtype != self.dtype:
            raise Unsupported(f"its norms are {self.dtype} and its embeddings {hidden.dtype}")
        return self._run(hidden.reshape(batch * tokens, -1), attend, batch)

    def step(self, ids: torch.Tensor, caches: list[Cache]) -> torch.Tensor:
        """One new token of each sequence, at the caches' slot.

        Args:
            ids: [batch].

        Returns:
            logits [batch, vocabulary].
        """

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return decoding.attend(query, key, value, caches[index], self.layers[index].attention)

        return self._run(self._body.embed_tokens(ids), attend, len(ids))

    def _run(self, residual: torch.Tensor, attend: Callable[..., torch.Tensor], batch: int) -> torch.Tensor:
        """The blocks and the head. residual: [tokens, hidden]; the last token of each sequence comes out."""
        if self._adapted:  # once this was refreshed
            self._launches += len(self._adapted)
        delta: torch.Tensor | None = None
        delta_norm: Norm | None = None
        for index, layer in enumerate(self.layers):
            outs, residual = layer.query_key_value.after_norm(residual, delta, layer.before_attention, delta_norm)
            (delta,) = layer.out(attend(index, *_queries(outs, layer.attention)))
            outs, residual = layer.gate_up.after_norm(residual, delta, layer.before_feed_forward, layer.after_attention)
            opened, up = _halves(outs)
            delta = layer.down.after_gate(opened, up, layer.activation)
            delta_norm = layer.after_feed_forward
        is_prompt = len(residual) > batch
        if is_prompt:  # only the last tokens are asked for
            last = slice(len(residual) // batch - 1, None, len(residual) // batch)
            residual = residual[last].contiguous()
            delta = None if delta is None else delta[last].contiguous()
        normal = decoding.add_norm(residual, delta, norm_of(self._body.norm), delta_norm)
        logits = self._logits(normal, is_prompt)
        return self._softcap * torch.tanh(logits / self._softcap) if self._softcap else logits

    def _logits(self, normal: torch.Tensor, is_prompt: bool) -> torch.Tensor:
        """The head's output for that of the last norm; prompts are never rounded."""
        if self._packed_head is not None and not is_prompt and not is_awaited(self._head):
            return decoding.linear_group(normal, self._packed_head)[0]
        return decoding.dense_linear(normal, self._head.weight) if _is_plain(self._head) else self._head(normal)

    def caches(self, batch: int, slots: int, first: torch.Tensor) -> list[Cache]:
        """Empty caches of all layers; they share the slot, which is the first one."""
        attention = self.layers[0].attention
        shape = (len(self.layers), 2, batch, attention.kv_heads, slots, attention.dim)
        memory = torch.zeros(shape, dtype=self.dtype, device=self.device)
        slot = torch.zeros(1, dtype=torch.int32, device=self.device)
        shared = (slot, first, *decoding.workspace_of(attention, batch, slots, self.device))
        return [Cache(keys, values, *shared) for keys, values in memory]

    def _projections(self) -> Iterator[Projections]:
        for layer in self.layers:
            yield from (layer.query_key_value, layer.out, layer.gate_up, layer.down)

    def _norms(self) -> Iterator[Norm]:
        yield norm_of(self._body.norm)
        for layer in self.layers:
            of_heads = layer.attention.query_norm, layer.attention.key_norm
            around = layer.before_attention, layer.after_attention, layer.before_feed_forward, layer.after_feed_forward
            yield from (norm for norm in (*around, *of_heads) if norm is not None)

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether a captured step still computes what the model does: one read from the model now would be the same."""
        return self.read_again(model) is self

    def read_again(self, model: PreTrainedModel) -> "Decoder | None":
        """A decoder of the model as it is now, for the same adapters: this one while it is current.

        Returns:
            None where the model is not covered any more.
        """
        untouched = self.untouched is not None and self.untouched.is_same(model)
        try:
            if untouched:
                check_surroundings(self.device.type, self.dtype)
            now = self if untouched else self._read(model)
            tables = self._rotary(self.positions) if untouched else now._rotary_tables()
        except Unsupported:
            return None
        alike = now._was == self._was and all(map(torch.equal, tables, self._rotary_tables()))
        if not alike or now._sources() != self._sources():
            now = now if now is not self else self._read(model)
            now._switches = alike
            return now
        if not untouched:
            self.untouched = Untouched.of(model)
        return self

    def _read(self, model: PreTrainedModel) -> "Decoder":
        return Decoder(model, self.positions, self.names, self.exact, self._rows)

    def takes(self, names: tuple[str, ...]) -> bool:
        """Whether a batch that goes through these adapters can have this decoder, if it turns to them."""
        own = set(names) - {NO_ADAPTER}
        return names == self.names or (len(names) == len(self.names) > 0 and own <= self._rows.keys())

    def turn_to(self, names: tuple[str, ...]) -> None:
        """Sequences go through these adapters from now on, in captured steps too. names: that this `takes`."""
        if names == self.names:
            return
        self.names = names
        for name, rows in self._rows.items():
            rows.copy_(torch.tensor([own == name for own in names]))
        for shares in self._shares.values():
            shares.renew()

    def turn_to_those_of(self, other: "Decoder") -> bool:
        """Sequences go through the adapters of another reading of the model from now on, if nothing else differs and
        there is room for them where captured steps look.
        """
        if not other._switches or not all(group.has_room() for group in self._projections()):
            return False
        for group, its in zip(self._projections(), other._projections(), strict=True):
            group.take(its)
        self.untouched = None
        return True

    def others_for(self, names: tuple[str, ...]) -> Iterable[str]:
        """Adapters that a decoder of another mixed batch should take too, so that it serves this one's: with them as
        many as a batch of this size may need, or few ranks.
        """
        if len(names) != len(self.names):
            return ()
        few = sum(self._ranks) + max(self._ranks, default=0) <= _GATHERED  # of what comes nothing is known yet
        return self._rows if few or len(self._rows.keys() | set(names) - {NO_ADAPTER}) <= len(names) else ()

    def _rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self.layers[0].attention  # the same for all layers
        return attention.cosine, attention.sine

    def reach(self, positions: int) -> None:
        """Makes rotary embeddings for more positions, where those that there are do not suffice.

        What a step was captured with lies elsewhere then.
        """
        if positions <= self.positions:
            return
        cosine, sine = self._rotary(positions)
        self.positions = positions
        for layer in self.layers:
            layer.attention = dataclasses.replace(layer.attention, cosine=cosine, sine=sine)

    def _state(self) -> list[Any]:
        """Addresses, numbers and objects that a captured step has fixed, but for the values of rotary embeddings."""
        found: list[Any] = [self.device, self.dtype, self._softcap, self._kinds, *self._ends()]
        found += ((norm.weight.data_ptr(), norm.epsilon, norm.one_plus) for norm in self._norms())
        for layer in self.layers:
            its = layer.attention
            found += (layer.activation, its.heads, its.kv_heads, its.dim, its.scaling, its.window, its.softcap)
        for group in self._projections():
            found += group.state()
        return found

    def _sources(self) -> list[int]:
        return [address for group in self._projections() for address in group.sources()]

    def _ends(self) -> list[Any]:
        """What embeddings and head are, where they lie, and which adapters they have."""
        ends = (self._body, self._body.embed_tokens, self._head)
        found: list[Any] = [*ends, *(parameter.data_ptr() for end in ends[1:] for parameter in end.parameters())]
        if isinstance(self._head, LowRALinear):
            found += [table.data_ptr() for table in self._head.current_tables().values()]
        for module in (part for end in ends[1:] for part in end.modules()):
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                chosen = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
                found.append(repr([getattr(module, name, None) for name in chosen]))
        return found

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the adapters' factors, anew where copies are kept of them: they may have been trained on."""
        if self._adapted is None:
            self._adapted = [group for group in self._projections() if group.cells()]
            most = max((group.cells() for group in self._adapted), default=0)
            self._cells = torch.zeros(most, dtype=torch.int64, device=self.device)
            self._launches = torch.zeros(1, dtype=torch.int32, device=self.device)
            for group in self._projections():
                group.make_room(self._shares, self._switches)
        pairs = [pair for group in self._projections() for pair in group.refresh()]
        if pairs:
            kept, given = map(list, zip(*pairs, strict=True))
            torch._foreach_copy_(kept, given)
        for number, group in enumerate(self._adapted, start=1):
            group.into_products(self._cells, self._launches, number)

    def _rotary(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        rotary = self._body.rotary_emb
        kind = getattr(rotary, "rope_type", "default")
        if kind not in _FIXED_ROPE:
            raise Unsupported(f"its rotary embedding ({kind}) changes with the length of the text")
        places = torch.arange(positions, device=self.device)[None]
        cosine, sine = rotary(torch.empty(0, dtype=self.dtype, device=self.device), places)
        return cosine[0].contiguous(), sine[0].contiguous()


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is its weight alone: a dense layer that nothing was put around."""
    return type(head) is nn.Linear and head.bias is None and not is_awaited(head)


def _packed_head(head: nn.Module, dtype: torch.dtype, exact: bool) -> decoding.Group | None:
    """A packed head as steps multiply with it, or None for another."""
    return decoding.Group([(head.matrix(), head.bias_as(dtype))], exact) if is_packed(head) else None


def _queries(outs: list[torch.Tensor], attention: Attention) -> list[torch.Tensor]:
    """Query, key and value; Phi 3 has one layer for all three."""
    if len(outs) > 1:
        return outs
    sizes = [count * attention.dim for count in (attention.heads, attention.kv_heads, attention.kv_heads)]
    return [part.contiguous() for part in outs[0].split(sizes, dim=-1)]


def _halves(outs: list[torch.Tensor]) -> list[torch.Tensor]:
    return outs if len(outs) == 2 else [part.contiguous() for part in outs[0].chunk(2, dim=-1)]


def _mask(places: torch.Tensor, first: torch.Tensor, window: int) -> torch.Tensor:
    """bool [batch, 1, tokens, tokens]: what a token of a left-padded prompt sees. Padding sees itself."""
    seen = places[:, None] >= places[None]
    if window:
        seen = seen & (places[None] > places[:, None] - window)
    seen = seen[None] & (places[None, None] >= first[:, None, None])
    return (seen | torch.eye(len(places), dtype=torch.bool, device=places.device)[None])[:, None]
