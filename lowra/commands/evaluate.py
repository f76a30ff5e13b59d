"""`lowra evaluate`: perplexity and next-token accuracy of a model on a text file."""

import argparse

from ..checkpoints.dense import empty_model
from ..checkpoints.hub import resolve_folder
from ..corpus import check_token_ids, read_text
from ..generation.loading import check_adapter_folder, load_model, load_tokenizer_for
from ..training.data import Collator, text_blocks
from ..training.evaluation import language_model_metrics
from .ranges import check_range

_BLOCK_SIZE = 1024
_MOST_BLOCKS = 2**16


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError, ValueError: model, adapter or data that cannot be used.
    """
    if args.block_size is not None and args.block_size < 2 or args.batch_size < 1:
        raise ValueError("--block-size must be at least 2 and --batch-size at least 1.")
    check_range(args, "batch_size", 1, _MOST_BLOCKS)
    check_adapter_folder(args.adapter)
    text = read_text(args.data)
    folder = resolve_folder(args.model)
    skeleton = empty_model(folder, args.trust_remote_code)
    if skeleton.config.is_encoder_decoder:
        raise ValueError(
            f"{args.model} is an encoder-decoder, which has no perplexity on running text; `lowra finetune` with "
            "task=summarization measures its summaries."
        )
    limit = getattr(skeleton.config, "max_position_embeddings", None)
    if limit is not None and args.block_size is not None and args.block_size > limit:
        raise ValueError(f"--block-size is {args.block_size}, but {args.model} has {limit} positions.")
    block_size = args.block_size or min(_BLOCK_SIZE, limit or _BLOCK_SIZE)
    tokenizer = load_tokenizer_for(folder, args.adapter, args.trust_remote_code)
    blocks = text_blocks(text, tokenizer, block_size)
    ids = {token for block in blocks for token in block["input_ids"]}
    check_token_ids(ids, skeleton.config, tokenizer, args.data)
    adapter = None if args.adapter is None else str(args.adapter)
    model = load_model(str(folder), adapter, args.device, args.force, args.trust_remote_code)
    metrics = language_model_metrics(model, blocks, Collator(tokenizer), args.batch_size)
    print(f"perplexity {metrics['perplexity']:.4f}")
    print(f"accuracy   {metrics['accuracy']:.4f}")
    print(f"on {metrics['tokens']:,} tokens in {len(blocks)} blocks of {block_size}")
    return {"model": args.model, "adapter": adapter, "data": args.data, **metrics}
