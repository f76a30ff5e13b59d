"""Packed embeddings and heads: tied and untied, looked up row by row, saved and loaded, and taken apart again."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import ARCHITECTURES, VOCABULARY, assert_same_tensors, inputs_of, logits_of, losses_of, make_model

import lowra
from lowra.nn.embedding import LowRAEmbedding

TIED = {"tie_word_embeddings": True}
WITH_EMBEDDINGS = lowra.LowRAConfig(bits=1.5, quantize_embeddings=True)


def pack(architecture, folder, config=WITH_EMBEDDINGS, **changes):
    dense = make_model(architecture, **changes)
    dense.save_pretrained(folder / "dense")
    report = lowra.quantize_checkpoint(str(folder / "dense"), folder / "packed", config, progress=False)
    return dense, load(architecture, folder / "packed"), report


def load(architecture, folder, **options):
    return getattr(transformers, architecture).from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
@pytest.mark.parametrize("group_size", [64, 24])
def test_rows_are_those_of_the_dequantised_table(tmp_path, scales, group_size):
    config = lowra.LowRAConfig(bits=2.0, scales=scales, group_size=group_size, quantize_embeddings=True)
    _, model, _ = pack("LlamaForCausalLM", tmp_path, config)
    table = model.get_input_embeddings()
    assert isinstance(table, LowRAEmbedding) and len(table.row_bits.unique()) > 1
    indices = torch.randint(table.num_embeddings, (3, 50), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        table.to(dtype)
        assert torch.equal(table(indices), table.dequantize(dtype)[indices])
    assert table(indices[:, :0]).shape == (3, 0, table.embedding_dim)
    assert torch.equal(table(indices.int()), table(indices))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip(architecture, tmp_path, tied):
    dense, packed, report = pack(architecture, tmp_path, tie_word_embeddings=tied)
    logits = logits_of(packed)
    assert torch.isfinite(logits).all()
    table, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    tied = tied or architecture.startswith("T5")  # always
    assert isinstance(head, lowra.LowRALinear) == tied
    if tied:
        assert head.weight is table.weight and head.scales is table.scales
    parameters = dense.get_input_embeddings().weight.numel()
    without = lowra.LowRAConfig(bits=1.5)
    plain = lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "plain", without, progress=False)
    assert report["quantised_parameters"] == plain["quantised_parameters"] + parameters

    packed.save_pretrained(tmp_path / "again")
    again = load(architecture, tmp_path / "again")
    assert_same_tensors(packed, again)
    assert torch.equal(logits_of(again), logits)
    loaded = load(architecture, tmp_path / "dense", quantization_config=lowra.LowRAConfig(**vars(WITH_EMBEDDINGS)))
    assert_same_tensors(packed, loaded)
    assert torch.equal(logits_of(loaded), logits)
    loaded.save_pretrained(tmp_path / "loaded")
    assert torch.equal(logits_of(load(architecture, tmp_path / "loaded")), logits)

    loaded.dequantize()
    torch.testing.assert_close(logits_of(loaded), logits, rtol=1e-4, atol=1e-5)
    if tied:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_gemma_3_scales_its_embeddings(tmp_path):
    config = transformers.Gemma3TextConfig(**{**ARCHITECTURES["GemmaForCausalLM"], "vocab_size": 96})
    model = transformers.Gemma3ForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "dense")
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", WITH_EMBEDDINGS, progress=False)
    packed = load("Gemma3ForCausalLM", tmp_path / "packed")
    table = packed.get_input_embeddings()
    indices = inputs_of(packed)["input_ids"]
    rows = table(indices)
    assert table.scale == 8.0 and torch.equal(rows, table.dequantize(torch.bfloat16)[indices] * 8)
    packed.dequantize()
    assert torch.equal(packed.get_input_embeddings()(indices), rows)


def test_both_head_and_embeddings_untied(tmp_path):
    config = lowra.LowRAConfig(bits=1.5, quantize_embeddings=True, quantize_head=True)
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, config)
    table, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert isinstance(table, LowRAEmbedding) and isinstance(head, lowra.LowRALinear)
    assert head.weight is not table.weight


def test_a_tied_head_alone_is_refused(tmp_path):
    make_model("LlamaForCausalLM", **TIED).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantize_embeddings=True"):
        load("LlamaForCausalLM", tmp_path, quantization_config=lowra.LowRAConfig(quantize_head=True))


def test_a_tied_head_comes_with_the_embeddings(tmp_path):
    config = lowra.LowRAConfig(bits=1.5, quantize_embeddings=True, quantize_head=True)
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, config, **TIED)
    assert packed.get_output_embeddings().weight is packed.get_input_embeddings().weight


def test_other_heads_and_the_bare_model(tmp_path):
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, **TIED)
    for name in ("LlamaModel", "LlamaForSequenceClassification"):
        other = load(name, tmp_path / "packed")
        table = other.get_input_embeddings()
        assert torch.equal(table.weight, packed.get_input_embeddings().weight)
        assert torch.isfinite(other(torch.arange(3, 9)[None])[0]).all()


def test_disk_offload(tmp_path):
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, **TIED)
    places = {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers": "cpu", "model.norm": "cpu"}
    options = {"device_map": {**places, "model.rotary_emb": "cpu"}, "offload_folder": tmp_path / "offload"}
    try:
        logits_of(load("LlamaForCausalLM", tmp_path / "dense", **options))
    except KeyError as error:
        pytest.skip(f"Transformers {transformers.__version__} offloads no tied head of a dense model either: {error}")
    model = load("LlamaForCausalLM", tmp_path / "packed", **options)
    assert torch.equal(logits_of(model), logits_of(packed))


@pytest.mark.parametrize("original", [False, True], ids=["dequantised", "original"])
def test_adapters_train_and_merge(tmp_path, original):
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, **TIED)
    model = get_peft_model(lowra.prepare_for_training(packed), LoraConfig(r=4, target_modules="all-linear"))
    assert not any("embed" in name or "head" in name for name, p in model.named_parameters() if p.requires_grad)
    tokens = inputs_of(model)["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = losses_of(model, tokens, optimizer, steps=3)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load("LlamaForCausalLM", tmp_path / "packed"), tmp_path / "adapter").eval()
    logits = logits_of(model)
    merged = lowra.merge_into_dense(model, original=tmp_path / "dense" if original else None)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    if original:
        dense = load("LlamaForCausalLM", tmp_path / "dense")
        assert torch.equal(merged.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    else:
        torch.testing.assert_close(logits_of(merged), logits, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(load("LlamaForCausalLM", tmp_path / "merged")), logits_of(merged))


def test_compiled_lookup(tmp_path):
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, **TIED)
    table, indices = packed.get_input_embeddings(), torch.arange(3, 60)[None]
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices), table(indices))


def test_a_checkpoint_that_holds_the_tied_weight_as_the_head(tmp_path):
    from safetensors.torch import load_file, save_file

    _, packed, _ = pack("LlamaForCausalLM", tmp_path, **TIED)
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "other", WITH_EMBEDDINGS, progress=False)
    assert_same_tensors(load("LlamaForCausalLM", tmp_path / "other"), packed)
    loaded = load("LlamaForCausalLM", tmp_path / "dense", quantization_config=WITH_EMBEDDINGS)
    assert_same_tensors(loaded, packed)


def test_the_dtype_of_the_model_is_that_of_its_activations(tmp_path):
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, **TIED)
    assert packed.dtype == packed.model.dtype == torch.float32
    packed.to(torch.bfloat16)
    assert (
        packed.dtype == packed.model.dtype == packed.get_input_embeddings()(torch.tensor([3])).dtype == torch.bfloat16
    )
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = inputs_of(packed)["input_ids"]
    plain = packed.generate(tokens, **greedy)
    assert torch.equal(packed.generate(tokens, cache_implementation="static", disable_compile=True, **greedy), plain)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "PhiForCausalLM", "BartForConditionalGeneration"])
def test_resizing_is_refused_and_tying_again_does_no_harm(tmp_path, architecture):
    _, packed, _ = pack(architecture, tmp_path, **TIED)
    rows = packed.config.vocab_size
    assert packed.resize_token_embeddings(rows) is packed.get_input_embeddings()
    with pytest.raises(ValueError, match=f"cannot be resized to {rows + 1}"):
        packed.resize_token_embeddings(rows + 1)
    with pytest.raises(ValueError, match="cannot be resized to 128"):
        packed.resize_token_embeddings(pad_to_multiple_of=64)
    logits = logits_of(packed)
    packed.tie_weights()
    assert torch.equal(logits_of(packed), logits)
    packed.dequantize()
    assert packed.resize_token_embeddings(rows + 1).weight.shape[0] == rows + 1


def test_a_large_table_is_not_starved(tmp_path):
    """A vocabulary much larger than the blocks: as one matrix of many it would get the lowest precision throughout."""
    config = lowra.LowRAConfig(bits=2.5, quantize_embeddings=True)
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, config, vocab_size=4096, **TIED)
    assert packed.get_input_embeddings().row_bits.float().mean() > 2


REFUSED = {
    "target_modules": ({"target_modules": ["q_proj", "embed_tokens"]}, "take no adapter"),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "would train a packed"),
    "packed layer": ({"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]}, "would train a packed"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "would train a packed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_train_says_why(tmp_path, case):
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, **TIED)
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        get_peft_model(packed, LoraConfig(r=4, **options))


def test_orthogonal_start(tmp_path):
    _, packed, _ = pack("LlamaForCausalLM", tmp_path, **TIED)
    model = get_peft_model(packed, LoraConfig(r=4, target_modules="all-linear", init_lora_weights="orthogonal"))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32 and a.shape == (4, 64) and b.shape == (104, 4)
    assert a.abs().max() > 0 and (b @ a).abs().max() < 1e-5
    assert torch.isfinite(logits_of(model)).all()


OTHER_IDS = [
    torch.tensor([[-100]]),
    torch.tensor([[-1]]),
    torch.tensor([[3, VOCABULARY]]),
    torch.tensor([[2**40]]),
    torch.tensor([[1.0, 2.0]]),
    torch.tensor([[1.0]], dtype=torch.bfloat16),
    torch.tensor([[True]]),
    torch.tensor([[1]], dtype=torch.uint8),
    torch.tensor([[1]], dtype=torch.int16),
    torch.tensor([[1 + 2j]]),
]


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "GemmaForCausalLM", "BartForConditionalGeneration"])
def tables(request, tmp_path_factory):
    """The embeddings of a dense model and of the same packed."""
    dense, packed, _ = pack(request.param, tmp_path_factory.mktemp("tables"))
    return dense.get_input_embeddings(), packed.get_input_embeddings()


@pytest.mark.parametrize("ids", OTHER_IDS, ids=str)
def test_ids_that_a_dense_table_refuses(tables, ids):
    dense, table = tables
    with pytest.raises((IndexError, RuntimeError)) as expected:
        dense(ids)
    with pytest.raises(type(expected.value)) as found:
        table(ids)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "ids",
    [torch.tensor(5), torch.tensor([[5, VOCABULARY - 1]], dtype=torch.int32), torch.empty(2, 0, dtype=torch.long)],
    ids=str,
)
def test_ids_that_a_dense_table_takes(tables, ids):
    _, table = tables
    rows = torch.nn.functional.embedding(ids, table.dequantize())
    torch.testing.assert_close(table(ids), rows * table.scale)


@pytest.mark.parametrize("ids", [[1, 2], None, 3], ids=str)
def test_what_is_no_tensor_is_refused_as_dense_embeddings_do(dense_llama, ids):
    options = {"quantize_embeddings": True, "bits": 2}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense_llama, quantization_config=lowra.LowRAConfig(**options)
    )
    for table in (model.get_input_embeddings(), torch.nn.Embedding(4, 4)):
        with pytest.raises(TypeError, match="must be Tensor, not"):
            table(ids)


@pytest.mark.parametrize("embeddings", [False, True])
def test_shapes_without_numbers(dense_llama, embeddings):
    config = lowra.LowRAConfig(bits=2, quantize_embeddings=embeddings)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense_llama, quantization_config=config).to("meta")
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (2, 5, model.config.vocab_size)
