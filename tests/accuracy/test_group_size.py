"""The group size that a true budget chooses: what scales cost against what they save."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowra import LowRAConfig, quantize_checkpoint
from lowra.commands import main
from lowra.quantization import group_size
from lowra.quantization.group_size import GROUP_SIZES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Weights that are alike all along a channel, and weights whose size changes every 64."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    folder = tmp_path_factory.mktemp("models")
    model.save_pretrained(folder / "even")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.view(len(weight), -1, 64).mul_(torch.tensor([1.0, 8.0, 0.1, 3.0])[:, None])
    model.save_pretrained(folder / "uneven")
    return folder


def packed(models, name, output, group_sizes=GROUP_SIZES, **config):
    config = LowRAConfig(**{"bits": 2.2, "budget": "true", **config})
    report = quantize_checkpoint(
        str(models / name), output, config, device="cpu", progress=False, group_sizes=group_sizes
    )
    assert report["true_bits"] <= config.bits
    return json.loads((output / "config.json").read_text())["quantization_config"]["group_size"], report["error"]


def test_scales_are_many_where_weights_differ_and_few_where_they_do_not(models, tmp_path):
    for name, best in (("even", 256), ("uneven", 64)):
        chosen, error = packed(models, name, tmp_path / name)
        assert chosen == best
        others = [packed(models, name, tmp_path / f"{name}{size}", (), group_size=size)[1] for size in GROUP_SIZES]
        assert error == min(others) and error < 0.99 * max(others)


def test_a_budget_that_only_large_groups_meet_is_met(models, tmp_path):
    assert packed(models, "uneven", tmp_path / "out", bits=1.2)[0] == 256
    with pytest.raises(ValueError, match="below the smallest that can be built"):
        packed(models, "even", tmp_path / "less", bits=1.01)


@pytest.mark.parametrize("intermediate", [64, 1024])
def test_matrices_that_cost_more_or_less_than_all_do_not_decide_what_a_budget_meets(
    tmp_path, monkeypatch, intermediate
):
    monkeypatch.setattr(group_size, "_MOST", 2)
    shape = {"hidden_size": 256, "intermediate_size": intermediate, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="below the smallest that can be built") as refused:
        packed(tmp_path, "model", tmp_path / "less", bits=1.05)
    least = float(re.search(r"take ([\d.]+)\. Give at least that\.$", str(refused.value))[1])
    assert packed(tmp_path, "model", tmp_path / "out", bits=least)[0] == 256


def test_the_command_chooses_where_it_is_asked(models, tmp_path, capsys):
    def chosen(name, *options):
        command = ["quantize", str(models / "even"), "--bits", "2.2", "--output", str(tmp_path / name), *options]
        assert main(command) == 0
        return json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["group_size"]

    assert chosen("true", "--budget", "true") == 64
    assert chosen("best", "--budget", "true", "--group-size", "best") == 256
    assert main(["quantize", str(models / "even"), "--output", str(tmp_path / "no"), "--group-size", "best"]) == 2
    assert "--group-size best needs --budget true" in capsys.readouterr().err
