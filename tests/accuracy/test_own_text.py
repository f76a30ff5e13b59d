"""Text that a model writes itself: by its own probabilities, always the same, and in place of a text of the user's."""

import argparse

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lowra.quantization import calibration, own_text
from lowra.quantization.calibration import OWN_TEXT, Calibration, calibrate
from lowra.quantization.kept_text import KeptText
from lowra_command import quantize


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def write(model, count=3, length=24, **options):
    return own_text.write_text(model, byte_tokenizer(), count, length, progress=False, **options)


def assert_drawn(model, written):
    """Each token from what the model makes of all before it, without a cache."""
    with torch.no_grad():
        shares = model(written, use_cache=False).logits.float().softmax(dim=-1)
    generator = torch.Generator().manual_seed(0)
    for place in range(written.shape[1] - 1):
        assert torch.equal(torch.multinomial(shares[:, place], 1, generator=generator)[:, 0], written[:, place + 1])


def test_it_is_drawn_from_the_probabilities_of_the_whole_text_before(model):
    written = write(model)
    assert written.shape == (3, 24) and torch.equal(written, write(model))
    assert not torch.equal(written, write(model, seed=1))
    assert_drawn(model, written)


def test_small_models_write_more_at_once():
    seven = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    grouped = LlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8)
    small = LlamaConfig(hidden_size=576, num_hidden_layers=8, num_attention_heads=9)
    assert [own_text.side_by_side(config, 1024) for config in (seven, grouped, small)] == [32, 512, 512]


def sharp(model):
    """With probabilities far from even, which tell what attention looks at."""
    model.get_output_embeddings().weight.data *= 20
    return model.eval()


def test_models_that_take_no_cache_of_fixed_length_have_one_that_grows():
    small = {"vocab_size": 256, "hidden_size": 16}
    windows = {"num_layers": 2, "num_heads": 2, "attention_types": [[["local"], 2]], "window_size": 4}
    torch.manual_seed(0)
    local = GPTNeoForCausalLM(GPTNeoConfig(**small, **windows, tie_word_embeddings=False))
    slopes = FalconForCausalLM(FalconConfig(**small, num_hidden_layers=1, num_attention_heads=2, alibi=True))
    for other in (local, slopes):
        assert_drawn(sharp(other), write(other))


def llama(vocabulary):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))


def test_a_vocabulary_of_special_tokens_alone():
    assert sorted(byte_tokenizer().all_special_ids) == [0, 1]
    assert write(llama(2)).shape == (3, 24)


def test_probabilities_that_are_no_numbers_are_refused():
    model = llama(256)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="probabilities that are NaN"):
        write(model)


def test_a_batch_that_does_not_fit_is_halved(model, monkeypatch):
    real, tried = own_text._write, []

    def small(model, tokenizer, cache, count, *others):
        tried.append(count)
        if count > 2:
            raise torch.OutOfMemoryError
        return real(model, tokenizer, cache, count, *others)

    monkeypatch.setattr(own_text, "_write", small)
    written = write(model, count=5, batch=8)
    assert tried == [5, 4, 2, 2, 1] and written.shape == (5, 24)
    assert len({tuple(row.tolist()) for row in written}) == 5


def test_a_killed_run_goes_on_from_what_was_written(model, tmp_path, monkeypatch):
    def kept(writer="this"):
        return KeptText(tmp_path / "text", [writer])

    wanted, real, written = write(model, count=5, batch=2), own_text._write, []

    def killed(*arguments):
        written.append(real(*arguments))
        if len(written) == 2:
            raise KeyboardInterrupt
        return written[-1]

    monkeypatch.setattr(own_text, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        write(model, count=5, batch=2, kept=kept())
    assert torch.equal(write(model, count=5, batch=2, kept=kept()), wanted)
    assert len(written) == 4, "only the first two sequences were finished"
    (tmp_path / "text" / "00001.safetensors").write_bytes(b"half")
    assert torch.equal(write(model, count=5, batch=2, kept=kept()), wanted)
    assert len(written) == 5, "the damaged file is written again"
    for options, own in (({}, kept("other")), ({"seed": 3}, kept())):
        begun, given = len(written), {"count": 5, "batch": 2} | options
        assert torch.equal(write(model, kept=own, **given), write(model, **given))
        assert len(written) == begun + 6, "nothing of another writer or seed is taken"


def test_models_that_write_otherwise_are_refused():
    small = {"vocab_size": 256, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    recurrent = MambaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1)
    mixed = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    for other in (
        T5ForConditionalGeneration(T5Config(**small)),
        MambaForCausalLM(recurrent),
        RecurrentGemmaForCausalLM(RecurrentGemmaConfig(vocab_size=256, **mixed)),
    ):
        with pytest.raises(ValueError, match="text of your own"):
            write(other)


def quantised_by_own_text(model, output):
    arguments = [model, "--bits", "1.5", "--feedback", "0", "--calibrate", "self", "--calibration-tokens", "256"]
    parser = argparse.ArgumentParser()
    quantize.add_parser(parser.add_subparsers())
    args = parser.parse_args(["quantize", *map(str, arguments), "--output", str(output), "--device", "cpu"])
    return args.run(args)


def test_calibrate_self(tiny_llama, tmp_path):
    report = quantised_by_own_text(tiny_llama, tmp_path / "packed")
    assert report["calibration_text"] == OWN_TEXT == Calibration.load(tmp_path / "packed").origin
    assert f"| text of the calibration | {OWN_TEXT} |" in (tmp_path / "packed" / "README.md").read_text()


def test_text_outlives_a_killed_quantisation_and_not_a_finished_one(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "collect", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantised_by_own_text(tiny_llama, tmp_path / "packed")
    assert list((tmp_path / "packed.partial" / "text").iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(own_text, "_write", lambda *arguments: pytest.fail("written again"))
    assert quantised_by_own_text(tiny_llama, tmp_path / "packed")["resumed"]
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_its_text_serves_reconstruction(tiny_llama):
    found = calibrate(str(tiny_llama), None, 256, "cpu", progress=False, reconstruct_tokens=512)
    assert found.sequences.shape == (4, 128) and found.origin == OWN_TEXT


def test_long_training_goes_over_its_text_again(tiny_llama, monkeypatch):
    monkeypatch.setattr(calibration, "MOST_WRITTEN", 3)
    found = calibrate(str(tiny_llama), None, 128, "cpu", progress=False, reconstruct_tokens=128, end_to_end=100)
    assert found.further.shape == (3, 128)
