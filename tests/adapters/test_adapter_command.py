"""`lowra adapter` from its arguments: what it writes, what it shows, and every refusal before anything is written."""

import argparse
import json
import shutil

import pytest
import torch
from adapter_models import make_base
from safetensors.torch import load_file, save_file
from test_adapter_labels import edit_label

from lowra.adapters import load_packed, read_packed
from lowra.commands import adapter as command
from lowra.commands.adapter import output_names
from lowra_command.adapter import add_parser

WEIGHTS = "adapter_model.safetensors"


def call(*words):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["adapter", *map(str, words)])
    return args.run(args)


def test_quantize_and_inspect(adapter_folder, base, tokens, tmp_path, capsys):
    label = ["--task", "law", "--training-data", "statutes", "--evaluation", "perplexity=12.5", "--licence", "CC0"]
    out = tmp_path / "deep" / "out"
    result = call(
        "quantize", adapter_folder, "--bits", 2, "--ratio", 0.9, "--output", out, "--retire", "2999-12-31", *label
    )
    json.dumps(result)
    stored = load_file(out / "lowra_adapter.safetensors")
    assert result["tensor_bytes"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert result["average_bits"] == 8 * result["tensor_bytes"] / result["parameters"]
    load_packed(base, out)(tokens)
    capsys.readouterr()
    seen = call("inspect", out)
    json.dumps(seen)
    shown = capsys.readouterr().out
    fingerprint = result["base_fingerprint"]
    for text in ("law", "statutes", "perplexity 12.5", "CC0", "2999-12-31", "none (float32)", fingerprint, "as packed"):
        assert text in shown, text
    assert seen["problems"] == []


def test_inspect_shows_what_forbids_loading(adapter_folder, tmp_path, capsys):
    call("quantize", adapter_folder, "--method", "bin", "--output", tmp_path / "out", "--retire", "2999-12-31")
    edit_label(tmp_path / "out", retire="2020-01-01")
    path = tmp_path / "out" / "lowra_adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    seen = call("inspect", tmp_path / "out")
    assert len(seen["problems"]) == 2
    assert "must not be loaded" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["bin", "rtn", "pbllm", "billm"])
def test_baselines(method, adapter_folder, base, tmp_path):
    result = call("quantize", adapter_folder, "--method", method, "--output", tmp_path / "out")
    assert result["method"].split()[0] == method
    load_packed(base, tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        ["--no-refine"],
        ["--no-binary"],
        ["--static-h", 2],
        ["--static-h", 2, "--split", "norm"],
        ["--static-h", 2, "--split", "random"],
    ],
)
def test_ablations(options, adapter_folder, base, tmp_path):
    call("quantize", adapter_folder, "--output", tmp_path / "out", *options)
    load_packed(base, tmp_path / "out")


def test_jd_diagonal_writes_one_basis_and_an_adapter_each(adapter_folders, base, tokens, tmp_path):
    result = call("quantize", *adapter_folders, "--method", "jd-diagonal", "--output", tmp_path / "out")
    assert result["average_bits"] == pytest.approx(16 / 3, rel=0.05)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["code", "law", "news", "shared_basis.safetensors"]
    for name in ("code", "law", "news"):
        load_packed(make_base(), tmp_path / "out" / name)(tokens)


@pytest.mark.parametrize(
    "init, options, warned", [("loftq", [], True), ("lora", [], False), ("loftq", ["--ratio", 1, "--bits", 3], False)]
)
def test_an_adapter_that_repairs_its_base_is_not_made_coarse_in_silence(
    init, options, warned, adapter_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "record_of_folder", lambda folder: {"init": init})
    call("quantize", adapter_folder, "--output", tmp_path / "out", *options)
    assert ("--bits 3 --ratio 1" in capsys.readouterr().err) == warned


def test_adapters_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    law, news = tmp_path / "law" / "adapter", tmp_path / "news" / "adapter"
    assert output_names([law, news]) == ["law-adapter", "news-adapter"]
    assert output_names([law, tmp_path / "news"]) == ["adapter", "news"]


def test_gptq_calibrates_on_the_base(adapter_folder, base_folder, base, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    words = {f"w{i}": i for i in range(95)} | {"?": 95}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * 7 % 95}" for i in range(600)))
    options = ["--method", "gptq", "--base", folder, "--output", tmp_path / "out", "--calibration"]
    result = call("quantize", adapter_folder, *options, text)
    assert result["method"] == "gptq 2"
    load_packed(base, tmp_path / "out")

    (tmp_path / "short.txt").write_text("w1 w2")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    options[options.index("--output") + 1] = tmp_path / "other"
    for name, words in (("short.txt", "at least 256"), ("binary.txt", "not UTF-8")):
        with pytest.raises(ValueError, match=words):
            call("quantize", adapter_folder, *options, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="Calibration file"):
        call("quantize", adapter_folder, *options, tmp_path / "absent.txt")


def test_base_that_is_not_here_leaves_no_fingerprint(adapter_folder, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(adapter_folder, source)
    edit_config(source, base_model_name_or_path="someone/somewhere")
    call("quantize", source, "--method", "bin", "--output", tmp_path / "out")
    assert "give --base" in capsys.readouterr().err
    assert read_packed(tmp_path / "out").label["base"] == {
        "name": "someone/somewhere",
        "fingerprint": None,
        "quantization": None,
    }


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def poison(value):
    def change(tensors):
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 2] = value

    return lambda folder: edit_weights(folder, change)


def drop(name):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.pop(name))


FIRST = "base_model.model.model.layers.0.mlp.down_proj"
BROKEN = {
    "NaN": (poison(float("nan")), "layers.1.mlp.up_proj.lora_B.weight.*1 NaN or infinite"),
    "infinity": (poison(float("inf")), "layers.1.mlp.up_proj.lora_B.weight.*1 NaN or infinite"),
    "cut file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:500]), "cut short"),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "cut short"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "does not exist"),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "pickle"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "does not exist"),
    "config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "JSON list"),
    "other PEFT type": (lambda f: edit_config(f, peft_type="IA3"), "'IA3'; expected 'LORA'"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "use_dora"),
    "fused experts": (lambda f: edit_config(f, target_parameters=["experts"]), "target_parameters"),
    "no factor": (lambda f: save_file({"x": torch.zeros(2)}, f / WEIGHTS), "no pair of lora_A and lora_B"),
    "half a layer": (drop(FIRST + ".lora_B.weight"), "no .*down_proj.lora_B.weight; expected both"),
    "other half": (drop(FIRST + ".lora_A.weight"), "no factor of a plain LoRA"),
    "ranks differ": (
        lambda f: edit_weights(f, lambda t: t.update({FIRST + ".lora_A.weight": torch.zeros(3, 200)})),
        "one rank r",
    ),
    "convolution": (
        lambda f: edit_weights(f, lambda t: t.update({FIRST + ".lora_A.weight": torch.zeros(8, 2, 3, 3)})),
        "expected a matrix",
    ),
    "integers": (
        lambda f: edit_weights(
            f, lambda t: t.update({FIRST + ".lora_A.weight": torch.zeros(8, 200, dtype=torch.int8)})
        ),
        "floating point",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_adapter_is_refused_before_anything_is_written(kind, adapter_folder, tmp_path):
    break_it, message = BROKEN[kind]
    source, above = tmp_path / "source", tmp_path / "outputs"
    shutil.copytree(adapter_folder, source)
    break_it(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call("quantize", source, "--output", above / "out")
    assert not above.exists()


OPTIONS = {
    "unknown method": (["--method", "awq"], "Unknown method 'awq'; expected one of loraquant, bin"),
    "bits too wide": (["--bits", 9], "bits is 9; expected 1 to 8"),
    "no bits": (["--bits", 0], "bits is 0"),
    "ratio": (["--ratio", 1.5], "ratio is 1.5"),
    "ratio zero": (["--ratio", 0], "ratio is 0"),
    "negative h": (["--static-h", -1], "static h is -1"),
    "split without h": (["--split", "norm"], "needs a static h"),
    "ratio and h": (["--ratio", 0.9, "--static-h", 2], "exclude one another"),
    "bits of bin": (["--method", "bin", "--bits", 2], "no option --bits"),
    "ratio of rtn": (["--method", "rtn", "--ratio", 0.9], "no option --ratio"),
    "calibration of rtn": (["--method", "rtn", "--calibration", "x"], "no option --calibration"),
    "gptq without text": (["--method", "gptq"], "needs calibration text"),
    "nothing left": (["--static-h", 0, "--no-binary"], "leaves nothing"),
    "evaluation": (["--evaluation", "good"], "NAME=RESULT"),
    "retirement": (["--retire", "31.12.2030"], "YYYY-MM-DD"),
    "base": (["--base", "nowhere"], "nowhere has no config.json"),
    "one adapter for jd": (["--method", "jd-diagonal"], "two or more"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_bad_option_is_refused_before_anything_is_written(kind, adapter_folder, tmp_path):
    options, message = OPTIONS[kind]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call("quantize", adapter_folder, "--output", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(adapter_folder, adapter_folders, base_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        call("quantize", tmp_path / "absent", "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="takes one adapter; came 3"):
        call("quantize", *adapter_folders, "--output", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="lowra adapter quantize"):
        call("inspect", adapter_folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        call("inspect", tmp_path / "absent")
    with pytest.raises(ValueError, match="is given twice"):
        call("quantize", *adapter_folders, adapter_folders[0], "--method", "jd-diagonal", "--output", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with pytest.raises(ValueError, match="exists and is not empty"):
        call("quantize", adapter_folder, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "kept"


@pytest.mark.parametrize("method", ["rtn", "jd-diagonal"])
def test_files_beside_the_weights_come_along(method, adapter_folders, tmp_path):
    """A tokenizer that was saved with an adapter may have tokens that the base's has not."""
    count = 1 if method == "rtn" else len(adapter_folders)
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in adapter_folders[:count]]
    for folder in folders:
        (folder / "additional_chat_templates").mkdir()
        (folder / "checkpoint-5").mkdir()
        for name in ("tokenizer.json", "additional_chat_templates/tools.jinja", "optimizer.pt", "README.md"):
            (folder / name).write_text(folder.name)
        (folder / "checkpoint-5" / WEIGHTS).write_text("another")
    call("quantize", *folders, "--method", method, "--output", tmp_path / "out")
    for folder in folders:
        place = tmp_path / "out" / (folder.name if count > 1 else "")
        copied = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
        own = {"adapter_config.json", "lowra_adapter.json", "lowra_adapter.safetensors"}
        assert copied == own | {"tokenizer.json", "additional_chat_templates/tools.jinja"}
        assert (place / "tokenizer.json").read_text() == folder.name
