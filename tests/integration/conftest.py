"""Dense and packed checkpoints of small models, made once for a whole run."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_models import make_model
from transformers import AutoModelForCausalLM

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


@pytest.fixture(scope="session")
def adapted_llama(packed_llama):
    """The packed LLaMA with two adapters whose factors are not zero, "a" on all its linear layers; to be copied."""
    model = AutoModelForCausalLM.from_pretrained(packed_llama)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), "a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def transformers_loads_adapters(tmp_path_factory, dense_llama):
    """Skips where `model.load_adapter` fails on dense models too: Transformers 5.6 with PEFT 0.18."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(dense_llama)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    try:
        AutoModelForCausalLM.from_pretrained(dense_llama).load_adapter(str(folder))
    except ImportError as error:
        pytest.skip(f"Transformers {transformers.__version__} loads no adapters with this PEFT: {error}")
