"""Packed adapters: equal to the simulated ones bit for bit, in PEFT too, and as small as they say."""

import pytest
import torch
from adapter_models import make_base, save_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_adapter_methods import METHODS

from lowra.adapters import LoraQuantSettings, load_packed, quantize_loraquant, read_adapter, read_packed
from lowra.adapters.labels import make_label
from lowra.adapters.loraquant import simulate_loraquant
from lowra.adapters.source import CONFIG_FILE
from lowra.adapters.storage import PACKED_FILE, factor_state, write_packed
from lowra.checkpoints.atomic import written_beside

VARIANTS = {
    "2@0.9": {},
    "3@0.8": {"bits": 3, "ratio": 0.8},
    "one bit": {"bits": 1},
    "without 1-bit part": {"binary": False},
    "not refined": {"refine": False},
    "static h": {"static_h": 3},
    "norm": {"split": "norm", "static_h": 3},
    "random": {"split": "random", "static_h": 3},
    "h = 0": {"static_h": 0},
}


def store(packed, base, folder):
    packed.label = make_label(packed, base=base)
    with written_beside(folder) as partial:
        write_packed(partial, packed)
    return folder


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_packed_equals_simulated(adapter_folder, tmp_path, options):
    adapter, settings = read_adapter(adapter_folder), LoraQuantSettings(**options)
    simulated = {}
    for layer, codes in simulate_loraquant(adapter, settings):
        simulated |= factor_state(layer, codes)
    loaded = read_packed(store(quantize_loraquant(adapter, settings), None, tmp_path / "out")).dequantize()
    trained = load_file(adapter_folder / "adapter_model.safetensors")
    assert loaded.keys() == simulated.keys() == trained.keys()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, simulated[key]), key
        assert tensor.shape == trained[key].shape


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_average_bits_are_the_bytes_of_the_file(adapter_folder, tmp_path, options):
    packed = quantize_loraquant(read_adapter(adapter_folder), LoraQuantSettings(**options))
    folder = store(packed, None, tmp_path / "out")
    stored = sum(t.numel() * t.element_size() for t in load_file(folder / PACKED_FILE).values())
    trained = sum(t.numel() for t in load_file(adapter_folder / "adapter_model.safetensors").values())
    assert read_packed(folder).average_bits == 8 * stored / trained


@pytest.mark.parametrize("method", METHODS)
def test_reload_into_peft_gives_the_outputs_of_the_simulated_adapter(
    method, adapter_folder, base, base_folder, tokens, tmp_path
):
    packed = METHODS[method](read_adapter(adapter_folder))
    # The simulated adapter as anybody would save it: a plain PEFT folder with dequantised float32 factors.
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / CONFIG_FILE).write_bytes((adapter_folder / CONFIG_FILE).read_bytes())
    save_file(packed.dequantize(), plain / "adapter_model.safetensors")
    expected = PeftModel.from_pretrained(make_base(), plain).eval()(tokens).logits
    loaded = load_packed(base, store(packed, base, tmp_path / "out")).eval()
    assert torch.equal(loaded(tokens).logits, expected)
    assert not torch.equal(expected, make_base()(tokens).logits)


def test_embedding_layers_and_biases_survive(base_folder, base, tokens, tmp_path):
    source = save_adapter(
        tmp_path / "source",
        base_folder,
        5,
        target_modules=["embed_tokens", "q_proj"],
        lora_bias=False,
        modules_to_save=["norm"],
    )
    adapter = read_adapter(source)
    assert {layer.suffixes[0] for layer in adapter.layers} == {".lora_A.weight", ".lora_embedding_A"}
    assert any("norm" in name for name in adapter.kept)
    packed = quantize_loraquant(adapter, LoraQuantSettings(bits=8, ratio=1.0))
    model = load_packed(base, store(packed, base, tmp_path / "out")).eval()
    trained = PeftModel.from_pretrained(make_base(), source).eval()
    change = (trained(tokens).logits - make_base()(tokens).logits).norm()
    assert (model(tokens).logits - trained(tokens).logits).norm() < 0.05 * change


def test_ranks_may_differ_between_layers(base_folder, base, tokens, tmp_path):
    source = save_adapter(tmp_path / "source", base_folder, 5, rank_pattern={"q_proj": 3, "down_proj": 12})
    packed = quantize_loraquant(read_adapter(source), LoraQuantSettings())
    assert {layer.rank for layer in packed.layers} == {3, 8, 12}
    load_packed(base, store(packed, base, tmp_path / "out"))(tokens)


def test_untrained_adapter_decodes_to_zero_change(adapter_folder):
    adapter = read_adapter(adapter_folder)
    for layer in adapter.layers:
        layer.b.zero_()
    state = quantize_loraquant(adapter, LoraQuantSettings()).dequantize()
    assert all(tensor.abs().max() == 0 for name, tensor in state.items() if "lora_B" in name)


def test_killed_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_beside(tmp_path / "out") as partial:
        (partial / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
