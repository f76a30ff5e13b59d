"""A small base model and trained-looking adapters on it, made once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

RANK = 8


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_base(seed: int = 0) -> LlamaForCausalLM:
    """Two LLaMA blocks of width 64; the MLP width 200 leaves a group of 128 and one of 72."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def save_adapter(folder, base_folder, seed, **options):
    """Save a LoRA adapter on `make_base()` whose factors have falling singular values, as training leaves them."""
    config = LoraConfig(
        **({"r": RANK, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    )
    model = get_peft_model(make_base(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            decay = 0.7 ** torch.arange(parameter.shape[1])
            parameter.data = torch.randn(parameter.shape) * decay * 0.2
        elif "lora_embedding_A" in name:
            parameter.data = torch.randn(parameter.shape) * 0.2
    model.peft_config["default"].base_model_name_or_path = str(base_folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory, base_folder):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "law", base_folder, seed=1)


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory, base_folder):
    """Three adapters for three tasks, of one shape."""
    above = tmp_path_factory.mktemp("adapters")
    return [save_adapter(above / name, base_folder, seed) for seed, name in enumerate(("law", "news", "code"), start=1)]


@pytest.fixture()
def base():
    return make_base()


@pytest.fixture()
def tokens():
    torch.manual_seed(7)
    return torch.randint(0, 96, (4, 12))
