"""`lowra inspect`: its numbers add up to the files, and its pictures are drawn."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_model
from transformers import AutoModelForCausalLM

import lowra
from lowra.commands import main
from lowra.inspection.errors import Original, channel_errors
from lowra.inspection.memory import footprints
from lowra.inspection.packed import PackedFolder, block_of, kind_of
from lowra.inspection.pictures import draw_blocks


def inspect(capsys, *arguments) -> dict:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_totals_are_those_of_the_files(packed_llama, capsys):
    result = inspect(capsys, packed_llama)
    report = json.loads((packed_llama / "lowra_report.json").read_text())
    assert result["packed_bytes"] == report["packed_bytes"]
    assert result["quantised_parameters"] == report["quantised_parameters"]
    assert result["nominal_bits"] == pytest.approx(report["nominal_bits"], abs=1e-6)
    assert result["true_bits"] == pytest.approx(report["true_bits"], abs=1e-6)
    parts = sum(result["code_bytes"].values()) + result["scale_bytes"] + result["table_bytes"]
    assert (
        parts
        == result["packed_bytes"]
        == sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in load_file(packed_llama / "model.safetensors").items()
            if ".layers." in name and "norm" not in name
        )
    )
    assert sum(kind["parameters"] for kind in result["kinds"]) == result["quantised_parameters"]
    assert sum(kind["layers"] for kind in result["kinds"]) == len(result["layers"]) == 14


def test_tables_name_every_kind_and_every_layer(packed_llama, capsys):
    assert main(["inspect", str(packed_llama), "--layers"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "as NF4",
        "as bf16",
        "nominal",
        "true",
        "estimated",
    ):
        assert expected in shown


def test_errors_are_those_of_the_weights(packed_llama, dense_llama):
    packed = PackedFolder(str(packed_llama))
    errors = channel_errors(packed, Original(str(dense_llama), packed))
    name = "model.layers.0.mlp.down_proj"
    mine = next(error for error in errors if error.name == name)
    weight = load_file(dense_llama / "model.safetensors")[f"{name}.weight"]
    base = packed.weight(packed.targets[f"{name}.weight"]).dequantize()
    energy = weight.square().sum(dim=1)
    torch.testing.assert_close(mine.base, (weight - base).square().sum(dim=1) / energy)
    factors = load_file(packed_llama / "initial_adapter" / "adapter_model.safetensors")
    update = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    torch.testing.assert_close(mine.adapted, (weight - base - update).square().sum(dim=1) / energy)


def test_whole_bits_in_the_memory_estimate_are_what_would_be_stored(dense_llama, tmp_path):
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "two", lowra.LowRAConfig(bits=2, menu=(2,)), progress=False)
    packed = PackedFolder(str(tmp_path / "two"))
    bars = footprints(list(packed.contents()), 0, 4, training=False)
    assert bars[2].parts == bars[3].parts
    assert bars[2].total < bars[1].total < bars[0].total


def test_pictures(packed_llama, dense_llama, tmp_path, capsys):
    folder = tmp_path / "pictures"
    result = inspect(capsys, packed_llama, "--original", dense_llama, "--plot", folder)
    names = {"bits.png", "channels.png", "memory.png", "blocks.png", "errors.png"}
    assert {path.name for path in folder.iterdir()} == names and len(result["pictures"]) == 5
    assert all(path.stat().st_size > 10_000 for path in folder.iterdir())
    result = inspect(capsys, packed_llama, "--plot", tmp_path / "all.pdf")
    assert result["pictures"] == [str(tmp_path / "all.pdf")]
    assert (tmp_path / "all.pdf").read_bytes().startswith(b"%PDF")
    result = inspect(capsys, packed_llama, "--plot", tmp_path / "small.png")
    assert (tmp_path / "small-bits.png").exists() and len(result["pictures"]) == 4


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("model.layers.11.self_attn.q_proj", "self_attn.q_proj", 11),
        ("transformer.h.0.mlp.c_fc", "mlp.c_fc", 0),
        ("model.decoder.layers.2.encoder_attn.k_proj", "decoder encoder_attn.k_proj", 2),
        ("encoder.block.3.layer.1.DenseReluDense.wi", "encoder layer.1.DenseReluDense.wi", 3),
    ],
)
def test_kinds_and_blocks(name, kind, block):
    assert (kind_of(name), block_of(name)) == (kind, block)


def test_misuse_is_refused(packed_llama, dense_llama, tmp_path, capsys):
    make_model("LlamaForCausalLM", seed=9).save_pretrained(tmp_path / "other")
    cases = [
        ([dense_llama], "is not packed by lowra"),
        ([tmp_path / "nowhere"], "not a folder"),
        ([packed_llama, "--original", packed_llama], "quantised itself"),
        ([packed_llama, "--original", tmp_path / "other"], "fingerprint"),
        ([packed_llama, "--plot", tmp_path / "small.txt"], ".png, .svg or .pdf"),
    ]
    for arguments, message in cases:
        assert main(["inspect", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


DAMAGED = {
    "cut short": (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "cut short or damaged"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "a layer more": (
        lambda f: replace(f, '"num_hidden_layers": 2', '"num_hidden_layers": 3'),
        "lacks levels, row_bits",
    ),
    "a layer less": (lambda f: replace(f, '"num_hidden_layers": 2', '"num_hidden_layers": 1'), "has no place for"),
    "another group": (lambda f: replace(f, '"group_size": 64', '"group_size": 32'), "and groups of 32"),
    "a norm missing": (
        lambda f: change_tensors(f, lambda t: t.pop("model.norm.weight")),
        "lacks 1 tensor(s): model.norm",
    ),
    "a norm cut short": (
        lambda f: change_tensors(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:8].clone()})),
        "model.norm.weight has shape [8]",
    ),
    "a tensor more": (
        lambda f: change_tensors(f, lambda t: t.update({"model.extra": torch.zeros(2)})),
        "holds 1 tensor(s): model.extra",
    ),
    "another format": (lambda f: replace(f, '"format_version": 1', '"format_version": 9'), "packed format 9"),
}


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def replace(folder, old, new):
    path = folder / "config.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoints_are_refused(packed_llama, tmp_path, capsys, case):
    change, message = DAMAGED[case]
    shutil.copytree(packed_llama, tmp_path / "damaged")
    change(tmp_path / "damaged")
    assert main(["inspect", str(tmp_path / "damaged")]) == 2
    assert message in capsys.readouterr().err


def test_pictures_tell_encoder_and_decoder_apart(tmp_path):
    make_model("T5ForConditionalGeneration").save_pretrained(tmp_path / "dense")
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", lowra.LowRAConfig(), progress=False)
    figure = draw_blocks(PackedFolder(str(tmp_path / "packed")), None)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles[0] == "encoder layer.0.SelfAttention.q\nblock 1"
    assert titles[-1] == "decoder layer.0.SelfAttention.q\nblock 1"
    assert len(set(titles)) == len(titles) == 7


def test_a_model_quantised_while_loading_is_shown_too(dense_llama, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(dense_llama, load_in_lowra=True, lowra_bits=1.5)
    model.save_pretrained(tmp_path / "packed")
    result = inspect(capsys, tmp_path / "packed", "--original", dense_llama)
    assert result["true_bits"] == pytest.approx(model.config.quantization_config.true_bits, abs=1e-6)
    assert set(result["errors"]) <= {"4 bits", "2 bits", "1 bit"}
