"""Text that a model writes itself, for a calibration without a text of the user's (after LLM-QAT, Liu et al. 2023).

Each sequence begins with a token drawn evenly from the vocabulary, so that no two begin alike, and goes on by the
model's own probabilities, unsharpened: what it writes is what it learned, in the shares in which it learned it.
"""

import inspect
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from .kept_text import KeptText

# Sequences that are written side by side. On a GPU as many as have keys and values of 16 GB, which are 32 of a 7B's.
BATCH_GPU, MOST_GPU, BATCH_CPU = 32, 512, 8
_CACHE_BYTES = 2**34


@torch.no_grad()
def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    *,
    seed: int = 0,
    batch: int | None = None,
    progress: bool = True,
    kept: KeptText | None = None,
) -> torch.Tensor:
    """Token ids [count, length], int64 on the CPU. The end of a document is a token like others: the next one follows.

    Args:
        model: with a cache of keys and values, in memory.
        tokenizer: its own; a token with which it begins every text begins every sequence.
        count: sequences.
        length: tokens of each.
        seed: of what is drawn. Another batch or device draws another text.
        batch: sequences side by side at most; fewer where a GPU has not the memory.
        progress: show a bar.
        kept: what an earlier run has written; what this one writes is put there.

    Raises:
        ValueError: a model that does not write token after token, or whose probabilities are no numbers.
    """
    device = model.get_input_embeddings().get_parameter("weight").device
    was_training = model.training
    model.eval()
    new_cache = _caches_of(model, length)
    batch = batch or (BATCH_CPU if device.type == "cpu" else side_by_side(model.config, length))
    done: list[torch.Tensor] = []
    with tqdm(total=count * length, desc="writing text", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        while (left := count - sum(map(len, done))) > 0:
            number, rows = len(done), min(batch, left)
            found = None if kept is None else kept.load(number, rows, length, seed)
            if found is not None:
                done.append(found)
                bar.update(found.numel())
                continue
            try:
                done.append(_write(model, tokenizer, new_cache(), rows, length, seed + number, bar))
                if kept is not None:
                    kept.save(number, done[-1], seed)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch = (batch + 1) // 2
                bar.n = sum(map(len, done)) * length
    model.train(was_training)
    return torch.cat(done)


def side_by_side(config: PreTrainedConfig, length: int) -> int:
    """Sequences of a length that a GPU writes at once; by the model alone, so that every GPU writes the same."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bytes_of_one = 2 * 2 * text.num_hidden_layers * heads * width * length
    return max(BATCH_GPU, min(MOST_GPU, _CACHE_BYTES // bytes_of_one))


def _caches_of(model: PreTrainedModel, length: int) -> Callable[[], Cache]:
    """Makes caches of the kind that this model takes, for so many tokens.

    Raises:
        ValueError: it takes none.
    """

    def whole() -> Cache:
        # of its whole length from the start: one that grows leaves a GPU's memory in pieces, many times its own size
        return StaticCache(config=model.config, max_cache_len=length)

    def growing() -> Cache:
        return DynamicCache(config=model.config)

    device = model.get_input_embeddings().get_parameter("weight").device
    reason: Exception | None = None
    if "past_key_values" in inspect.signature(model.forward).parameters and not model.config.is_encoder_decoder:
        # a model that is not made for a cache with room to spare may look at the room too (GPT-Neo)
        for kind in (whole, growing) if model._can_compile_fullgraph else (growing,):
            try:
                cache = kind()
                for _ in range(2):
                    token = torch.zeros(1, 1, dtype=torch.long, device=device)
                    model(input_ids=token, past_key_values=cache, use_cache=True)
                return kind
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = error
    raise ValueError(
        f"{type(model).__name__} does not write token after token from keys and values: calibrate on a text of "
        "your own (--calibrate FILE)."
    ) from reason


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    count: int,
    length: int,
    seed: int,
    bar: tqdm,
) -> torch.Tensor:
    table = model.get_input_embeddings().get_parameter("weight")
    vocabulary = min(len(tokenizer), table.shape[0])
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([token for token in range(vocabulary) if token not in special] or list(range(vocabulary)))
    generator = torch.Generator().manual_seed(seed)
    begun = plain[torch.randint(len(plain), (count, 1), generator=generator)]
    if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        begun = torch.cat([torch.full_like(begun, tokenizer.bos_token_id), begun], dim=1)
    written, drawing = begun[:, :length].to(table.device), None
    bar.update(written.numel())
    new = written
    while written.shape[1] < length:
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1, :vocabulary].float()
        drawing = drawing or torch.Generator(logits.device).manual_seed(seed)
        shares = logits.softmax(dim=-1)
        if not shares.sum().isfinite():  # on a GPU drawing from them would end the process
            raise ValueError(
                f"{type(model).__name__} gives probabilities that are NaN: weights of it are NaN or too large for "
                f"{table.dtype}. There is no text in it to calibrate on."
            )
        new = torch.multinomial(shares, 1, generator=drawing).to(table.device)
        written = torch.cat([written, new], dim=1)
        bar.update(count)
    return written.cpu()
