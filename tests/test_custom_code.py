"""Checkpoints that bring their own Python code."""

import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowra.commands import main
from lowra.generation.loading import load_model

_CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "lowra-tests-own"
"""

_MODELING = """
import torch
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2  # what Transformers' class would not do
        return output
"""

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module", params=["own configuration", "configuration of Transformers"])
def own(request, tmp_path_factory):
    """A dense checkpoint whose architecture only its own code has."""
    folder = tmp_path_factory.mktemp("own") / "dense"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_SIZES)).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "configuration_own.py").write_text(_CONFIGURATION)
    (folder / "modeling_own.py").write_text(_MODELING)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["OwnForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    if request.param == "own configuration":
        config["model_type"] = "lowra-tests-own"
        config["auto_map"]["AutoConfig"] = "configuration_own.OwnConfig"
    else:
        (folder / "modeling_own.py").write_text(
            _MODELING.replace(
                "from .configuration_own import OwnConfig", "from transformers import LlamaConfig as OwnConfig"
            )
        )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def packed_own(own, tmp_path_factory):
    output = tmp_path_factory.mktemp("own") / "packed"
    command = ["quantize", str(own), "--bits", "2", "--rank", "4", "--output", str(output)]
    assert main([*command, "--trust-remote-code"]) == 0
    return output


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The history of the city begins with the river and its bridges.\n" * 100)
    return path


def test_own_code_is_packed_as_python_packs_it(own, packed_own, tmp_path):
    tokens = torch.arange(40).view(2, 20)
    wanted = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True, load_in_lowra=True, lowra_bits=2)
    command = ["quantize", str(own), "--bits", "2", "--output", str(tmp_path / "packed"), "--trust-remote-code"]
    assert main(command) == 0
    with torch.no_grad():
        logits = load_model(str(tmp_path / "packed"), trust_remote_code=True, device="cpu")(tokens).logits
        assert torch.equal(logits, wanted.eval()(tokens).logits)
    assert "trust_remote_code=True" in (packed_own / "README.md").read_text()
    adapter = json.loads((packed_own / "initial_adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM"


def test_every_command_takes_own_code(own, packed_own, text, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("block_size: 32\nbatch_size: 2\naccumulation: 1\nmax_steps: 2\nbf16: false\nrank: 4\n")
    data = [f"train_file={text}", f"validation_file={text}", "trust_remote_code=true"]
    for model, output in ((packed_own, "first"), (own, "second")):
        assert main(["finetune", str(recipe), *data, f"model={model}", f"output={tmp_path / output}"]) == 0
    adapter = str(tmp_path / "first" / "adapter")
    trust = ["--trust-remote-code"]
    with_adapter = [str(packed_own), "--adapter", adapter]
    measure = ["evaluate", *with_adapter, "--data", str(text), "--block-size", "32"]
    assert main([*measure, *trust]) == 0
    assert main(["generate", *with_adapter, "--prompt", "The", "--tokens", "3", *trust]) == 0
    assert main(["inspect", str(packed_own), "--original", str(own), *trust]) == 0
    calibrated = ["quantize", str(own), "--calibrate", str(text), "--calibration-tokens", "256"]
    assert main([*calibrated, "--output", str(tmp_path / "calibrated"), *trust]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("command", ["quantize", "evaluate", "generate", "inspect", "finetune"])
def test_own_code_is_not_run_unasked(own, packed_own, text, tmp_path, capsys, command):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {own}\ntrain_file: {text}\nvalidation_file: {text}\nblock_size: 32\n")
    arguments = {
        "quantize": [str(own), "--output", str(tmp_path / "out")],
        "evaluate": [str(packed_own), "--data", str(text), "--block-size", "32"],
        "generate": [str(packed_own), "--prompt", "The"],
        "inspect": [str(packed_own)],
        "finetune": [str(recipe), f"output={tmp_path / 'out'}"],
    }
    assert main([command, *arguments[command]]) == 2
    said = capsys.readouterr().err
    assert "--trust-remote-code" in said and "Traceback" not in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
