"""Calibration: the statistics against autograd's own, the precisions they lead to, and their life with a checkpoint."""

import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP

from lowra import AdapterRecipe, LowRAConfig, quantize_checkpoint
from lowra.checkpoints.targets import find_targets
from lowra.quantization import planning
from lowra.quantization.calibration import CALIBRATION_FILE, Calibration, calibrate, collect
from lowra.quantization.initial_adapter import ADAPTER_FOLDER

_ENDS = ("self_attention.dense", "mlp.dense_4h_to_h")
TEXT = ["The quick brown fox jumps over the lazy dog. " * 20] * 4


@pytest.fixture(scope="module")
def calibration(tiny_llama) -> Calibration:
    return calibrate(str(tiny_llama), TEXT, tokens=512, device="cpu", moments=True, progress=False)


def test_statistics_are_the_means_over_tokens(tiny_llama, calibration):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    module = model.get_submodule(name.removesuffix(".weight"))
    seen = {}
    module.register_forward_hook(lambda m, args, out: (out.retain_grad(), seen.update(x=args[0], y=out)) and None)
    ids = torch.tensor([[byte % 256 for byte in range(64)]])
    model(input_ids=ids, labels=ids).loss.mul(64).backward()
    plain = collect(model, {name: module}, ids, moments=True, progress=False)
    x, gradient = seen["x"].detach()[0], seen["y"].grad[0]
    torch.testing.assert_close(plain.inputs[name], x.square().mean(0))
    torch.testing.assert_close(plain.moments[name], x.T @ x / 64)
    torch.testing.assert_close(plain.gradients[name], gradient.square().mean(0), rtol=1e-4, atol=1e-9)
    assert set(calibration.inputs) == set(calibration.gradients) == set(calibration.moments)
    assert len(calibration.inputs) == 14


def test_gradient_checkpointing_changes_nothing(tiny_llama, monkeypatch):
    from transformers import LlamaForCausalLM

    with_it = calibrate(str(tiny_llama), TEXT, tokens=256, device="cpu", moments=True, progress=False)
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    without = calibrate(str(tiny_llama), TEXT, tokens=256, device="cpu", moments=True, progress=False)
    for part in ("inputs", "gradients", "moments"):
        for name, tensor in getattr(with_it, part).items():
            torch.testing.assert_close(tensor, getattr(without, part)[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("architecture", ["FalconForCausalLM", "CTRLLMHeadModel"])
def test_models_that_write_into_what_their_layers_put_out(tiny_llama, tmp_path, architecture):
    """Falcon adds the attention to the output of its MLP; CTRL scales its embeddings."""
    model_class = getattr(transformers, architecture)
    sizes = dict(vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    model_class(model_class.config_class(**sizes, dff=16)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    found = calibrate(str(tmp_path), TEXT, tokens=256, device="cpu", progress=False)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.gradients.values())
    if architecture == "FalconForCausalLM":  # both layers end in one sum
        attention, mlp = (found.gradients[f"transformer.h.0.{name}.weight"] for name in _ENDS)
        torch.testing.assert_close(attention, mlp)


def test_a_layer_that_is_never_run_can_stay_dense(tiny_llama, tmp_path):
    """The decoder of an encoder-decoder alone never looks at an encoder."""
    sizes = dict(vocab_size=256, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    transformers.BartForCausalLM(transformers.BartConfig(**sizes, max_position_embeddings=64)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    found = calibrate(str(tmp_path), TEXT, tokens=256, device="cpu", progress=False)
    config = LowRAConfig(bits=2, sensitivity="fisher")
    with pytest.raises(ValueError, match=r"encoder_attn.* never run can stay dense .*--keep-dense"):
        quantize_checkpoint(str(tmp_path), tmp_path / "a", config, None, "cpu", False, found)
    config = LowRAConfig(bits=2, sensitivity="fisher", modules_to_not_convert=["encoder_attn"])
    quantize_checkpoint(str(tmp_path), tmp_path / "a", config, None, "cpu", False, found)


class _Selecting(nn.Module):
    """Picks tokens by what a layer gives them, as the indexers of DeepSeek V3.2 do."""

    def __init__(self, projection):
        super().__init__()
        self.projection, self.indexer = projection, nn.Linear(projection.in_features, 8)

    def forward(self, hidden):
        return self.projection(hidden) * (self.indexer(hidden).sum(dim=-1, keepdim=True) > 0)


def test_a_layer_to_which_no_gradient_comes(tiny_llama, monkeypatch, tmp_path):
    real = LlamaMLP.__init__

    def with_indexer(self, config):
        real(self, config)
        self.down_proj = _Selecting(self.down_proj)

    monkeypatch.setattr(LlamaMLP, "__init__", with_indexer)
    transformers.LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    options = dict(tokens=256, device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"No gradient comes to .*indexer.*--keep-dense"):
        calibrate(str(tmp_path), TEXT, **options)
    found = calibrate(str(tmp_path), TEXT, **options, modules_to_not_convert=["indexer"])
    assert len(found.gradients) == 14 and not any("indexer" in name for name in found.inputs)


def test_moments_are_positive_definite_and_of_unit_scale(calibration):
    for name in calibration.moments:
        moment = calibration.moment(name)
        torch.linalg.cholesky(moment)
        assert moment.diagonal().mean() == pytest.approx(1.01, rel=1e-3)


def test_a_calibrated_checkpoint_serves_another_budget(tiny_llama, calibration, tmp_path):
    config = LowRAConfig(bits=1.5, sensitivity="fisher")
    quantize_checkpoint(
        str(tiny_llama), tmp_path / "a", config, AdapterRecipe(4, method="cloq"), "cpu", False, calibration
    )
    assert (tmp_path / "a" / ADAPTER_FOLDER / "adapter_model.safetensors").exists()
    assert (tmp_path / "a" / CALIBRATION_FILE).exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    stored = Calibration.load(tmp_path / "a")
    assert stored.digest() == calibration.digest()
    report = quantize_checkpoint(
        str(tiny_llama), tmp_path / "b", LowRAConfig(bits=1.25, sensitivity="fisher"), None, "cpu", False, stored
    )
    assert report["nominal_bits"] <= 1.25
    config = LowRAConfig(bits=1.5, sensitivity="fisher", feedback=1)
    quantize_checkpoint(str(tiny_llama), tmp_path / "c", config, AdapterRecipe(4, method="cloq"), "cpu", False, stored)
    assert Calibration.load(tmp_path / "c").digest() == calibration.digest()
    without = Calibration(stored.inputs, stored.gradients)
    for wanted, recipe in ((config, None), (LowRAConfig(bits=1.5), AdapterRecipe(4, method="cloq"))):
        with pytest.raises(ValueError, match="second moments"):
            quantize_checkpoint(str(tiny_llama), tmp_path / "d", wanted, recipe, "cpu", False, without)


def test_stored_moments_keep_the_diagonal_and_the_main_directions(calibration, tmp_path):
    calibration.save(tmp_path / CALIBRATION_FILE)
    stored = Calibration.load(tmp_path)
    assert not stored.moments and stored.factors.keys() == calibration.moments.keys()
    for name in calibration.moments:
        exact, near = calibration.moment(name), stored.moment(name)
        torch.testing.assert_close(near.diagonal(), exact.diagonal(), rtol=0.02, atol=1e-3)
        torch.linalg.cholesky(near)
        assert (near - exact).norm() < 0.05 * exact.norm()
    same = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    assert stored.factors[same[0]] is stored.factors[same[1]] is stored.factors[same[2]]
    stored.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / CALIBRATION_FILE).read_bytes()


def test_channels_that_matter_get_the_bits(tiny_llama, calibration, tmp_path):
    skewed = Calibration(dict(calibration.inputs), {n: g.clone() for n, g in calibration.gradients.items()})
    name = "model.layers.0.self_attn.q_proj.weight"
    skewed.gradients[name][:8] *= 1e6
    quantize_checkpoint(
        str(tiny_llama), tmp_path / "a", LowRAConfig(bits=1.2, sensitivity="fisher"), None, "cpu", False, skewed
    )
    bits = load_file(tmp_path / "a" / "model.safetensors")[name.replace("weight", "row_bits")]
    assert (bits[:8] == 4).all()


def test_fewer_channels_have_one_bit_than_small_errors_would_give_it(tiny_llama, calibration, monkeypatch):
    """Where no long training of codes makes up for large errors."""

    def shares(**training):
        config = LowRAConfig(bits=2.0, sensitivity="fisher", **training)
        planner = planning.Planner(config, None, calibration)
        for name, target in find_targets(model, None).items():
            planner.add(name, target, model.get_submodule(target.name).weight.detach())
        bits = torch.cat(list(planner.assign().row_bits.values()))
        return [float((bits == precision).float().mean()) for precision in (1, 4)]

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    step = 16 * calibration.sequences.shape[1]
    monkeypatch.setattr(planning, "MUCH_TRAINING", 3 * calibration.sequences.numel())
    enough = math.ceil(planning.MUCH_TRAINING / step)
    alone, trained = shares(), shares(end_to_end=enough)
    assert all(0 <= few < many for few, many in zip(alone, trained, strict=True))
    assert shares(reconstruct=2) == shares(end_to_end=enough - 1) == alone
    assert shares(reconstruct=3) == shares(reconstruct=2, end_to_end=enough) == trained


def test_refusals(tiny_llama, calibration, tmp_path):
    fisher = LowRAConfig(bits=1.5, sensitivity="fisher")
    other = Calibration({"x.weight": torch.ones(8)}, {"x.weight": torch.ones(8)})
    with pytest.raises(ValueError, match="needs a calibration"):
        quantize_checkpoint(str(tiny_llama), tmp_path / "a", fisher, None, "cpu", False)
    with pytest.raises(ValueError, match="belongs to another model"):
        quantize_checkpoint(str(tiny_llama), tmp_path / "a", fisher, None, "cpu", False, other)
    with pytest.raises(ValueError, match="less than one sequence"):
        calibrate(str(tiny_llama), ["short"], device="cpu", progress=False)
    with pytest.raises(FileNotFoundError, match="not a text file"):
        calibrate(str(tiny_llama), tmp_path / "none.txt", device="cpu", progress=False)
    with pytest.raises(FileNotFoundError, match="without a calibration"):
        Calibration.load(tiny_llama)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_that_gives_no_probabilities_of_tokens_is_refused(tmp_path, kind):
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{kind.__name__} has no head that gives them: quantise it without"):
        calibrate(str(tmp_path), ["text"], 2048, "cpu", progress=False)
