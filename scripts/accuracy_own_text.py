"""Much text that a small LLaMA writes itself, for `accuracy_grid.py`: as `lowra.quantization.own_text`, and faster.

A token of thousands of sequences is one CUDA graph over as much of the cache as is filled, in eighths of it.
"""

import contextlib
import sys
import traceback

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowra.nn.recording import record
from lowra.quantization.own_text import write_text

_EIGHTHS = 8


class Writer:
    """The cache of `batch` sequences, and the kernels of a token of each."""

    def __init__(self, model, batch: int, length: int):
        config, table = model.config, model.get_input_embeddings().weight
        if config.num_key_value_heads != config.num_attention_heads:
            raise ValueError("keys and values are shared by heads")
        self._model, self._length, self._batch = model, length, batch
        self._heads, self._width = config.num_attention_heads, config.head_dim
        shape = batch * self._heads, length, self._width
        layers = range(config.num_hidden_layers)
        self._keys = [torch.zeros(shape, dtype=table.dtype, device=table.device) for _ in layers]
        self._values = [torch.zeros(shape, dtype=table.dtype, device=table.device) for _ in layers]
        places = torch.arange(length, device=table.device)
        self._cos, self._sin = (part[0] for part in model.model.rotary_emb(table[None], places[None]))
        self._places = places
        self._place = torch.zeros(1, dtype=torch.long, device=table.device)
        self._token = torch.zeros(batch, dtype=torch.long, device=table.device)
        self._text = torch.zeros(batch, length, dtype=torch.long, device=table.device)
        self._graphs, self._pool = {}, None

    @torch.no_grad()
    def write(self, begun: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, length] from the first of each."""
        self._place.zero_()
        self._token.copy_(begun)
        self._text[:, 0] = self._token
        step = -(-self._length // _EIGHTHS)
        for place in range(self._length - 1):
            self._next(min(self._length, (place // step + 1) * step))
        return self._text.cpu()

    def _next(self, filled: int) -> None:
        if self._text.device.type == "cpu":
            self._step(filled)
            return
        if filled not in self._graphs:
            self._graphs[filled] = None
            self._step(filled)
            return
        if self._graphs[filled] is None:
            torch.cuda.synchronize()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[filled] = record(lambda: self._step(filled), self._pool)
        self._graphs[filled].replay()

    def _step(self, filled: int) -> None:
        model, later = self._model.model, self._places[:filled] > self._place
        cos, sin = self._cos[self._place], self._sin[self._place]
        hidden = model.embed_tokens(self._token)
        for layer, keys, values in zip(model.layers, self._keys, self._values, strict=True):
            inner, own = layer.input_layernorm(hidden), layer.self_attn
            query = self._turned(own.q_proj(inner), cos, sin)
            keys.index_copy_(1, self._place, self._turned(own.k_proj(inner), cos, sin))
            values.index_copy_(1, self._place, own.v_proj(inner).view(-1, 1, self._width))
            scores = torch.bmm(query, keys[:, :filled].transpose(1, 2)).float() * self._width**-0.5
            shares = scores.masked_fill_(later, -torch.inf).softmax(dim=-1).to(keys.dtype)
            hidden = hidden + own.o_proj(torch.bmm(shares, values[:, :filled]).view(self._batch, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        shares = self._model.lm_head(model.norm(hidden)).float().softmax(dim=-1)
        self._token.copy_((shares / torch.empty_like(shares).exponential_()).argmax(dim=-1))  # drawn from the shares
        self._place += 1
        self._text.index_copy_(1, self._place, self._token[:, None])

    def _turned(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[batch * heads, 1, width] at the place in the sequence."""
        heads = heads.view(-1, 1, self._width)
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([-second, first], dim=-1) * sin


def write(folder, counts, length, path_of, device):
    """Token ids that a model writes, into files that appear when they are whole.

    Args:
        folder: of the model.
        counts: sequences of each file.
        path_of: the file of a number.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = torch.tensor([token for token in range(len(tokenizer)) if token not in set(tokenizer.all_special_ids)])
    fast, writers = tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id], {}
    for number, count in enumerate(counts):
        if path_of(number).exists():  # of a run before, since each file has a seed of its own
            continue
        torch.manual_seed(number)
        tokens = None
        if fast:
            try:
                begun = plain[torch.randint(len(plain), (count,))]
                with stream_of(device):
                    if count not in writers:
                        writers = {count: Writer(model, count, length)}
                    tokens = writers[count].write(begun.to(device))
            except Exception:  # slower, and no less right
                traceback.print_exc()
                fast, writers = False, {}
        if tokens is None:
            tokens = write_text(model, tokenizer, count, length, seed=number, batch=1024, progress=False)
        part = path_of(number).with_suffix(".part")
        save_file({"tokens": tokens.short() if len(tokenizer) < 2**15 else tokens.int()}, part)
        part.rename(path_of(number))
        print(f"text {number}: {count} sequences, {'graphs' if fast else 'slow'}", file=sys.stderr, flush=True)


def stream_of(device):
    """A stream on which graphs can be recorded."""
    return torch.cuda.stream(torch.cuda.Stream()) if str(device).startswith("cuda") else contextlib.nullcontext()
