"""Chat data: its three forms, loss on the assistant's turns alone, packing, and rows and templates that are refused."""

import dataclasses
import json
import pathlib

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowra.training.conversations import Conversation, encode, read_row
from lowra.training.data import IGNORED, load_data, load_tokenizer
from lowra.training.finetune import finetune
from lowra.training.packing import check_packing, collate_packed, pack

PLAIN = """{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
MARKED = """{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{% generation %}{{ m['content'] }}<end>
{% endgeneration %}{% else %}<{{ m['role'] }}>{{ m['content'] }}<end>
{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
REWRITING = """{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}(thoughts){% endif %}{{ m['content'] }}<end>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d"},
]


@pytest.fixture
def tokenizer(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.fixture
def chat(recipe, tmp_path):
    """A recipe on rows of all three forms."""
    rows = [
        {"messages": TURNS},
        {"prompt": "a river?", "completion": "a stone"},
        {"conversations": [{"from": "human", "value": "light?"}, {"from": "gpt", "value": "a house"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    (tmp_path / "template.jinja").write_text(PLAIN)
    file = str(tmp_path / "rows.jsonl")
    return dataclasses.replace(
        recipe,
        task="chat",
        train_file=file,
        validation_file=file,
        chat_template=str(tmp_path / "template.jinja"),
        block_size=128,
    )


def learned(example, tokenizer):
    """The text that has labels, turn by turn."""
    marked = "".join(
        tokenizer.decode([token]) if label != IGNORED else "|"
        for token, label in zip(example["input_ids"], example["labels"], strict=True)
    )
    return [part for part in marked.split("|") if part]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_loss_is_on_what_the_assistant_says(tokenizer, template):
    tokenizer.chat_template = template
    example = encode(read_row({"messages": TURNS}, "rows, line 1"), tokenizer, 1000)
    assert tokenizer.decode(example["input_ids"]) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert learned(example, tokenizer) == ["b<end>\n", "d<end>\n"]
    cut = encode(read_row({"messages": TURNS}, "rows, line 1"), tokenizer, 50)
    assert cut["input_ids"] == example["input_ids"][:50] and learned(cut, tokenizer) == ["b<"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_prompt_is_not_learned_even_where_the_assistant_speaks_in_it(tokenizer, template):
    tokenizer.chat_template = template
    example = encode(read_row({"prompt": TURNS[:4], "completion": TURNS[4:]}, "rows, line 1"), tokenizer, 1000)
    assert learned(example, tokenizer) == ["d<end>\n"]


def test_the_three_forms_are_one(tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    forms = [
        {"messages": turns},
        {"prompt": "a", "completion": "b"},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    examples = [encode(read_row(row, "rows, line 1"), tokenizer, 100) for row in forms]
    assert all(example == examples[0] for example in examples)


def test_a_conversation_that_the_assistant_begins(tokenizer):
    turns = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "a"}]
    assert learned(encode(Conversation(turns, None, "here"), tokenizer, 100), tokenizer) == ["<assistant>hello<end>\n"]


@pytest.mark.parametrize("template", [REWRITING, "{{ messages[0]['nothing'] + 1 }}", "{{ raise_exception('no') }}"])
def test_templates_that_do_not_tell_or_refuse(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="^rows, line 7: the chat template (writes turn 3 otherwise|refuses)"):
        encode(read_row({"messages": TURNS}, "rows, line 7"), tokenizer, 100)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('["a"]', "line 2 is a list; expected a JSON object"),
        ("{}", "line 2 must have messages, prompt and completion, or conversations: it has none of them"),
        ('{"text": "a"}', "it has none of them; it has text"),
        ('{"messages": [], "prompt": "a"}', "it has both messages and prompt"),
        ('{"messages": "a"}', "line 2: messages must be a list of turns, each with 'role' and 'content'"),
        ('{"messages": []}', "line 2: messages must be a list of turns"),
        ('{"messages": ["a"]}', "line 2: messages, turn 1, must be an object with text in 'role'"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages, turn 1, has no text in 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2 has no turn of the assistant"),
        ('{"prompt": "a"}', "line 2 has a prompt and no completion"),
        ('{"prompt": "a", "completion": 3}', "line 2: completion must be a list of turns"),
        ('{"conversations": [{"from": "bard", "value": "a"}]}', "line 2: conversations, turn 1, is from 'bard'"),
        ('{"conversations": [{"from": "gpt", "value": "\\ud800"}]}', "half of a surrogate pair"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "has the field 'prompt' twice"),
        ('{"prompt": "a", "completion": "c", "tools": "t"}', "line 2 has tools that are no list"),
    ],
)
def test_rows_that_cannot_be_used_are_named_by_their_line(chat, tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + row + "\n")
    with pytest.raises(ValueError, match="bad.jsonl, ") as error:
        load_data(dataclasses.replace(chat, train_file=str(path)), progress=False)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_without_template_and_a_file_that_is_not_there(chat):
    with pytest.raises(ValueError, match="has no chat template.*chat_template=FILE"):
        load_data(dataclasses.replace(chat, chat_template=None), progress=False)
    with pytest.raises(FileNotFoundError, match="There is no chat template nowhere.jinja"):
        load_data(dataclasses.replace(chat, chat_template="nowhere.jinja"), progress=False)
    with pytest.raises(ValueError, match="the assistant says nothing within block_size=2; a larger one"):
        load_data(dataclasses.replace(chat, block_size=2), progress=False)
    with pytest.raises(ValueError, match="block_size is 4096 tokens, but .* has 128 positions"):
        load_data(dataclasses.replace(chat, block_size=4096), progress=False)


def test_a_file_that_is_no_template_is_told_by_its_line(chat, tmp_path):
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}\n{{ m['content'] }}{% endif %}")
    with pytest.raises(ValueError, match="Line 2 of the chat template is no Jinja"):
        load_data(dataclasses.replace(chat, chat_template=str(tmp_path / "broken.jinja")), progress=False)


def test_turns_without_an_end_are_told_of(chat, tmp_path, caplog):
    load_data(chat, progress=False)
    assert "the model will not learn to stop" in caplog.text
    caplog.clear()
    (tmp_path / "ending.jinja").write_text(PLAIN.replace("<end>", "{{ eos_token }}"))
    load_data(dataclasses.replace(chat, chat_template=str(tmp_path / "ending.jinja")), progress=False)
    assert "learn to stop" not in caplog.text


def test_templates_of_trl_with_marks_and_without_agree(tokenizer):
    """Of those that write the same text, and do not mark more than what is generated."""
    trl = pytest.importorskip("trl")
    folder = pathlib.Path(trl.__file__).parent / "chat_templates"
    row = read_row({"messages": TURNS[1:]}, "rows, line 1")
    tokenizer.bos_token = tokenizer.eos_token
    for name in ("llama3", "gemma3", "qwen3_instruct_2507", "cohere2"):
        examples = []
        for file in (f"{name}.jinja", f"{name}_training.jinja"):
            if not (folder / file).exists():
                pytest.skip(f"this trl has no {file}")
            tokenizer.chat_template = (folder / file).read_text()
            examples.append(encode(row, tokenizer, 1000))
        assert examples[0] == examples[1], name
    tokenizer.chat_template = (folder / "qwen3.jinja").read_text()
    with pytest.raises(ValueError, match="turn 2 otherwise"):
        encode(row, tokenizer, 1000)


def test_rows_are_filled_and_nothing_is_lost():
    examples = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate([5, 3, 7, 2, 8, 1, 8], start=1)]
    rows = pack(examples, 8)
    assert sorted(len(row["input_ids"]) for row in rows) == [2, 8, 8, 8, 8]
    for i, n in enumerate([5, 3, 7, 2, 8, 1, 8], start=1):
        (row,) = [row for row in rows if i in row["input_ids"]]
        at = row["input_ids"].index(i)
        assert row["labels"][at : at + n] == [IGNORED] + [i] * (n - 1)
        assert row["position_ids"][at : at + n] == list(range(n))
    batch = collate_packed([rows[0], rows[-1]], pad=0)
    assert batch.keys() == {"input_ids", "labels", "position_ids"} and batch["labels"].shape == (2, 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_conversations_have_the_gradients_of_single_ones(chat, tiny_llama, attention):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation=attention)
    model.train()
    model.config.use_cache = False
    gradients = []
    for packing in (False, True):
        data = load_data(dataclasses.replace(chat, packing=packing), progress=False)
        batch = data.collate(data.train)
        assert packing == ("position_ids" in batch) and (not packing or len(data.train) < 12)
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_model_that_ignores_positions_is_found_out(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)

    def forward(input_ids, position_ids=None):
        return model(input_ids).logits

    check_packing(model, 256, lambda **inputs: model(**inputs, use_cache=False).logits)
    with pytest.raises(ValueError, match="packing=true cannot be used with this model"):
        check_packing(model, 256, forward)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_on_conversations(chat, packing):
    result = finetune(dataclasses.replace(chat, packing=packing), progress=False)
    assert result["tuned"]["perplexity"] < result["untuned"]["perplexity"]
    tokenizer = AutoTokenizer.from_pretrained(result["adapter"])
    assert tokenizer.chat_template == PLAIN
    AutoPeftModelForCausalLM.from_pretrained(result["adapter"])


def test_target_modules_rslora_and_dora(chat):
    recipe = dataclasses.replace(chat, method="qlora", target_modules=["q_proj", "v_proj"], rslora=True, dora=True)
    result = finetune(dataclasses.replace(recipe, max_steps=2), progress=False)
    config = AutoPeftModelForCausalLM.from_pretrained(result["adapter"]).peft_config["default"]
    assert config.use_rslora and config.use_dora
    assert sorted(config.target_modules) == [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"]
    assert result["recipe"]["rslora"] is True
    with pytest.raises(ValueError, match="'x_proj', which is no layer of the model: down_proj"):
        other = dataclasses.replace(recipe, target_modules=["x_proj"], output=chat.output + "2")
        finetune(other, progress=False)
    with pytest.raises(ValueError, match="dora cannot be used with method=lowra"):
        finetune(dataclasses.replace(chat, dora=True), progress=False)
    fitted = finetune(dataclasses.replace(chat, max_steps=1, output=chat.output + "3"), progress=False)
    on_packed = dataclasses.replace(chat, model=fitted["base"], rslora=True, output=chat.output + "4")
    with pytest.raises(ValueError, match="rslora cannot be used with it"):
        finetune(on_packed, progress=False)
