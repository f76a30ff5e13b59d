"""What all tests share: a small random LLaMA on disk, and the project's example model and data where they are there."""

import pathlib

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import lowra  # noqa: F401 - registers the format

SHARED = pathlib.Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def base_30m() -> pathlib.Path:
    """A really trained LLaMA of 30 million parameters."""
    folder = SHARED / "models" / "base-30m"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, a trained model that is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def wikitext() -> pathlib.Path:
    """Folder with train.txt and validation.txt."""
    folder = SHARED / "data" / "wikitext-2"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, text that is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> pathlib.Path:
    """A random LLaMA checkpoint of 2 layers with a byte tokenizer: hidden 64, intermediate 176 (a tail group)."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
