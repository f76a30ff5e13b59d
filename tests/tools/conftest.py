"""A packed checkpoint as a user has it: with its tokenizer and its initial adapter."""

import pytest

import lowra


@pytest.fixture(scope="session")
def packed_with_tokenizer(tmp_path_factory, tiny_llama):
    """Folders of a dense LLaMA of two layers, and of the same in 1.5 bits with a LoftQ adapter of rank 4."""
    folder = tmp_path_factory.mktemp("tools") / "packed"
    config, recipe = lowra.LowRAConfig(bits=1.5), lowra.AdapterRecipe(rank=4)
    lowra.quantize_checkpoint(str(tiny_llama), folder, config, recipe, progress=False)
    return tiny_llama, folder
