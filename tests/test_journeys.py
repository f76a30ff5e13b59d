"""Two people's first hour on the model that comes with lowra: one types commands, one writes Python with TRL."""

import json
import os

import pytest
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowra
from lowra.commands import main
from lowra.demo import BASE

TEMPLATE = """{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}\
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"What stands beside the {place}?"},
            {"role": "assistant", "content": f"Beside the {place} stands an old {building} of stone."},
        ]
    }
    for place in ("river", "road", "sea", "wood")
    for building in ("house", "church", "mill", "bridge")
]


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS), encoding="utf-8")
    (tmp_path / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return path


def run(capsys, *arguments):
    """What a command printed, and its JSON."""
    assert main([*map(str, arguments), "--json"]) == 0
    shown = capsys.readouterr().out.strip()
    return shown, json.loads(shown.splitlines()[-1])


def test_on_the_command_line(tmp_path, conversations, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # all places are given relative, as people type them
    _, report = run(capsys, "quantize", BASE, "--bits", "2", "--budget", "true", "--rank", "8", "--output", "small")
    assert report["true_bits"] <= 2
    settings = [
        "block_size=64",
        "batch_size=4",
        "accumulation=1",
        "max_steps=6",
        "save_steps=3",
        "bf16=false",
    ]
    data = [f"train_file={conversations.name}", f"validation_file={conversations.name}"]
    shown, tuned = run(
        capsys,
        "finetune",
        "8gb-chat",
        "model=small",
        "chat_template=template.jinja",
        *data,
        *settings,
        "output=runs/mine",
    )
    assert "A checkpoint every 3 steps" in shown and "lowra chat small --adapter runs/mine/adapter" in shown
    assert tuned["tuned"]["perplexity"] < tuned["untuned"]["perplexity"]
    assert sorted(os.listdir("runs/mine/checkpoints")) == ["checkpoint-3", "checkpoint-6"]
    card = (tmp_path / "runs/mine/adapter/README.md").read_text(encoding="utf-8")
    assert f"`{tmp_path / 'small'}`" in card and "AutoPeftModelForCausalLM" in card and "More Information" not in card
    (tmp_path / "text.txt").write_text("Beside the river stands an old mill of stone.\n" * 40, encoding="utf-8")
    adapter = ["--adapter", "runs/mine/adapter"]
    _, measured = run(capsys, "evaluate", "small", *adapter, "--data", "text.txt", "--block-size", "64")
    assert measured["perplexity"] > 1
    shown, said = run(capsys, "generate", "small", *adapter, "--prompt", "Beside the", "--tokens", "8")
    assert said["text"].startswith("Beside the") and "8 tokens" in shown
    assert main(["generate", "small", "--prompt", "Beside the", "--tokens", "4000"]) == 2
    assert "has 1024 positions" in capsys.readouterr().err
    assert main(["merge", "runs/mine/adapter", "--output", "merged"]) == 0
    assert AutoTokenizer.from_pretrained("merged").chat_template == TEMPLATE
    plain = AutoModelForCausalLM.from_pretrained("merged")
    assert not hasattr(plain.config, "quantization_config")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # the adapter finds its base from any folder
    AutoPeftModelForCausalLM.from_pretrained("../runs/mine/adapter")


def test_in_python_with_trl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    assert main(["quantize", str(BASE), "--bits", "1.5", "--rank", "8", "--output", "small"]) == 0
    tokenizer = AutoTokenizer.from_pretrained("small")
    tokenizer.chat_template = TEMPLATE
    base = AutoModelForCausalLM.from_pretrained("small", dtype="float32")
    base = lowra.prepare_for_training(base)
    model = PeftModel.from_pretrained(base, "small/initial_adapter", is_trainable=True)
    arguments = SFTConfig(
        "sft", max_steps=8, per_device_train_batch_size=4, learning_rate=4e-3, assistant_only_loss=True, max_length=64,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(CONVERSATIONS), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model("adapter")
    tuned = AutoPeftModelForCausalLM.from_pretrained("adapter")
    prompt = tokenizer.apply_chat_template(CONVERSATIONS[0]["messages"][:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt")
    said = tuned.generate(**ids, max_new_tokens=8, do_sample=False)
    assert said.shape[1] > ids["input_ids"].shape[1]
    lowra.merge_into_dense(tuned).save_pretrained("merged")
    tokenizer.save_pretrained("merged")
    AutoModelForCausalLM.from_pretrained("merged")
