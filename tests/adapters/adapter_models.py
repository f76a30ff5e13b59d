"""A small base model, and adapters on it that look trained."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

RANK = 8


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
