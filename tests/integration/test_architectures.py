"""Every architecture through quantise -> load -> save -> reload, and through quantising while loading."""

import pytest
import torch
import transformers
from small_models import ARCHITECTURES, assert_same_tensors, logits_of, make_model, packed_layers

import lowra

BITS = 1.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_and_quantising_while_loading(architecture, tmp_path):
    model_class = getattr(transformers, architecture)
    dense = make_model(architecture)
    dense.save_pretrained(tmp_path / "dense")
    report = lowra.quantize_checkpoint(
        str(tmp_path / "dense"), tmp_path / "packed", lowra.LowRAConfig(bits=BITS), progress=False
    )
    packed = model_class.from_pretrained(tmp_path / "packed").eval()
    layers = packed_layers(packed)
    linear = [
        name
        for name, module in dense.named_modules()
        if isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)) and "head" not in name
    ]
    fused = [name for name, parameter in dense.named_parameters() if parameter.dim() == 3]
    assert set(layers) == {*linear, *fused}
    assert report["nominal_bits"] <= BITS < report["true_bits"]
    logits = logits_of(packed)
    assert torch.isfinite(logits).all()

    packed.save_pretrained(tmp_path / "again")
    again = model_class.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits_of(again), logits)
    assert_same_tensors(packed, again)

    loaded = model_class.from_pretrained(tmp_path / "dense", load_in_lowra=True, lowra_bits=BITS).eval()
    assert_same_tensors(packed, loaded)
    assert torch.equal(logits_of(loaded), logits)
    mine, theirs = loaded.config.quantization_config, packed.config.quantization_config
    assert (mine.fingerprint, mine.true_bits, mine.error) == (theirs.fingerprint, theirs.true_bits, theirs.error)
    loaded.save_pretrained(tmp_path / "loaded")
    assert torch.equal(logits_of(model_class.from_pretrained(tmp_path / "loaded").eval()), logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_layers_compute_what_dequantised_ones_do(architecture, tmp_path):
    model_class = getattr(transformers, architecture)
    make_model(architecture).save_pretrained(tmp_path)
    packed = model_class.from_pretrained(tmp_path, load_in_lowra=True, lowra_bits=4.0).eval()
    logits = logits_of(packed)
    packed.dequantize()
    assert not packed_layers(packed)
    torch.testing.assert_close(logits_of(packed), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration", "GPT2LMHeadModel"])
def test_bfloat16_checkpoints(architecture, tmp_path):
    model_class = getattr(transformers, architecture)
    make_model(architecture).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = lowra.LowRAConfig(bits=BITS)
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", config, progress=False)
    packed = model_class.from_pretrained(tmp_path / "packed").eval()
    assert logits_of(packed).dtype == torch.bfloat16
    assert all(layer.levels.dtype == torch.float16 for layer in packed_layers(packed).values())
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(model_class.from_pretrained(tmp_path / "again").eval()), logits_of(packed))
    loaded = model_class.from_pretrained(tmp_path / "dense", load_in_lowra=True, lowra_bits=BITS)
    assert_same_tensors(packed, loaded)


def test_another_dtype_changes_no_packed_tensor(packed_llama, tmp_path):
    model_class = transformers.LlamaForCausalLM
    kept = packed_layers(model_class.from_pretrained(packed_llama))
    other = model_class.from_pretrained(packed_llama, dtype=torch.bfloat16).eval()
    assert logits_of(other).dtype == torch.bfloat16
    for name, layer in packed_layers(other).items():
        assert layer.compute_dtype == torch.bfloat16
        for tensor, value in layer.packed.tensors().items():
            same = getattr(kept[name], tensor)
            assert value.dtype == same.dtype and torch.equal(value, same), (name, tensor)
