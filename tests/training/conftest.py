"""Text and recipes that train in a second on the tiny models."""

import json
import random

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

import lowra
from lowra.quantization.calibration import calibrate
from lowra.training import Recipe

_WORDS = "the of and a river stone light house king water small great old north wind field ship day year name".split()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """Folder with train.txt and validation.txt, a sentence a line."""
    folder = tmp_path_factory.mktemp("text")
    for name, lines in (("train", 200), ("validation", 40)):
        (folder / f"{name}.txt").write_text("".join(f"{_sentence(i)}\n" for i in range(lines)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def json_files(tmp_path_factory):
    """Folder with train.jsonl and validation.jsonl: fields text, document, summary."""
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("train", 24), ("validation", 6)):
        lines = []
        for i in range(rows):
            sentence = _sentence(i)
            row = {"text": f"### Human: {sentence} ### Assistant: {sentence}", "document": sentence}
            lines.append(json.dumps({**row, "summary": " ".join(sentence.split()[:3])}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def calibrated(tiny_llama, text_files, tmp_path_factory):
    """A packed base of 1.5 bits without an adapter, calibrated."""
    output = tmp_path_factory.mktemp("calibrated") / "packed"
    calibration = calibrate(str(tiny_llama), text_files / "train.txt", tokens=256)
    config = lowra.LowRAConfig(bits=1.5, sensitivity="fisher")
    lowra.quantize_checkpoint(str(tiny_llama), output, config, None, "cpu", False, calibration=calibration)
    return output


@pytest.fixture
def recipe(tiny_llama, text_files, tmp_path) -> Recipe:
    """Six steps of 4 x 32 tokens in float32."""
    return Recipe(
        model=str(tiny_llama),
        output=str(tmp_path / "run"),
        train_file=str(text_files / "train.txt"),
        validation_file=str(text_files / "validation.txt"),
        rank=4,
        block_size=32,
        source_length=16,
        target_length=64,
        max_steps=6,
        batch_size=4,
        accumulation=1,
        max_eval_samples=8,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        bf16=False,
    )


@pytest.fixture(scope="session")
def tiny_bart(tmp_path_factory, tiny_llama):
    """A random BART of one layer each way, with the tiny model's byte tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "bart"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    BartForConditionalGeneration(
        BartConfig(
            vocab_size=256,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.eos_token_id,
            forced_eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _sentence(seed: int) -> str:
    return " ".join(random.Random(seed).choices(_WORDS, k=12))
