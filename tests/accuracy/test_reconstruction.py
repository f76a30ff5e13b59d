"""Blocks trained towards the dense ones: what they put out, what is packed of them, and runs that are killed."""

import dataclasses

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowra import AdapterRecipe, LowRAConfig, calibrate, quantize_checkpoint
from lowra.quantization import block_stream, block_training, reconstruction
from lowra.quantization.calibration import Calibration
from lowra.quantization.initial_adapter import ADAPTER_FOLDER
from lowra.quantization.learner import learn_codebook
from lowra.quantization.loftq import initialize
from lowra.quantization.pack import quantize_matrix
from lowra.quantization.trained_weight import TrainedWeight

CONFIG = LowRAConfig(bits=1.5, sensitivity="fisher", refine=2, feedback=1, reconstruct=20)
ADAPTER = AdapterRecipe(4, alpha=8.0, method="cloq")
SQUARES = " ".join(f"{number} times {number} is {number * number}." for number in range(2000))


@pytest.fixture(scope="module")
def calibration(tiny_llama):
    return calibrate(str(tiny_llama), [SQUARES], 1024, "cpu", True, False, reconstruct_tokens=1024)


def quantize(model, output, calibration, config=CONFIG, adapter: AdapterRecipe | None = ADAPTER):
    return quantize_checkpoint(
        str(model), output, config, adapter, device="cpu", progress=False, calibration=calibration
    )


@pytest.fixture(scope="module")
def reconstructed(tiny_llama, calibration, tmp_path_factory):
    output = tmp_path_factory.mktemp("reconstructed") / "llama"
    return output, quantize(tiny_llama, output, calibration)


def packed_and_adapted(folder):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / ADAPTER_FOLDER)


def hidden_error(folder, original, tokens):
    """Relative squared error before the head."""
    with torch.no_grad():
        wanted = original.model(tokens).last_hidden_state
        found = packed_and_adapted(folder).base_model.model.model(tokens).last_hidden_state
        return float((found - wanted).square().sum() / wanted.square().sum())


def test_the_model_is_nearer_to_the_original_in_as_many_bits(tiny_llama, calibration, reconstructed, tmp_path):
    output, after = reconstructed
    before = quantize(tiny_llama, tmp_path / "plain", calibration, dataclasses.replace(CONFIG, reconstruct=0))
    assert after["true_bits"] == before["true_bits"] and after["nominal_bits"] == before["nominal_bits"]
    assert [len(errors) for errors in after["block_errors"]] == [2, 2] and not before["block_errors"]
    assert all(end < 0.95 * start for start, end in after["block_errors"])
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    errors = [hidden_error(folder, original, calibration.sequences[:4]) for folder in (tmp_path / "plain", output)]
    assert errors[1] < errors[0]


def test_a_base_without_adapter_is_trained_too(tiny_llama, calibration, tmp_path):
    report = quantize(tiny_llama, tmp_path / "llama", calibration, adapter=None)
    assert all(end < 0.95 * start for start, end in report["block_errors"])
    assert not (tmp_path / "llama" / ADAPTER_FOLDER).exists()


def test_the_last_block_puts_out_what_the_report_says(tiny_llama, calibration, reconstructed):
    """What was trained is what is stored: the packed model, as it is loaded, has the error of the training."""
    output, report = reconstructed
    found = []
    models = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), packed_and_adapted(output)
    for model in (models[0], models[1].base_model.model):
        model.model.layers[-1].register_forward_hook(lambda module, args, out: found.append(out.float()))
        with torch.no_grad():
            model(calibration.sequences)
    wanted, out = found
    error = ((out - wanted).square().sum(dim=-1) / wanted.square().sum(dim=-1)).mean()
    assert float(error) == pytest.approx(report["block_errors"][-1][1], rel=1e-3)


def test_a_killed_run_trains_the_other_blocks_alone(tiny_llama, calibration, reconstructed, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real, kept = reconstruction.keep_packed, []

    def killing(*args, **metadata):
        if len(kept) == 10:  # in the middle of the second block
            raise Killed
        kept.append(args[2])
        real(*args, **metadata)

    monkeypatch.setattr(reconstruction, "keep_packed", killing)
    with pytest.raises(Killed):
        quantize(tiny_llama, tmp_path / "llama", calibration)
    kept.clear()
    monkeypatch.setattr(
        reconstruction, "keep_packed", lambda *args, **more: (kept.append(args[2]), real(*args, **more))
    )
    report = quantize(tiny_llama, tmp_path / "llama", calibration)
    assert len(kept) == 7 and all(".layers.1." in name for name in kept)
    assert report["block_errors"] == reconstructed[1]["block_errors"]
    for file in ("model.safetensors", f"{ADAPTER_FOLDER}/adapter_model.safetensors"):
        one, other = load_file(tmp_path / "llama" / file), load_file(reconstructed[0] / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), file


def test_another_text_is_another_recipe(calibration):
    other = dataclasses.replace(calibration, sequences=calibration.sequences.flip(0))
    assert other.digest() == calibration.digest() and other.digest_of_text() != calibration.digest_of_text()


def test_more_text_is_kept_than_the_statistics_are_of(tiny_llama, calibration):
    more = calibrate(str(tiny_llama), [SQUARES], 1100, "cpu", True, False, reconstruct_tokens=2000)
    assert more.digest() == calibration.digest() and more.sequences.shape == (15, 128)
    assert torch.equal(more.sequences[:8], calibration.sequences)


def test_statistics_alone_have_no_text_to_train_on(tiny_llama, calibration, reconstructed, tmp_path):
    with pytest.raises(ValueError, match="holds none: give the text"):
        quantize(tiny_llama, tmp_path / "llama", Calibration.load(reconstructed[0]))
    assert not (tmp_path / "llama").exists()


@pytest.mark.parametrize("scales", ["double_quant", "float16", "float32"])
@pytest.mark.parametrize("columns", [136, 64])
def test_a_weight_begins_as_it_was_packed_and_is_packed_as_it_was_trained(scales, columns):
    torch.manual_seed(0)
    weight = torch.randn(7, columns) * 0.05
    weight[3, :64] = 0  # a group of scale 0
    row_bits = torch.tensor([1, 2, 4, 1, 1, 2, 2], dtype=torch.uint8)
    config = LowRAConfig(scales=scales, refine=2)
    book = learn_codebook(weight, config)
    packed, factors = initialize(weight, lambda part: quantize_matrix(part, book, row_bits, config), 2, 4.0)
    trained = TrainedWeight(weight, packed, factors, 2.0)
    for name, tensor in trained.packed().tensors().items():
        assert torch.equal(tensor, packed.tensors()[name]), name
    optimiser = torch.optim.Adam(trained.parameters(), lr=3e-3)
    for _ in range(10):
        trained().square().sum().backward()
        optimiser.step()
    after, factors = trained.packed(), trained.factors()
    assert not torch.equal(after.weight, packed.weight)
    assert after.stored_bits == packed.stored_bits
    product = 2.0 * factors.lora_B @ factors.lora_A
    torch.testing.assert_close(trained(), after.dequantize() + product, rtol=0, atol=1e-7)


def test_gradients_of_tables_are_those_of_the_dense_weight():
    """Levels and scales against finite differences, codes as they are."""
    torch.manual_seed(0)
    weight = torch.randn(7, 72)
    row_bits = torch.tensor([1, 2, 4, 1, 1, 2, 2], dtype=torch.uint8)
    config = LowRAConfig(scales="float32")
    packed = quantize_matrix(weight, learn_codebook(weight, config), row_bits, config)
    trained = TrainedWeight(weight, packed, None, 1.0)
    toward = torch.randn(7, 72)
    (trained() * toward).sum().backward()
    assert torch.equal(trained.dense.grad, toward[torch.sort(row_bits, descending=True, stable=True).indices])
    for change, place in ((trained.scale_change, (2, 1)), (trained.scale_change, (6, 0))):
        ends = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                change[place] = step
                ends.append(float((trained() * toward).sum()))
                change[place] = 0
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(float(change.grad[place]), rel=1e-2, abs=1e-2)


def test_an_adapter_that_starts_from_nothing_keeps_its_start():
    torch.manual_seed(0)
    weight, config = torch.randn(8, 64), LowRAConfig()
    book, row_bits = learn_codebook(weight, config), torch.tensor([1, 2] * 4, dtype=torch.uint8)
    trained = {}
    for method in ("lora", "loftq"):
        packed, factors = initialize(weight, lambda part: quantize_matrix(part, book, row_bits, config), 2, 2.0, method)
        trained[method] = len(list(block_training._groups({"": TrainedWeight(weight, packed, factors, 1.0)})))
    assert trained == {"lora": 3, "loftq": 5}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "a card without it"])
def test_two_runs_on_a_gpu_learn_the_same(tiny_llama, calibration, reconstructed, tmp_path, monkeypatch, bfloat16):
    for module in (block_stream, block_training):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: bfloat16)
    reports = [
        quantize_checkpoint(
            str(tiny_llama), tmp_path / run, CONFIG, ADAPTER, device="cuda", progress=False, calibration=calibration
        )
        for run in ("one", "two")
    ]
    assert reports[0]["block_errors"] == reports[1]["block_errors"]
    for (_, end), (_, on_cpu) in zip(reports[0]["block_errors"], reconstructed[1]["block_errors"], strict=True):
        assert end == pytest.approx(on_cpu, rel=0.1)
    for file in ("model.safetensors", f"{ADAPTER_FOLDER}/adapter_model.safetensors"):
        one, other = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert all(torch.equal(one[key], other[key]) for key in one), file
