"""Loading a packed or dense model with its adapter, and generating text with it."""

import pathlib

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def load_model(folder: str, adapter: str | None = None, device: str | None = None):
    """A causal language model, with an adapter on it if one is given, in evaluation mode.

    Args:
        folder: packed or dense checkpoint, local or on the hub.
        adapter: PEFT adapter folder.
        device: a GPU if there is one.

    Raises:
        FileNotFoundError: a folder is not there or has no model in it.
    """
    for what, path in (("model", folder), ("adapter", adapter)):
        if path is not None and str(path).startswith((".", "/", "~")) and not pathlib.Path(path).expanduser().is_dir():
            raise FileNotFoundError(f"The {what} folder {path} does not exist.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


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


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with a checkpoint."""
    return AutoTokenizer.from_pretrained(folder)
