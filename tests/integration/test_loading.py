"""Shards, device maps, layers kept dense, other heads, and packed checkpoints that must be refused."""

import json
import shutil

import accelerate
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import logits_of, make_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import lowra
from lowra.checkpoints import reading
from lowra.commands import main
from lowra.integrations.transformers import LowRAHfQuantizer
from lowra.nn.packed_module import PackedModule

TARGET = "model.layers.1.mlp.up_proj"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def test_sharded_files(dense_llama, packed_llama, tmp_path):
    packed = load(packed_llama)
    packed.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(load(tmp_path / "packed")), logits_of(packed))

    load(dense_llama).save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    config = lowra.LowRAConfig(bits=1.5)
    whole = lowra.quantize_checkpoint(str(dense_llama), tmp_path / "one", config, progress=False)
    shards = lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "many", config, progress=False)
    assert whole["error"] == shards["error"]
    assert torch.equal(logits_of(load(tmp_path / "one")), logits_of(load(tmp_path / "many")))
    loaded = load(tmp_path / "dense", load_in_lowra=True, lowra_bits=1.5)
    assert torch.equal(logits_of(loaded), logits_of(load(tmp_path / "one")))


@pytest.mark.parametrize("source", ["packed", "dense"])
def test_device_map_auto(packed_llama, dense_llama, source):
    options = {"device_map": "auto"}
    if source == "dense":
        model = load(dense_llama, load_in_lowra=True, lowra_bits=1.5, **options)
        plain = load(dense_llama, load_in_lowra=True, lowra_bits=1.5)
    else:
        model, plain = load(packed_llama, **options), load(packed_llama)
    assert torch.equal(logits_of(model).cpu(), logits_of(plain))


def test_nothing_is_missing_or_left_over(packed_llama):
    model, info = AutoModelForCausalLM.from_pretrained(packed_llama, output_loading_info=True)
    assert not any(info.values()), info
    tensors = load_file(packed_llama / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(state[name].dtype == t.dtype and torch.equal(state[name], t) for name, t in tensors.items())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"model.embed_tokens.weight", "lm_head.weight", *(n for n in tensors if "norm" in n)}


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_files_are_cut_into_pieces_without_loss(packed_llama, monkeypatch, chunk):
    """What the threads for a GPU do, without one."""
    monkeypatch.setattr(reading, "_CHUNK_BYTES", chunk)
    path = packed_llama / "model.safetensors"
    places = reading.stored_tensors(path)[1::2]  # with gaps
    tensors = [torch.empty(place.shape, dtype=place.dtype) for place in places]
    content = path.read_bytes()
    chunks = reading._chunks([(p, t.view(-1).view(torch.uint8)) for p, t in zip(places, tensors, strict=True)])
    assert all(0 < piece.length <= chunk for piece in chunks)
    for piece in chunks:
        held = torch.frombuffer(bytearray(content[piece.start : piece.start + piece.length]), dtype=torch.uint8)
        for part, at in piece.parts:
            part.copy_(held[at : at + part.numel()])
    expected = load_file(path)
    assert all(torch.equal(t, expected[place.key]) for place, t in zip(places, tensors, strict=True))


@pytest.mark.parametrize("embeddings", [True, False])
def test_the_device_map_counts_the_bytes_of_the_plan(dense_llama, embeddings, monkeypatch):
    sizes = {}
    original = LowRAHfQuantizer.preprocess_model

    def preprocess_model(self, model, **options):
        original(self, model, **options)
        for name, parameter in model.named_parameters():
            sizes[name] = self.param_element_size(model, name, parameter) * parameter.numel()

    monkeypatch.setattr(LowRAHfQuantizer, "preprocess_model", preprocess_model)
    config = lowra.LowRAConfig(bits=1.5, quantize_embeddings=embeddings)
    model = load(dense_llama, quantization_config=config)
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            assert sizes[f"{name}.weight"] == pytest.approx(module.packed.stored_bits / 8)


def test_disk_offload_of_a_packed_checkpoint(packed_llama, tmp_path):
    """The offloading hooks that move CPU weights to a GPU, with the disk in the place of the CPU."""
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = load(packed_llama, device_map=device_map, offload_folder=tmp_path)
    assert model.get_submodule(TARGET).weight.device.type == "meta"
    assert torch.equal(logits_of(model), logits_of(load(packed_llama)))


def test_quantising_while_loading_with_layers_offloaded_to_the_cpu(dense_llama, monkeypatch):
    """As in front of a GPU: the tensors of offloaded layers are on "meta" when loading ends."""

    def dispatch(model, *args, **options):
        accelerate.cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))

    monkeypatch.setattr(transformers.modeling_utils, "accelerate_dispatch", dispatch)
    spread = {"model": "cpu", "lm_head": torch.device("cpu")}  # two keys for one device, so that it counts as spread
    model = load(dense_llama, load_in_lowra=True, lowra_bits=1.5, device_map=spread)
    assert model.get_submodule(TARGET).weight.device.type == "meta"
    whole = load(dense_llama, load_in_lowra=True, lowra_bits=1.5)
    assert torch.equal(logits_of(model), logits_of(whole))
    mine, theirs = model.config.quantization_config, whole.config.quantization_config
    assert (mine.nominal_bits, mine.true_bits) == (theirs.nominal_bits, theirs.true_bits)


def test_quantising_while_loading_cannot_offload_to_disk(dense_llama, tmp_path):
    with pytest.raises(ValueError, match="lowra quantize"):
        load(dense_llama, load_in_lowra=True, device_map={"": "disk"}, offload_folder=tmp_path)


def test_modules_to_not_convert(dense_llama, tmp_path):
    config = lowra.LowRAConfig(bits=1.5, modules_to_not_convert=["down_proj", "layers.0.self_attn"])
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "packed", config, progress=False)
    model = load(tmp_path / "packed")
    packed = [name for name, module in model.named_modules() if isinstance(module, lowra.LowRALinear)]
    assert len(packed) == 14 - 2 - 4
    assert not any("down_proj" in name or "layers.0.self_attn" in name for name in packed)
    dense = load(dense_llama)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(name), dense.get_parameter(name))
    assert torch.equal(logits_of(load(dense_llama, quantization_config=config)), logits_of(model))


def test_tied_embeddings_are_written_once(tmp_path):
    make_model("LlamaForCausalLM", tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", lowra.LowRAConfig(), progress=False)
    assert "lm_head.weight" not in load_file(tmp_path / "packed" / "model.safetensors")
    model = load(tmp_path / "packed")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_heads_on_a_packed_checkpoint(packed_llama):
    """A new head, or none at all: what the checkpoint lacks or has too much then is no damage."""
    bare = AutoModel.from_pretrained(packed_llama).eval()
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = load(packed_llama).model(tokens).last_hidden_state
        assert torch.equal(bare(tokens).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(packed_llama, num_labels=3)
    assert isinstance(classifier.model.layers[0].mlp.up_proj, lowra.LowRALinear)
    assert isinstance(classifier.score, torch.nn.Linear)


def test_static_cache_generates_the_same(packed_llama):
    model = load(packed_llama)
    prompt = torch.arange(3, 9)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(prompt, **options)
    static = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    assert plain.shape[1] > prompt.shape[1] and torch.equal(plain, static)


def damaged(folder, target, change):
    """A copy of a packed checkpoint with its tensors changed in place."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("initial_adapter"))
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def cut(tensors, name, count):
    tensors[name] = tensors[name][:count].clone()


REFUSED = {
    "packed tensor missing": (lambda t: t.pop(f"{TARGET}.levels"), f"lacks levels of {TARGET}"),
    "scale steps missing": (lambda t: t.pop(f"{TARGET}.scale_steps"), f"lacks scale_steps of {TARGET}"),
    "norm missing": (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensor\(s\): model.norm.weight"),
    "unknown tensor": (lambda t: t.update({"model.extra": torch.zeros(2)}), r"holds 1 tensor\(s\): model.extra"),
    "channels missing": (lambda t: cut(t, f"{TARGET}.row_bits", 100), f"{TARGET}.row_bits has 100 channels"),
    "codes cut short": (lambda t: cut(t, f"{TARGET}.weight", 64), f"{TARGET}.weight has 64 elements where"),
    "scales cut short": (lambda t: cut(t, f"{TARGET}.scales", 64), f"{TARGET}.scales has 64 elements where"),
    "codes of another type": (lambda t: t.update({f"{TARGET}.weight": t[f"{TARGET}.weight"].half()}), "another type"),
    "scales of another kind": (
        lambda t: t.update({f"{TARGET}.scales": t[f"{TARGET}.scales"].float()}),
        f"{TARGET}.scale_steps has another type .* or scales that do not go with it",
    ),
    "impossible precision": (lambda t: t[f"{TARGET}.row_bits"].fill_(3), f"{TARGET}.row_bits holds other values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_packed_checkpoints_are_refused(packed_llama, tmp_path, case):
    change, message = REFUSED[case]
    folder = damaged(packed_llama, tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_packed_file_cut_short_is_refused(packed_llama, tmp_path):
    folder = damaged(packed_llama, tmp_path / "damaged", lambda tensors: None)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut short"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "packed format 2, this lowra reads format 1"),
        ({"format_version": 2, "scales": "log", "zeros": 1}, "packed format 2, this lowra reads format 1"),
        ({"bitz": 3}, "no key 'bitz'. Did you mean 'bits'"),
        ({"modules_to_not_convert": ["up_proj"]}, "holds 8 tensor|lacks"),
        ({"group_size": 32}, "has .* elements where"),
    ],
)
def test_changed_configs_are_refused(packed_llama, tmp_path, change, message):
    folder = damaged(packed_llama, tmp_path / "changed", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_pickled_checkpoints_are_refused(dense_llama, tmp_path):
    shutil.copy(dense_llama / "config.json", tmp_path)
    torch.save(load(dense_llama).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load(tmp_path, load_in_lowra=True)
    with pytest.raises(FileNotFoundError, match="pickled"):
        lowra.quantize_checkpoint(str(tmp_path), tmp_path / "out", lowra.LowRAConfig(), progress=False)


def test_packed_checkpoints_are_not_quantised_again(packed_llama, tmp_path):
    with pytest.raises(ValueError, match="quantised already"):
        lowra.quantize_checkpoint(str(packed_llama), tmp_path / "twice", lowra.LowRAConfig(), progress=False)


def test_transformers_offers_the_class_of_the_config(packed_llama):
    assert isinstance(transformers.AutoConfig.from_pretrained(packed_llama).quantization_config, dict)
    assert isinstance(load(packed_llama).config.quantization_config, lowra.LowRAConfig)


def test_the_head_is_packed_if_asked(dense_llama, tmp_path):
    config = lowra.LowRAConfig(bits=2, quantize_head=True)
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "packed", config, lowra.AdapterRecipe(4), progress=False)
    model = load(tmp_path / "packed")
    assert isinstance(model.lm_head, lowra.LowRALinear)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(model))
    assert isinstance(AutoModel.from_pretrained(tmp_path / "packed").layers[0].mlp.up_proj, lowra.LowRALinear)
    fresh = load(dense_llama, quantization_config=config)
    assert isinstance(fresh.lm_head, lowra.LowRALinear)
    prepared = lowra.prepare_for_training(model, float32_norms_and_head=True)
    adapted = PeftModel.from_pretrained(prepared, tmp_path / "packed" / "initial_adapter", is_trainable=True)
    adapted.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert main(["inspect", str(tmp_path / "packed"), "--plot", str(tmp_path / "pictures")]) == 0


def test_a_tied_head_is_not_packed(tmp_path):
    make_model("LlamaForCausalLM", tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    config = lowra.LowRAConfig(quantize_head=True)
    with pytest.raises(ValueError, match="lm_head of this LlamaForCausalLM is tied"):
        lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", config, progress=False)
    with pytest.raises(ValueError, match="lm_head of this LlamaForCausalLM is tied"):
        load(tmp_path / "dense", quantization_config=config)


@pytest.fixture(scope="module")
def one_and_a_half(dense_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "folder"
    config = lowra.LowRAConfig(bits=1.5, scales="float16", refine=1)
    lowra.quantize_checkpoint(str(dense_llama), folder, config, progress=False)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization_config": lowra.LowRAConfig()}, "with bits=1.5: bits=2.0 has no effect"),
        ({"quantization_config": lowra.LowRAConfig(bits=1.5)}, "with scales=float16: scales=double_quant has no"),
        (
            {"quantization_config": lowra.LowRAConfig(bits=1.5, scales="float16")},
            "with refine=1: refine=0 has no effect",
        ),
        ({"quantization_config": lowra.LowRAConfig(bits=1.5, scales="float16", refine=1, menu=(1, 2))}, "with menu="),
        ({"load_in_lowra": True, "lowra_bits": 2}, "with bits=1.5: bits=2 has no effect"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "BitsAndBytesConfig"),
    ],
)
@pytest.mark.filterwarnings("ignore:You passed")
def test_a_packing_that_is_asked_for_in_vain_is_refused(one_and_a_half, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load(one_and_a_half, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"quantization_config": lowra.LowRAConfig(bits=1.5, scales="float16", refine=1)},
        {"load_in_lowra": True, "lowra_bits": 1.5},
        {"load_in_lowra": True},
    ],
)
@pytest.mark.filterwarnings("ignore:You passed")
def test_a_packing_that_is_there_may_be_asked_for(one_and_a_half, options):
    assert torch.equal(logits_of(load(one_and_a_half, **options)), logits_of(load(one_and_a_half)))
