"""The road to llama.cpp: `lowra merge`, then llama.cpp's converter. LLAMA_CPP names the folder of its sources.

The file is run where llama-cpp-python is installed, whose source package has the converter in vendor/llama.cpp.
"""

import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lowra
from lowra.commands import main

HEADS, KEY_HEADS = 4, 2
NAMES = {  # llama.cpp's name of what stands in a block, and Transformers'
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@pytest.fixture
def converter():
    """llama.cpp's script, and the packages it needs."""
    pytest.importorskip("gguf")
    pytest.importorskip("sentencepiece")
    script = pathlib.Path(os.environ.get("LLAMA_CPP", "")) / "convert_hf_to_gguf.py"
    if not script.is_file():
        pytest.skip("LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py")
    return script


def llama_tokenizer(size=261):
    """Pieces as LLaMA's, and bytes for what has none. Of byte-level BPE the converter takes what it knows by hash."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a"]
    pieces += [f"▁{number}" for number in range(len(pieces), size)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def permuted(weight, heads):
    """Rows of q or k as llama.cpp's rotary embedding takes them: the two halves of a head in turn."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def converted(converter, folder, *recipe):
    """The GGUF of a dense model in `folder/dense` that was packed, with an adapter, and merged into `folder/merged`."""
    options = lowra.LowRAConfig(bits=2), lowra.AdapterRecipe(*recipe)
    lowra.quantize_checkpoint(str(folder / "dense"), folder / "packed", *options, progress=False)
    assert not main(["merge", str(folder / "packed" / "initial_adapter"), "--output", str(folder / "merged")])
    target = folder / "merged.gguf"
    command = [sys.executable, converter, folder / "merged", "--outfile", target, "--outtype", "f32"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_a_merged_model_becomes_a_gguf_with_its_weights(converter, tmp_path):
    import gguf

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    config = LlamaConfig(vocab_size=320, bos_token_id=1, eos_token_id=2, **sizes, **heads)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    llama_tokenizer().save_pretrained(tmp_path / "dense")
    reader = gguf.GGUFReader(converted(converter, tmp_path, 4))
    dense = load_file(tmp_path / "merged" / "model.safetensors")
    assert len(reader.tensors) == len(dense) == 2 * len(NAMES) + len(OUTSIDE)
    for tensor in reader.tensors:
        *block, leaf, _ = tensor.name.split(".")
        name = f"model.layers.{block[1]}.{NAMES[leaf]}" if block else OUTSIDE[leaf]
        expected = dense[f"{name}.weight"].float()
        if leaf in ("attn_q", "attn_k"):
            expected = permuted(expected, HEADS if leaf == "attn_q" else KEY_HEADS)
        assert torch.equal(torch.from_numpy(tensor.data.copy()), expected), tensor.name
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("tokenizer.ggml.tokens").contents()[:3] == ["<unk>", "<s>", "</s>"]


@pytest.mark.slow
def test_llama_cpp_answers_as_transformers_does(converter, tmp_path):
    """Greedy tokens of the example model, in float32. They are asked for by number: its tokenizer is one of bytes."""
    llama_cpp = pytest.importorskip("llama_cpp")
    source = pathlib.Path(lowra.__file__).with_name("demo") / "base-6m"
    prompts = ["The city lies on the", "In 1912 he was", "The history of"]
    asked = [AutoTokenizer.from_pretrained(source)(prompt).input_ids for prompt in prompts]
    shutil.copytree(source, tmp_path / "dense", ignore=shutil.ignore_patterns("tokenizer*"))
    llama_tokenizer(AutoConfig.from_pretrained(source).vocab_size).save_pretrained(tmp_path / "dense")
    target = converted(converter, tmp_path, 16)

    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # the cache, usually of float16
    engine = llama_cpp.Llama(str(target), n_ctx=128, n_threads=1, verbose=False, **exact)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for ids in asked:
        answer = engine.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
        options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
        expected = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        assert list(itertools.islice(answer, 32)) == expected
