"""Text that a model writes itself, for a calibration without a text of the user's (after LLM-QAT, Liu et al. 2023).

Each sequence begins with a token drawn evenly from the vocabulary, so that no two begin alike, and goes on by the
model's own probabilities, unsharpened: what it writes is what it learned, in the shares in which it learned it.
"""

import inspect

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

# Sequences that are written side by side: their keys and values are in memory, 0.5 GB each for a 7B.
BATCH_GPU, BATCH_CPU = 32, 8


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

    Raises:
        ValueError: a model that does not write token after token.
    """
    arguments = inspect.signature(model.forward).parameters
    if "past_key_values" not in arguments or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} does not write token after token from keys and values: calibrate on a text of "
            "your own (--calibrate FILE)."
        )
    device = model.get_input_embeddings().get_parameter("weight").device
    batch = batch or (BATCH_CPU if device.type == "cpu" else BATCH_GPU)
    was_training = model.training
    model.eval()
    done: list[torch.Tensor] = []
    with tqdm(total=count * length, desc="writing text", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        while (left := count - sum(map(len, done))) > 0:
            try:
                done.append(_write(model, tokenizer, min(batch, left), length, seed + len(done), bar))
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch = (batch + 1) // 2
                bar.n = sum(map(len, done)) * length
    model.train(was_training)
    return torch.cat(done)


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int,
    bar: tqdm,
) -> torch.Tensor:
    table = model.get_input_embeddings().get_parameter("weight")
    vocabulary = min(len(tokenizer), table.shape[0])
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([token for token in range(vocabulary) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    begun = plain[torch.randint(len(plain), (count, 1), generator=generator)]
    if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        begun = torch.cat([torch.full_like(begun, tokenizer.bos_token_id), begun], dim=1)
    # of its whole length from the start: one that grows leaves a GPU's memory in pieces, many times its own size
    cache = StaticCache(config=model.config, max_cache_len=length)
    written, drawing = begun[:, :length].to(table.device), None
    bar.update(written.numel())
    new = written
    while written.shape[1] < length:
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1, :vocabulary].float()
        drawing = drawing or torch.Generator(logits.device).manual_seed(seed)
        new = torch.multinomial(logits.softmax(dim=-1), 1, generator=drawing).to(table.device)
        written = torch.cat([written, new], dim=1)
        bar.update(count)
    return written.cpu()
