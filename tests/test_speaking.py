"""`lowra generate` and `lowra chat` with what users type and what lies beside a model: an answer, or one sentence."""

import json
import shutil

import pytest
from byte_tokenizer import byte_tokenizer

from lowra.commands import main

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"


@pytest.fixture
def model(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    return folder


def chat(model, monkeypatch, lines, *options, template=TEMPLATE):
    (model / "chat_template.jinja").write_text(template)
    typed = iter([*lines, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    return main(["chat", str(model), "--tokens", "3", "--json", *options])


@pytest.mark.parametrize(
    "lines, options, template, message",
    [
        (["a\udcffb"], [], TEMPLATE, "half of a surrogate pair"),
        (["Hi"], ["--system", "a\udcffb"], TEMPLATE, "half of a surrogate pair"),
        (["Hi"], ["--system", "Be kind"], NO_SYSTEM, "does not take this conversation: System role not supported."),
        (["Hi"], [], "{% for m in messages %}", "does not take this conversation: Unexpected end of template"),
        (["Hi"], [], "{{ 1 + None }}", "does not take this conversation: unsupported operand"),
        (["Hi"], [], "", "has no chat template"),
        (["x" * 200], [], TEMPLATE, "fills all positions"),
    ],
)
def test_a_conversation_that_cannot_be_is_refused_in_one_sentence(
    model, monkeypatch, capsys, lines, options, template, message
):
    assert chat(model, monkeypatch, lines, *options, template=template) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and not any("Traceback" in line for line in said)


def test_a_conversation_wants_a_standard_input(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert chat(model, monkeypatch, ["Hi"]) == 2
    assert "Standard input is closed" in capsys.readouterr().err


def test_tokens_that_the_model_does_not_have_are_refused(model, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(model)
    assert chat(model, monkeypatch, ["a zebra"]) == 2
    assert "'zebra' as number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"stop_strings": ["\x00\x01"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"force_words_ids": [[5]]},
        {"constraints": [1]},
        {"is_assistant": True},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "offloaded"},
    ],
)
def test_a_generation_config_of_other_uses_does_not_stop_a_command(model, capsys, own):
    (model / "generation_config.json").write_text(json.dumps({"pad_token_id": 0, **own}))
    assert main(["generate", str(model), "--prompt", "The", "--tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 4


@pytest.mark.parametrize("own", [{"eos_token_id": "x"}, {"eos_token_id": []}, {"forced_eos_token_id": 9999}])
def test_a_generation_config_at_odds_with_the_model_is_named(model, capsys, own):
    (model / "generation_config.json").write_text(json.dumps(own))
    assert main(["generate", str(model), "--prompt", "The", "--tokens", "4"]) == 2
    assert f"generation_config.json says of {next(iter(own))}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["generate", "evaluate", "chat"])
def test_an_adapter_brings_the_tokenizer_it_was_trained_with(model, tmp_path, capsys, monkeypatch, command):
    """Here one with a token more than the model, so that it shows."""
    adapter, text = tmp_path / "adapter", tmp_path / "text.txt"
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    text.write_text("a zebra and a zebra")
    monkeypatch.setattr("builtins.input", lambda prompt: "a zebra")
    options = {"generate": ["--prompt", "a zebra"], "evaluate": ["--data", str(text), "--block-size", "4"], "chat": []}
    if command == "chat":  # the model is loaded before the user speaks
        monkeypatch.setattr("lowra.commands.chat.load_model", lambda *_: None)
    assert main([command, str(model), "--adapter", str(adapter), *options[command]]) == 2
    assert "'zebra' as number" in capsys.readouterr().err
