"""Continuing a prompt."""

import torch
from transformers import PreTrainedTokenizerBase


@torch.inference_mode()
def generate_text(
    model, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int, temperature: float, seed: int
) -> str:
    """Continues a prompt; temperature 0 takes the likeliest token every time."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, **sampling)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
