"""Dense and packed checkpoints of small models, made once for a whole run."""

import pytest
import torch
from small_models import make_model

import lowra


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dense_llama(tmp_path_factory):
    """Folder of a dense LLaMA of two layers, float32."""
    folder = tmp_path_factory.mktemp("dense")
    make_model("LlamaForCausalLM").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed_llama(tmp_path_factory, dense_llama):
    """Folder of the same in 1.5 bits, with its LoftQ adapter of rank 4 in `initial_adapter`."""
    folder = tmp_path_factory.mktemp("packed") / "llama"
    lowra.quantize_checkpoint(
        str(dense_llama), folder, lowra.LowRAConfig(bits=1.5), lowra.AdapterRecipe(rank=4), progress=False
    )
    return folder
