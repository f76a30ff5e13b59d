"""vLLM itself on packed folders: the server with a client, architectures, two ranks, and what it refuses.

It pins another Transformers than this environment has: `make test-vllm` runs these in one of its own.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

import other_processes
import pytest
import torch
import transformers
from byte_tokenizer import byte_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lowra
from lowra.nn.trained_tables import bake_tables, train_tables

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

ROOT = pathlib.Path(lowra.__file__).parents[1]
PROMPTS = [[1, 17, 33, 5], [1, 60, 4], [1, 9, 9, 41, 22, 8, 13]]
TOKENS = 12

SMALL = {  # every head of 32: vLLM's attention on a processor knows none of 16
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 208}
OPT = {**SMALL, "word_embed_proj_dim": 128, "ffn_dim": 208}
LAYERS = {  # fields of the model's config and of the packing
    "Qwen2ForCausalLM": (SMALL, {"quantize_head": True}),  # biases; a head of its own
    "Qwen3ForCausalLM": ({**SMALL, "head_dim": 32, "tie_word_embeddings": True}, {"scales": "float16"}),  # dense, tied
    "GemmaForCausalLM": ({**SMALL, "head_dim": 32}, {"quantize_embeddings": True}),  # packed, tied, scaled
    "GPT2LMHeadModel": (
        {**GPT2, "bos_token_id": 1, "eos_token_id": 2},
        {"scales": "float32"},
    ),  # Conv1D, q, k, v in one
    "Phi3ForCausalLM": (SMALL, {}),  # q, k, v and gate, up in one
    "OPTForCausalLM": (OPT, {"quantize_head": False}),
}


def run(command, **environment):
    """In a process of its own."""
    surroundings = other_processes.environment(VLLM_CPU_KVCACHE_SPACE="1", **environment)
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=1500)


def answers_of_vllm(folder, adapter=None, **options):
    asked = {"model": str(folder), "prompts": PROMPTS, "tokens": TOKENS, "options": options}
    if adapter is not None:
        asked |= {"adapter": str(adapter), "options": {**options, "enable_lora": True}}
    ranks = options.get("tensor_parallel_size", 1)
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}
    return run([pathlib.Path(__file__).parent / "vllm_worker.py", json.dumps(asked)], **cores)


@torch.inference_mode()
def answers_of_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        for _ in range(TOKENS):
            tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(tokens[0, len(prompt) :].tolist())
    return answers


def packed(architecture, folder, fields=None, recipe=None, **packing):
    """A random model of one architecture, packed, with an initial adapter where there is a recipe for one."""
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**(LAYERS[architecture][0] if fields is None else fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # zeros would hide a bias that is lost
    model.save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    config = lowra.LowRAConfig(bits=2, **packing)
    lowra.quantize_checkpoint(str(folder / "dense"), folder / "packed", config, recipe, progress=False)
    return folder / "packed"


def assert_answers(done, folder):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (answers,) = (line for line in done.stdout.splitlines() if line.startswith("[["))  # vLLM logs there too
    assert json.loads(answers) == answers_of_transformers(folder)


@pytest.mark.parametrize("architecture", LAYERS)
def test_architectures_answer_as_in_transformers(architecture, tmp_path):
    folder = packed(architecture, tmp_path, **LAYERS[architecture][1])
    assert_answers(answers_of_vllm(folder), folder)


@pytest.mark.parametrize(
    ("architecture", "packing"),
    [("Phi3ForCausalLM", {}), ("Qwen2ForCausalLM", {"quantize_head": True, "quantize_embeddings": True})],
)
def test_two_ranks_answer_as_in_transformers(architecture, packing, tmp_path):
    """Rows of what is merged on disk and of what vLLM merges, columns, a head and embeddings of 96 rows in 128."""
    folder = packed(architecture, tmp_path, **packing)
    assert_answers(answers_of_vllm(folder, tensor_parallel_size=2), folder)


def test_tables_that_were_trained_into_a_base_count(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed("LlamaForCausalLM", tmp_path, SMALL))
    before = answers_of_transformers(tmp_path / "packed")
    layers = [module for module in model.modules() if isinstance(module, lowra.LowRALinear)]
    for layer in layers:
        layer.levels.data += torch.randn(layer.levels.shape, generator=torch.Generator().manual_seed(1)).half()
        layer.prepare()
    model.save_pretrained(tmp_path / "trained")
    assert answers_of_transformers(tmp_path / "trained") != before
    assert_answers(answers_of_vllm(tmp_path / "trained"), tmp_path / "trained")


@pytest.mark.parametrize("options", [[], ["--embeddings", "--scales", "float16"]])
def test_a_server_answers_32_at_once_and_adapters_by_name(options):
    """Compiled, as it is without flags; the script compares with Transformers and ends with 1 where they differ."""
    done = run([ROOT / "scripts" / "serve_vllm.py", *options])
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert done.stdout.count("8 of 8 greedy answers of 32 tokens are Transformers', 8 of 8 are the same among 32") == 2


REFUSALS = {
    "columns": (
        "LlamaForCausalLM",
        {**SMALL, "intermediate_size": 200},
        {},
        {"tensor_parallel_size": 2},
        "cannot be cut at column 100: a cut takes a multiple of 8. Serve with another tensor-parallel size.",
    ),
    "partly dense": (
        "LlamaForCausalLM",
        SMALL,
        {"modules_to_not_convert": ["v_proj"]},
        {},
        "as one layer, and of these model.layers.0.self_attn.v_proj is dense: pack all of them, or none",
    ),
    "experts": (
        "MixtralForCausalLM",
        {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
        {},
        {},
        "holds packed experts, which lowra does not serve in vLLM",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_served_is_refused_in_a_sentence(what, tmp_path):
    architecture, fields, packing, options, message = REFUSALS[what]
    done = answers_of_vllm(packed(architecture, tmp_path, fields, **packing), **options)
    assert done.returncode != 0 and message in done.stdout + done.stderr, done.stderr[-6000:]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = packed("LlamaForCausalLM", tmp_path, SMALL)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = answers_of_vllm(folder)
    assert done.returncode != 0 and "has other bytes than were written" in done.stdout + done.stderr


def test_an_adapter_of_another_packing_is_refused(tmp_path):
    folders = []
    for name, refine in (("one", 0), ("other", 2)):
        (tmp_path / name).mkdir()
        recipe = lowra.AdapterRecipe(rank=8)
        folders.append(packed("LlamaForCausalLM", tmp_path / name, SMALL, recipe=recipe, refine=refine))
    done = answers_of_vllm(folders[0], adapter=folders[1] / "initial_adapter")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "belongs to another packing of the same base" in said and "refine=2 vs 0" in said
    assert "packed together with an initial adapter (loftq, rank 8)" in said


def test_an_adapter_with_tables_is_refused(tmp_path):
    folder = packed("LlamaForCausalLM", tmp_path, SMALL, recipe=lowra.AdapterRecipe(rank=8))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "initial_adapter")
    train_tables(model)
    bake_tables(model)
    model.save_pretrained(tmp_path / "adapter")
    done = answers_of_vllm(folder, adapter=tmp_path / "adapter")
    assert done.returncode != 0
    assert "with levels and scales of its own (tables.safetensors)" in done.stdout + done.stderr
    assert "`lowra merge` makes a dense model of both" in done.stdout + done.stderr
