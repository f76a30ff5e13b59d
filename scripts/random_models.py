"""LLaMA-shaped models of random weights, in 16 bits, as NF4 or packed: what the benchmarks run."""

import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lowra
from bitsandbytes.backends.lowra import layout
from lowra.nn.embedding import LowRAEmbedding
from lowra.weights.packed import PackedWeight

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 512),  # to try a script on a CPU
    "narrow": (256, 704, 32, 4, 4, 512),  # as many layers as a 7B, whose products take a CPU next to nothing
    "tinyllama": (2048, 5632, 22, 32, 4, 32000),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "33b": (6656, 17920, 60, 52, 52, 32000),
    "65b": (8192, 22016, 80, 64, 64, 32000),
    "70b": (8192, 28672, 80, 64, 8, 128256),
}
MIXES = {
    1.15: (0.0, 0.15),
    1.25: (0.0, 0.25),
    1.5: (0.0625, 0.3125),
    1.86: (0.1, 0.56),  # two true bits at the widths of an 8B
    2.0: (0.125, 0.625),
    2.5: (0.3125, 0.5625),
    3.0: (0.5, 0.5),
    4.0: (1.0, 0.0),
}  # rows of 4 and of 2 bits
GPU = "cuda"


def random_packed(rows: int, columns: int, bits: float, device: str = GPU) -> PackedWeight:
    """A packed weight of about the size that real ones have, rows of each precision at random places."""
    share4, share2 = MIXES[bits]
    four, two = round(rows * share4), round(rows * share2)
    row_bits = torch.tensor([4] * four + [2] * two + [1] * (rows - four - two), dtype=torch.uint8)[torch.randperm(rows)]
    groups = layout.group_count(columns, 64)
    size = layout.codes_size(rows, four, two, columns)
    codes = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    scales = torch.randint(200, 256, (rows, groups), dtype=torch.uint8, device=device)
    steps = torch.full((layout.scale_step_count(rows, columns, 64),), 0.05 / 255**2, device=device)
    levels = [torch.linspace(-1, 1, 2**b).repeat(n) for b, n in ((4, four), (2, two), (1, rows - four - two))]
    return PackedWeight(codes, row_bits.to(device), scales, steps, torch.cat(levels).half().to(device), columns, 64)


def model_config(shape: str, positions: int = 4096) -> LlamaConfig:
    """The config.json of a shape."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        eos_token_id=None,
        pad_token_id=0,
    )


def make_model(
    shape: str,
    base: str | float,
    positions: int = 4096,
    device: str = GPU,
    kept: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """A model whose layers are made on the device: dense ("bf16"), "NF4", or packed at so many bits.

    Args:
        kept: where each layer goes once it is made, if not on the device.
        dtype: of what is dense, and of the computation.
    """
    config = model_config(shape, positions)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    if base == "NF4":
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            rows, columns = module.out_features, module.in_features
            if isinstance(base, float):
                packed = lowra.LowRALinear.from_packed(random_packed(rows, columns, base, device))
                packed.compute_dtype = dtype
                model.set_submodule(name, packed)
            elif base == "NF4":
                import bitsandbytes

                weight = torch.randn(rows, columns, dtype=dtype, device=device).mul_(0.02)
                module.weight = bitsandbytes.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True
                ).to(device)
            else:
                module.weight = nn.Parameter(torch.randn(rows, columns, dtype=dtype, device=device).mul_(0.02))
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(torch.randn(module.weight.shape, dtype=dtype, device=device).mul_(0.02))
        elif type(module).__name__.endswith("RMSNorm"):  # Liger's, where an earlier model of the process has it
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device))
        if kept is not None and list(module.parameters(recurse=False)):
            model.get_submodule(name).to(kept)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(kept or device)
    return model.requires_grad_(False).eval()


def pack_tables(model: nn.Module, bits: float, device: str = GPU, dtype: torch.dtype = torch.bfloat16) -> None:
    """Random packed embeddings and head in the place of a model's own."""
    packed = random_packed(*model.get_input_embeddings().weight.shape, bits, device)
    sizes = packed.in_features, packed.row_bits.numel(), packed.group_size
    table = LowRAEmbedding(*sizes, packed.tensors(), dtype)
    table.prepare()
    model.set_input_embeddings(table)
    pack_head(model, bits, device, dtype)


def pack_head(model: nn.Module, bits: float, device: str = GPU, dtype: torch.dtype = torch.bfloat16) -> None:
    """A random packed head in the place of a model's own."""
    head = lowra.LowRALinear.from_packed(random_packed(*model.get_output_embeddings().weight.shape, bits, device))
    head.compute_dtype = dtype
    model.set_output_embeddings(head)
