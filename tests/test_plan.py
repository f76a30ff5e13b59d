"""`lowra plan`: what it says of memory against what was measured, and against what the code keeps for backward."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
)

import lowra
from lowra.commands import main, memory
from lowra.commands.plan import longest
from lowra.inspection import requirements, shapes
from lowra.inspection.requirements import LOGITS_AT_ONCE, Run, finetuning, kept_by_block, quantising
from lowra.inspection.shapes import read_shape
from lowra.integrations import tiled_mlp
from lowra.nn.trained_tables import train_tables
from lowra.training import Recipe, head_by_parts
from lowra.training.recipe import load_recipe
from lowra_command.recipe_files import find_recipe

SMALL = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 512}


def save_config(config, folder, name):
    config.architectures, config.dtype = [name], "bfloat16"
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """config.json of LLaMA-2-7B's shape, and nothing else."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    config.max_position_embeddings = 4096
    return save_config(config, tmp_path_factory.mktemp("seven"), "LlamaForCausalLM")


# (batch, length, rank, bits, true bits, GiB at the peak), all measured on one H200 or H100 with a fused AdamW.
MEASURED = [
    # docs/lab/experiments.md, "memory and step time beside QLoRA": two true bits, 26 November 2026
    *((b, n, 64, 1.86, 2.0, gib) for b, n, gib in (
        (1, 256, 4.574), (1, 512, 4.619), (1, 1024, 4.719), (2, 256, 4.619), (2, 512, 4.719), (2, 1024, 5.117),
    )),
    # the same page: two nominal bits, 22 November 2026
    *((b, n, 64, 2.0, None, gib) for b, n, gib in (
        (1, 256, 4.697), (1, 512, 4.737), (1, 1024, 4.838), (2, 256, 4.737), (2, 512, 4.838), (2, 1024, 5.226),
    )),
    # the project's notes on speed: rank 16, one long sequence, two true bits
    (1, 2048, 16, 1.86, 2.0, 3.87), (1, 8192, 16, 1.86, 2.0, 7.66), (1, 32768, 16, 1.86, 2.0, 22.84),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "length", "rank", "bits", "true_bits", "gib"), MEASURED)
def test_the_peak_is_the_measured_one(seven, batch, length, rank, bits, true_bits, gib):
    run = Run(
        rank=rank, batch=batch, length=length, bits=bits, true_bits=true_bits, optimizer="adamw_torch_fused",
        large_workspace=True, whole_logits=True,
    )  # fmt: skip
    assert finetuning(read_shape(seven), run).allocated / 2**30 == pytest.approx(gib, rel=0.03)


def test_what_lies_at_the_peak(seven):
    """The allocator's trace of docs/lab/log.md, "What lies at the peak": 1 x 256, rank 64, MiB."""
    run = Run(rank=64, length=256, optimizer="adamw_torch_fused", large_workspace=True, whole_logits=True)
    found = {name: size / 2**20 for name, size in finetuning(read_shape(seven), run).parts.items()}
    base = found["codes"] + found["tables"] + found["embeddings, head, norms"]
    assert base == pytest.approx(2162, rel=0.005)
    assert found["adapter"] + found["gradients"] + found["optimiser"] == pytest.approx(2421, rel=0.005)
    assert found["workspace of cuBLAS"] == 64
    assert found["a weight made dense"] == 86
    activations = found["activations of a block"] + found["inputs of the blocks"]
    assert activations == pytest.approx(57, rel=0.12)


def test_logits_are_counted_as_finetune_holds_them(seven):
    assert LOGITS_AT_ONCE == head_by_parts._LOGITS
    shape = read_shape(seven)
    by_parts, whole = (finetuning(shape, Run(length=4096, whole_logits=whole)).moments for whole in (False, True))
    assert whole["backward of the loss"] - by_parts["backward of the loss"] > 1.2 * 2**30
    assert whole["backward of the last block"] == by_parts["backward of the last block"]


def test_quantising_holds_what_was_measured(seven):
    """docs/lab/log.md, "The whole way at LLaMA-2-7B's shape": rank 64, GPU peak 1.05 GB, host 1.40 GB."""
    needed = quantising(read_shape(seven), on_gpu=True, rank=64)
    assert needed.device == pytest.approx(1.05e9, rel=0.03)
    assert needed.host == pytest.approx(1.40e9, rel=0.1)


def test_reconstruction_holds_a_block_with_its_optimiser(seven):
    shape = read_shape(seven)
    block = (4 * 4096 * 4096 + 3 * 4096 * 11008) * 52
    for on_gpu, place in ((True, "device"), (False, "host")):
        plain, more = (quantising(shape, on_gpu, rank=64, reconstruct_tokens=asked) for asked in (0, 131_072))
        assert block < getattr(more, place) < block + 9e9 and getattr(more, place) > getattr(plain, place)


def test_all_blocks_together_hold_embeddings_and_head_where_these_learn_too(seven):
    shape = read_shape(seven)
    table, blocks = 32000 * 4096, sum(linear.size for linear in shape.linears)
    for packed, learning in (({}, 2), ({"head": True}, 1), ({"head": True, "embeddings": True}, 0)):
        needed = quantising(shape, True, end_to_end=True, **packed)
        assert needed.device == 36 * (blocks + learning * table) + 4 * (shape.parameters - blocks - learning * table)
        state = 12 * (blocks + learning * table)  # on its way to the disk
        assert state < needed.host < state + 1.5e9
        assert quantising(shape, False, end_to_end=True, **packed).host > needed.device


CONFIGS = {
    "llama": (LlamaConfig(intermediate_size=704, num_key_value_heads=1, **SMALL), "LlamaForCausalLM"),
    "qwen3": (Qwen3Config(intermediate_size=704, num_key_value_heads=1, head_dim=128, **SMALL), "Qwen3ForCausalLM"),
    "opt": (OPTConfig(ffn_dim=1024, word_embed_proj_dim=256, activation_function="gelu", **SMALL), "OPTForCausalLM"),
}


@pytest.mark.parametrize(("kind", "tables"), [*((kind, "frozen") for kind in CONFIGS), ("llama", "shared")])
def test_a_block_keeps_what_the_plan_says(kind, tables, tmp_path):
    """Everything that autograd saves, each memory once, without parameters."""
    config, name = CONFIGS[kind]
    shape = read_shape(save_config(config, tmp_path / "config", name))
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    packed = tmp_path / "packed"
    adapter = lowra.AdapterRecipe(8, method="lora")
    lowra.quantize_checkpoint(str(tmp_path / "dense"), packed, lowra.LowRAConfig(), adapter, "cpu", progress=False)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, packed / "initial_adapter", is_trainable=True)
    if tables == "shared":
        train_tables(model, shared=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # where the rows of packed weights stand
        if isinstance(module, lowra.LowRALinear):
            known.add(module.row_order().untyped_storage().data_ptr())
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = 256
    embedded = torch.randn(1, tokens, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
    body = model.get_base_model().model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        body(inputs_embeds=embedded, use_cache=False)
    found = sum(storage.nbytes() for place, storage in saved.items() if place not in known)
    last_norm = 4 * shape.hidden
    run = Run(rank=8, length=tokens, tables=tables, checkpointing=False)
    expected = tokens * (shape.layers * kept_by_block(shape, run) + last_norm)
    expected += finetuning(shape, run).parts.get("scales as trained", 0.0)
    if kind == "opt":  # autocast runs LayerNorm in float32 on a GPU, and on a CPU in bfloat16, half of which it keeps
        expected -= tokens * 2 * shape.hidden * (shape.norms * shape.layers + 1)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.fixture(scope="module")
def tiny_packed(tiny_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("plan") / "packed"
    lowra.quantize_checkpoint(str(tiny_llama), output, lowra.LowRAConfig(), lowra.AdapterRecipe(4), "cpu", False)
    return output


def last_object(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_more_bits_and_more_tokens_need_more(seven):
    shape = read_shape(seven)
    needs = [finetuning(shape, Run(bits=bits)).on_card for bits in (1.25, 1.5, 2, 3, 4, 16)]
    assert needs == sorted(needs)
    size = finetuning(shape, Run(length=1024)).on_card
    assert longest(shape, Run(), size) == 1024
    assert longest(shape, Run(), size * 100) == 4096  # positions
    assert longest(shape, Run(), 2**30) == 0


def test_plan_says_what_fits_and_what_to_run(seven, tiny_packed, capsys):
    assert main(["plan", seven, "--gpu", "8GB", "--json"]) == 0
    plan = last_object(capsys)
    assert plan["fits"] and plan["chosen"]["bits"] == 4
    assert any(f"--bits {plan['chosen']['bits']:g}" in command for command in plan["commands"])
    assert main(["plan", seven, "--gpu", "3GB", "--length", "4096", "--json"]) == 1
    assert not last_object(capsys)["fits"]
    assert main(["plan", seven, "--json"]) == 0
    assert set(last_object(capsys)["cards"][0]["tokens"]) == {"8", "12", "16", "24", "48", "80"}
    assert main(["plan", str(tiny_packed), "--gpu", "8GB", "--json"]) == 0
    plan = last_object(capsys)
    assert plan["fits"] and len(plan["commands"]) == 1 and "finetune" in plan["commands"][0]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """config.json of Llama-3.1-8B's shape."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256, num_key_value_heads=8,
        max_position_embeddings=131072,
    )  # fmt: skip
    return save_config(config, tmp_path_factory.mktemp("eight"), "LlamaForCausalLM")


def test_long_contexts_are_counted(eight):
    shape = read_shape(eight)
    asked = Run(rank=32, bits=1.86, true_bits=2.0, embeddings=True, head=True, optimizer="adamw_8bit", length=60_000)
    needs = {}
    for offload, tiled in ((False, False), (False, True), (True, False), (True, True)):
        needs[offload, tiled] = finetuning(shape, dataclasses.replace(asked, offload=offload, tiled_mlp=tiled))
    sizes = [need.allocated for need in needs.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 3
    assert needs[True, True].host == 32 * 60_000 * 4096 * 2 and not needs[False, True].host
    kept = {key: need.parts["inputs of the blocks"] for key, need in needs.items()}
    assert kept[True, True] == kept[False, False] / 16  # two of 32
    both = dataclasses.replace(asked, offload=True, tiled_mlp=True)
    for card, tokens in ((8, 16_000), (16, 60_000), (24, 100_000)):  # the project's goals
        assert (
            longest(shape, both, memory.named_card(f"{card}GB").size)
            > tokens
            > longest(shape, asked, memory.named_card(f"{card}GB").size)
        )
    packed = finetuning(shape, dataclasses.replace(both, packing=True))
    assert packed.parts["attention mask"] == 3 * 60_000**2


def test_a_tile_is_what_is_planned():
    assert requirements._TILE == tiled_mlp.TILE


def test_plan_says_which_option_makes_a_length_fit(eight, capsys):
    asked = ["plan", eight, "--gpu", "16GB", "--rank", "32", "--bits", "2", "--optimizer", "adamw_8bit"]
    assert main([*asked, "--length", "60000"]) == 1
    assert "with offload_activations=true tiled_mlp=true it would" in capsys.readouterr().out
    assert main([*asked, "--length", "60000", "--offload-activations", "--tiled-mlp", "--json"]) == 0
    plan = last_object(capsys)
    assert plan["fits"] and not plan["longer"] and plan["needed"]["host"] > 14 * 2**30
    assert "offload_activations=true tiled_mlp=true" in plan["commands"][-1]
    assert main([*asked, "--json"]) == 0
    longer = last_object(capsys)["longer"]
    assert [row["options"] for row in longer][-1] == "offload_activations=true tiled_mlp=true"
    assert [row["tokens"] for row in longer] == sorted(row["tokens"] for row in longer)
    assert main([*asked, "--offload-activations", "--no-checkpointing"]) == 2
    assert "leave out --no-checkpointing" in capsys.readouterr().err


def test_a_model_without_plain_mlps_has_none_to_tile(tmp_path, capsys):
    folder = save_config(CONFIGS["opt"][0], tmp_path / "opt", "OPTForCausalLM")
    assert main(["plan", folder, "--gpu", "8GB", "--tiled-mlp"]) == 2
    assert "has no MLP that is known to work token by token" in capsys.readouterr().err
    recipe = Recipe(model=folder, dataset="x", tiled_mlp=True)
    with pytest.raises(ValueError, match="tiled_mlp=true: .* has no MLP"):
        memory.run_of(recipe, read_shape(folder), None)


@pytest.mark.parametrize("card", ["0.4GB", "400 MiB", "410M"])
def test_what_does_not_fit_is_said_to_scripts_too(seven, tiny_packed, card, capsys):
    """One number for the bits, and no rank proposed that the folder cannot have."""
    for model in (seven, str(tiny_packed)):
        assert main(["plan", model, "--gpu", card]) == 1
        said = capsys.readouterr().out.strip().splitlines()
        assert said[-1].startswith("This does not fit a card of 0.")
    rank, bits = re.search(r"at rank (\d+)", said[1])[1], re.search(r"^([\d.]+) bits, 1 x", "\n".join(said), re.M)[1]
    assert f"even {bits} bits, rank {rank} and" in said[-1]
    assert main(["plan", str(tiny_packed)]) == 0  # no card was asked for


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_plan_is_what_its_command_will_need(tiny_packed, tmp_path, capsys, calibrated):
    """Of a small vocabulary the evaluation's logits are the peak, which the command counts."""
    folder = tmp_path / "packed"
    shutil.copytree(tiny_packed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["calibration"] = "a digest" if calibrated else None
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(folder), "--gpu", "8GB", "--json"]) == 0
    plan = last_object(capsys)
    assert plan["chosen"]["tables"] == ("shared" if calibrated else "frozen")
    assert plan["needed"]["parts"].keys().isdisjoint({"trained tables"}) == (not calibrated)
    fields = [word for word in plan["commands"][0].split()[3:] if not word.startswith("train_file")]
    recipe = load_recipe(find_recipe("8gb-chat"), fields)
    shape = read_shape(str(folder))
    run = memory.run_of(recipe, shape, memory.named_card("8GB"))
    assert finetuning(shape, run).on_card == plan["needed"]["on_card"]
    frozen = memory.run_of(dataclasses.replace(recipe, tables="frozen"), shape, memory.named_card("8GB"))
    assert (finetuning(shape, frozen).allocated < finetuning(shape, run).allocated) == calibrated


def test_a_plan_to_calibrate_counts_the_tables_that_are_trained_then(seven, capsys):
    for bits, tables in (("1.5", "shared"), ("2", "frozen")):
        assert main(["plan", seven, "--gpu", "8GB", "--bits", bits, "--json"]) == 0
        plan = last_object(capsys)
        assert plan["chosen"]["tables"] == tables
        assert ("--calibrate" in plan["commands"][0]) == (tables == "shared")


def test_a_plan_says_what_frozen_tables_would_let_fit(seven, capsys):
    def planned(*options):
        main(["plan", seven, "--gpu", "4GB", "--bits", "1.5", "--rank", "16", "--json", *options])
        return last_object(capsys)

    usual, frozen = planned(), planned("--tables", "frozen")
    longer = {row["options"]: row["tokens"] for row in usual["longer"]}
    assert longer["tables=frozen"] == frozen["longest"][0]["tokens"] > usual["longest"][0]["tokens"]
    assert frozen["chosen"]["tables"] == "frozen" and frozen["commands"][1].endswith(" tables=frozen")
    assert "tables=" not in usual["commands"][1] and "tables=frozen" not in {row["options"] for row in frozen["longer"]}
    shape, size = read_shape(seven), memory.named_card("4GB").size
    tight = dataclasses.replace(Run(**usual["chosen"]), length=frozen["longest"][0]["tokens"])
    assert memory.option_words(memory.fitting_option(shape, tight, size), tight) == "tables=frozen"


def test_shared_tables_cost_what_is_kept_for_them(seven):
    """No gradient of a dense weight, some numbers of a channel or an input group, and a byte of each output."""
    shape, asked = read_shape(seven), Run(bits=1.5, optimizer="adamw_torch_fused", accumulation=4)
    frozen, shared, levels = (dataclasses.replace(asked, tables=tables) for tables in ("frozen", "shared", "levels"))
    before_the_last, last, groups = 4 * 4096 + 2 * 11008, 4096, 6 * 64 + 172  # of a block
    needs = [finetuning(shape, run) for run in (frozen, shared, levels)]
    assert needs[0].moment == needs[1].moment == "backward of the last block"
    more = {name: size - needs[0].parts.get(name, 0) for name, size in needs[1].parts.items()}
    trained = 4 * 32 * (2 * before_the_last + last + groups)
    assert more["trained tables"] == trained and more["optimiser"] == 2 * trained
    assert more["gradients"] == trained and more["a weight made dense"] == 0
    assert more["scales as trained"] == 4 * (64 * (4 * 4096 + 2 * 11008) + 172 * 4096)
    assert kept_by_block(shape, shared) - kept_by_block(shape, frozen) == before_the_last
    assert more["activations of a block"] == 1024 * before_the_last
    assert needs[0].allocated < needs[1].allocated < needs[2].allocated
    assert (
        kept_by_block(shape, dataclasses.replace(shared, bf16=False))
        - kept_by_block(shape, dataclasses.replace(frozen, bf16=False))
        == 4 * before_the_last
    )
    tiled, plain = (
        finetuning(shape, dataclasses.replace(run, tiled_mlp=True, length=8192)).parts["activations of a block"]
        for run in (shared, frozen)
    )
    assert tiled - plain == 8192 * 4 * 4096 + 4096 * 2 * 11008  # of the MLP those of a tile
    whole = dataclasses.replace(shared, checkpointing=False)  # every block keeps its own
    assert finetuning(shape, whole).parts["scales as trained"] == 32 * more["scales as trained"]


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (MixtralConfig(intermediate_size=64, num_local_experts=2, **SMALL), "MixtralForCausalLM", "experts"),
        (Gemma2Config(intermediate_size=64, head_dim=128, **SMALL), "Gemma2ForCausalLM", "attention scores"),
        (BartConfig(d_model=32, encoder_layers=1, decoder_layers=1), "BartForConditionalGeneration", "language model"),
    ],
)
def test_what_is_not_known_is_not_guessed(config, name, reason, tmp_path, capsys):
    folder = save_config(config, tmp_path / "model", name)
    assert main(["plan", folder, "--gpu", "8GB"]) == 2
    assert reason in capsys.readouterr().err
    assert memory.shape_if_known(folder, trust_remote_code=False) is None
    assert f"not known beforehand: {folder}" in capsys.readouterr().out


def test_of_a_hub_name_only_the_config_is_fetched(seven, monkeypatch, capsys):
    asked = []

    def fetch(name, file):
        asked.append((name, file))
        return f"{seven}/{file}"

    monkeypatch.setattr(shapes, "hf_hub_download", fetch)
    assert main(["plan", "someone/seven", "--gpu", "24GB"]) == 0
    assert asked == [("someone/seven", "config.json")]
    assert "fits a card of 24 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "eight"], "such as 8GB"),
        (["--gpu", "0GB"], "such as 8GB"),
        (["--gpu", "8"], "with its unit"),
        (["--bits", "0.5"], "--bits must be from 1 to 4"),
        (["--length", "5000"], "4096 positions"),
        (["--rank", "0"], "--rank must be at least 1"),
    ],
)
def test_plan_refuses(seven, arguments, message, capsys):
    assert main(["plan", seven, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_refused_early(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "host_bytes", lambda: 1e6)
    output = tmp_path / "out"
    quantize = ["quantize", str(tiny_llama), "--device", "cpu", "--output", str(output)]
    assert main(quantize) == 2
    assert "--no-memory-check" in capsys.readouterr().err and not output.exists()
    text = tmp_path / "text.txt"
    text.write_text("A line of text to train on, again and again.\n" * 50)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_llama}\ntrain_file: {text}\nvalidation_file: {text}\noutput: {tmp_path / 'run'}\n"
        "block_size: 32\nbatch_size: 1\naccumulation: 1\nmax_steps: 1\nrank: 4\n"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["finetune", str(recipe)]) == 2
    assert "This fine-tuning needs about" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main(["finetune", str(recipe), "--no-memory-check"]) == 0
    assert "memory: fine-tuning needs about" in capsys.readouterr().out
