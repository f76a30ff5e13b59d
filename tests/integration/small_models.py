"""One small random model of every architecture the tests cover, under its own config class."""

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lowra.nn.packed_module import PackedModule
from lowra.nn.trained_tables import train_tables

HIDDEN, VOCABULARY = 64, 96

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 104,  # leaves a last group of 40
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_experts": 4, "head_dim": 16}
_SEQ2SEQ_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}

# class -> fields of its config
ARCHITECTURES = {
    "LlamaForCausalLM": _DECODER,
    "MistralForCausalLM": _DECODER,
    "Qwen2ForCausalLM": _DECODER,  # biases on q, k, v
    "Qwen3ForCausalLM": {**_DECODER, "head_dim": 16, "tie_word_embeddings": True},
    "GemmaForCausalLM": {**_DECODER, "head_dim": 16},  # tied embeddings
    "PhiForCausalLM": _DECODER,  # biases everywhere, the head's included
    "OPTForCausalLM": {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "GPT2LMHeadModel": {
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": 104,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "BartForConditionalGeneration": {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 104,
        "decoder_ffn_dim": 104,
        "max_position_embeddings": 64,
        "forced_eos_token_id": 2,
        **_SEQ2SEQ_TOKENS,
    },
    "T5ForConditionalGeneration": {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "d_kv": 16,
        "d_ff": 104,
        "num_layers": 2,
        "num_heads": 4,
        **_SEQ2SEQ_TOKENS,
    },
    "MixtralForCausalLM": {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {**_DECODER, **_EXPERTS},
}


def make_model(architecture: str, seed: int = 0, **changes):
    """A random model on the CPU in evaluation mode; `changes` go to its config."""
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**{**ARCHITECTURES[architecture], **changes})
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # zeros would hide a bias that is lost
    return model


def inputs_of(model, batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Token ids for one forward pass."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    return {"input_ids": tokens}


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    """Logits of `inputs_of`, on the CPU."""
    device = next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    inputs = {name: tokens.to(device) for name, tokens in inputs_of(model).items()}
    return model(**inputs, use_cache=False).logits.cpu()


def packed_layers(model) -> dict[str, PackedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def assert_same_tensors(one, other):
    """The same names, types and bits, on whatever devices."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor.cpu(), second[name].cpu()), name


def losses_of(model, tokens: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Trains on the same tokens again and again."""
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(folder, device, dropout=0.0, tables=False, reentrant=False, **options):
    """A packed model with a LoRA (its options) on all linear layers, to be trained with checkpointing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, **options))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if tables:
        train_tables(model, scales=tables != "shared", shared=tables == "shared")
    return model.train()
