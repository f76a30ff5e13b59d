"""JSON files of checkpoints as anybody may have written them: loading, inspecting, evaluating and quantising say one
sentence, the same things are refused by all of them, and nothing hangs."""

import json
import os
import shutil

import pytest
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lowra import AdapterRecipe, LowRAConfig, quantize_checkpoint
from lowra.checkpoints import configs
from lowra.commands import main


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "llama"
    quantize_checkpoint(str(tiny_llama), folder, LowRAConfig(bits=1.5), AdapterRecipe(4), device="cpu", progress=False)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The city was founded by settlers. " * 40)
    return path


def entry(**changes):
    """Keys of config.json."""

    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def packing(**changes):
    """Keys of its quantization_config."""

    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(content))

    return change


def written(name, content):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content)

    return change


def made(name, make):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def sharded(folder, index=None, name="model-00001-of-00001.safetensors"):
    """The one file of a checkpoint as a shard."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as content:
        keys = list(content.keys())
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    usual = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, name)}
    text = index if isinstance(index, str) else json.dumps({**usual, **(index or {})})
    (folder / "model.safetensors.index.json").write_text(text)


DEEP = '{"a":' * 100_000
NESTED = json.loads("[" * 200 + "]" * 200)

EITHER = {
    "null": written("config.json", "null"),
    "a list": written("config.json", "[]"),
    "text": written("config.json", '"lowra"'),
    "a number": written("config.json", "1"),
    "empty": written("config.json", ""),
    "cut": written("config.json", '{"model_type": "llama", '),
    "not UTF-8": written("config.json", b'{"model_type": "ll\xffma"}'),
    "nested": written("config.json", DEEP),
    "nested lists": written("config.json", "[" * 100_000),
    "a pipe": made("config.json", os.mkfifo),
    "a folder": made("config.json", os.mkdir),
    "a link to nothing": made("config.json", lambda path: path.symlink_to("gone")),
    "a key twice": written("config.json", '{"model_type": "llama", "model_type": "gpt2"}'),
    "an endless number": written("config.json", '{"vocab_size": ' + "9" * 5000 + "}"),
    "architectures: text": entry(architectures="LlamaForCausalLM"),
    "architectures: numbers": entry(architectures=[1]),
    "architectures: null in a list": entry(architectures=[None]),
    "architectures: unknown": entry(architectures=["NoSuchModel"], model_type="no-such-model"),
    "model_type: a list": entry(model_type=["llama"]),
    "model_type: a number": entry(model_type=1),
    "model_type: unknown": entry(model_type="no-such-model"),
    "auto_map: a list": entry(auto_map=["AutoModel"]),
    "auto_map: null": entry(auto_map=None),
    "quantization_config: a list": entry(quantization_config=["lowra"]),
    "quantization_config: text": entry(quantization_config="lowra"),
    "quant_method: a list": entry(quantization_config={"quant_method": ["lowra"]}),
    "quant_method: a number": entry(quantization_config={"quant_method": 1}),
    "hidden_size: text": entry(hidden_size="64"),
    "hidden_size: null": entry(hidden_size=None),
    "hidden_size: a list": entry(hidden_size=[64]),
    "hidden_size: negative": entry(hidden_size=-64),
    "no heads": entry(num_attention_heads=0),
    "heads that do not fit": entry(num_attention_heads=5),
    "a billion layers": entry(num_hidden_layers=10**9),
    "2^63 layers": entry(num_hidden_layers=2**63),
    "layers: a fraction": entry(num_hidden_layers=1.5),
    "vocab_size: text": entry(vocab_size=""),
    "rope_parameters: a list": entry(rope_parameters=[]),
    "torch_dtype: a number": entry(dtype=1),
    "torch_dtype: unknown": entry(dtype="float7"),
    "an activation of no name": entry(hidden_act="no-such-function"),
    "index: null": lambda folder: sharded(folder, "null"),
    "index: a list": lambda folder: sharded(folder, "[]"),
    "index: nested": lambda folder: sharded(folder, DEEP),
    "index: null for the map": lambda folder: sharded(folder, {"weight_map": None}),
    "index: a list for the map": lambda folder: sharded(folder, {"weight_map": []}),
    "index: nothing in the map": lambda folder: sharded(folder, {"weight_map": {}}),
    "index: null for a shard": lambda folder: sharded(folder, name=None),
    "index: a number for a shard": lambda folder: sharded(folder, name=1),
    "index: true for a shard": lambda folder: sharded(folder, name=True),
    "index: a list for a shard": lambda folder: sharded(folder, name=["model.safetensors"]),
    "index: outside": lambda folder: sharded(folder, name="../other/model.safetensors"),
    "index: absolute": lambda folder: sharded(folder, name="/etc/passwd.safetensors"),
    "index: not there": lambda folder: sharded(folder, name="gone.safetensors"),
    "index: a pickle": lambda folder: sharded(folder, name="model.bin"),
    "weights: a pipe": made("model.safetensors", os.mkfifo),
    "weights: a folder": made("model.safetensors", os.mkdir),
    "weights: nothing": lambda folder: (folder / "model.safetensors").unlink(),
    "weights: empty": written("model.safetensors", b""),
    "weights: of git": written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    "weights: nested": written("model.safetensors", (5 * 100_000).to_bytes(8, "little") + DEEP.encode()),
}
OF_PACKED = {
    "not lowra any more": entry(quantization_config=None),
    "nothing of it": entry(quantization_config={}),
    "a name of another": entry(quantization_config={"quant_method": "awq"}),
    "no metadata in the index": lambda folder: sharded(folder, {"metadata": None}),
    "generation: a list": written("generation_config.json", "[]"),
    "generation: null": written("generation_config.json", "null"),
    "generation: nested": written("generation_config.json", DEEP),
    "digests: a list": written("lowra_digests.json", "[]"),
    "digests: nested": written("lowra_digests.json", DEEP),
    "digests: a pipe": made("lowra_digests.json", os.mkfifo),
    **{
        f"{name}: {value!r:.40}": packing(**{name: value})
        for name, values in {
            "bits": ["two", None, [1.5], True, float("nan"), float("inf"), 10**400, -1, {}],
            "menu": [None, 2, "124", [], ["1", "2"], [1.5], [True, 2], [[1]], {"1": 2}, [3], NESTED, [1, 10**400]],
            "group_size": ["64", 64.0, None, True, [64], 63, 0, 2**70, float("nan")],
            "scales": [None, 1, [], "int8", {}, ["float16"]],
            "codebook": [None, 0, "x"],
            "iterations": [None, "20", 1.5, True, -1, 2**70],
            "quantize_head": [None, "no", 0, [], "false"],
            "quantize_embeddings": [1, "yes"],
            "modules_to_not_convert": [1, True, {}, [None], [1], ["a", ["b"]], NESTED],
            "format_version": [None, "1", True, 1.5, 2, [1], float("nan")],
            "nominal_bits": ["1.5", [], True, float("nan")],
            "true_bits": ["1.5", {}, float("inf")],
            "error": ["small", [], float("nan")],
            "base": [1, [], {"name": "x"}, True],
            "fingerprint": [1, [], {}],
            "packing": ["x", [], {"codes": 1}, {"codes": None}, {"codes": "0" * 64}],
            "initial_adapter": ["x", [], {"rank": [4]}, {"rank": None}],
            "calibration": [1, [], {}],
            "quant_methods": ["lowra"],
            "x" * 300: [1],
        }.items()
        for value in values
    },
}


def broken(folder, target, case):
    shutil.copytree(folder, target)
    case(target)
    return target


def said(arguments, capsys):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lowra: ") and len(error) < 1500
    return error


def said_by_loading(load, folder):
    with pytest.raises((ValueError, OSError)) as caught:
        load(folder)
    message = str(caught.value).strip()
    assert message and message.count("\n") <= 2 and len(message) < 1500
    return message


@pytest.mark.parametrize("case", [*EITHER, *OF_PACKED])
def test_packed_checkpoints(packed, tmp_path, capsys, case):
    folder = broken(packed, tmp_path / "broken", (EITHER | OF_PACKED)[case])
    said_by_loading(AutoModelForCausalLM.from_pretrained, folder)
    if "unknown" not in case:  # which class it is need not be known to whoever names one
        said_by_loading(LlamaForCausalLM.from_pretrained, folder)
    said(["inspect", folder], capsys)


@pytest.mark.parametrize("case", EITHER)
def test_dense_checkpoints(tiny_llama, tmp_path, capsys, case):
    folder = broken(tiny_llama, tmp_path / "broken", EITHER[case])
    said(["quantize", folder, "--output", tmp_path / "out", "--device", "cpu"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("case", [*list(EITHER)[::4], *list(OF_PACKED)[::8]])
def test_commands_that_load(packed, tmp_path, capsys, case, text):
    folder = broken(packed, tmp_path / "broken", (EITHER | OF_PACKED)[case])
    said(["evaluate", folder, "--data", text, "--block-size", 64, "--device", "cpu"], capsys)
    said(["generate", folder, "--prompt", "The", "--device", "cpu"], capsys)
    said(["quantize", folder, "--output", tmp_path / "out", "--device", "cpu"], capsys)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(folder), "train_file": str(text), "validation_file": str(text)}))
    said(["finetune", recipe, "block_size=64", "bf16=false", f"output={tmp_path / 'run'}"], capsys)


def test_what_is_whole_is_let_through(packed, tiny_llama, tmp_path, capsys):
    """Shards, odd but harmless keys, numbers that Mamba's configs have, and a packed folder that became dense."""
    folder = broken(packed, tmp_path / "shards", sharded)
    entry(time_step_limit=[0.0, float("inf")], num_layers=None)(folder)
    packing(modules_to_not_convert="no such name", menu=[4, 2, 1, 1])(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    assert main(["inspect", str(folder)]) == 0
    both = broken(packed, tmp_path / "both", lambda folder: None)
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(both)
    assert (both / "lowra_report.json").exists()
    assert AutoModelForCausalLM.from_pretrained(both).config.to_dict().get("quantization_config") is None


@pytest.mark.parametrize("case", ["null", "nested", "hidden_size: text", "no heads", "index: null", "weights: empty"])
def test_dense_models_end_as_without_lowra(tiny_llama, tmp_path, monkeypatch, case):
    """Transformers says of them what it says, in errors of its own."""
    folder = broken(tiny_llama, tmp_path / "broken", EITHER[case])
    found = []
    for ours in (True, False):
        if not ours:  # as if the checks did not exist
            monkeypatch.setattr(configs, "check_packed_folder", lambda folder: None)
            monkeypatch.setattr(
                "lowra.integrations.transformers_replacements.local_packed_folder", lambda path, options: None
            )
            monkeypatch.setattr("lowra.integrations.transformers_replacements.describes_packing", lambda config: False)
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - whatever it is, it is the same
            AutoModelForCausalLM.from_pretrained(folder)
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]


def test_a_config_alone_may_be_read_without_its_weights(packed, tmp_path):
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "lowra"


@pytest.mark.parametrize("menu", [(1, 2), [2, 4], {1}, (4,)])
def test_menus_of_any_kind_of_list(menu):
    assert LowRAConfig(bits=max(menu), menu=menu).menu == tuple(sorted(menu))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook": "normal_float", "menu": (1,)}, "no form at 1 bit"),
        ({"budget": "true", "bits": float("nan")}, "bits must be a number"),
        ({"budget": "true", "bits": 1e200}, "true bits makes no sense"),
        ({"budget": "true", "bits": 0}, "true bits makes no sense"),
        ({"menu": "12"}, "menu must be a list of precisions"),
        ({"menu": (1, 2.0)}, "menu must be a list of precisions"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert must be a list of names"),
        ({"refine": 2**40}, "refine must be a whole number"),
        ({"quant_method": "awq"}, "quant_method must be 'lowra'"),
        ({"base": 1}, "base must be text"),
    ],
)
def test_recipes_of_wrong_kinds(arguments, message):
    with pytest.raises(ValueError, match=message):
        LowRAConfig(**arguments)
    for content in ([], None, "lowra", 1):
        with pytest.raises(ValueError, match="must be a dictionary"):
            LowRAConfig.from_dict(content)


def adapter_entry(**changes):
    def change(folder):
        content = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**content, **changes}))

    return change


OF_ADAPTERS = {
    **{
        f"{name}: {text[:8]}": written(name, text)
        for name in ("adapter_config.json", "lowra_base.json")
        for text in ("null", "[]", '"x"', "1", "", "{", DEEP, "[" * 100_000)
    },
    "a pipe": made("adapter_config.json", os.mkfifo),
    "nothing in it": written("adapter_config.json", "{}"),
    "peft_type: a list": adapter_entry(peft_type=["LORA"]),
    "peft_type: unknown": adapter_entry(peft_type="NO_SUCH_METHOD"),
    "target_modules: null in a list": adapter_entry(target_modules=["q_proj", None]),
    "alpha_pattern: a number": adapter_entry(alpha_pattern=1),
    "rank_pattern: a list": adapter_entry(rank_pattern=["q_proj"]),
    "r: text": adapter_entry(r="4"),
    "r: negative": adapter_entry(r=-4),
    "weights: a pipe": made("adapter_model.safetensors", os.mkfifo),
    "weights: a folder": made("adapter_model.safetensors", os.mkdir),
}


@pytest.mark.parametrize("case", OF_ADAPTERS)
def test_adapters(packed, tmp_path, capsys, case):
    folder = broken(packed / "initial_adapter", tmp_path / "broken", OF_ADAPTERS[case])
    said_by_loading(lambda path: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed), path), folder)
    said(["generate", packed, "--adapter", folder, "--prompt", "The", "--device", "cpu"], capsys)
