"""Everything beside the weights comes along: the same text has the same ids, and the same chat the same prompt."""

import json
import os
import shutil

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from lowra import LowRAConfig, quantize_checkpoint
from lowra.checkpoints.companions import NOT_WANTED, companions

TEXT = "The city was founded in 1842 by settlers <new> who spoke Übersee ."


def describe(folder, kind, **entries):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **entries}))


def byte_pairs(folder):
    """GPT-2's two files, with tokens added in a third, and no tokenizer.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate([*alphabet, "Th", "he", "The"])}))
    (folder / "merges.txt").write_text("#version: 0.2\nT h\nh e\nTh e\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 259}))
    describe(folder, "GPT2Tokenizer", unk_token="!", bos_token="!", eos_token="!")


def word_pieces(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "city", "was", "found", "##ed", "in", "by", "##er"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": "[UNK]", "pad_token": "[PAD]"}))
    describe(folder, "BertTokenizer", do_lower_case=True)


def one_file(folder):
    words = {word: i for i, word in enumerate(["<unk>", "The", "city", "was", "by"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    describe(folder, "PreTrainedTokenizerFast", unk_token="<unk>")


def own_code(folder):
    """A class that comes with the checkpoint and reads a file of a name of its own, in a folder of its own."""
    (folder / "words").mkdir()
    (folder / "words" / "list.tiktoken").write_text("The city was by")
    (folder / "tokenization_own.py").write_text(
        "import pathlib\n"
        "from transformers import PreTrainedTokenizer\n"
        "class OwnTokenizer(PreTrainedTokenizer):\n"
        "    def __init__(self, name_or_path='', **kwargs):\n"
        "        path = pathlib.Path(name_or_path) / 'words' / 'list.tiktoken'\n"
        "        self.words = path.read_text().split() if path.exists() else []\n"
        "        super().__init__(name_or_path=name_or_path, **kwargs)\n"
        "    vocab_size = property(lambda self: len(self.words) + 1)\n"
        "    def get_vocab(self): return {word: i + 1 for i, word in enumerate(self.words)}\n"
        "    def _tokenize(self, text): return text.split()\n"
        "    def _convert_token_to_id(self, token): return self.get_vocab().get(token, 0)\n"
        "    def _convert_id_to_token(self, index): return ['', *self.words][index]\n"
    )
    describe(folder, "OwnTokenizer", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})


def plain(model, target):
    """A copy of a checkpoint without its tokenizer."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "vocab*"))
    return target


def packed(model, output):
    quantize_checkpoint(str(model), output, LowRAConfig(bits=2, menu=(2,)), device="cpu", progress=False)
    return output


@pytest.mark.parametrize("write", [byte_pairs, word_pieces, one_file, own_code])
def test_the_same_text_has_the_same_ids(tiny_llama, tmp_path, write):
    model = plain(tiny_llama, tmp_path / "model")
    write(model)
    output = packed(model, tmp_path / "packed")
    before, after = (AutoTokenizer.from_pretrained(place, trust_remote_code=True) for place in (model, output))
    assert len(set(before(TEXT)["input_ids"])) > 3, "the tokenizer of the test knows no word"
    assert before(TEXT)["input_ids"] == after(TEXT)["input_ids"]


def test_chats_have_the_same_prompts(tiny_llama, tmp_path):
    model = plain(tiny_llama, tmp_path / "model")
    one_file(model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ messages[0].content }}")
    before, after = map(AutoTokenizer.from_pretrained, (model, packed(model, tmp_path / "packed")))
    for template in (None, "tool_use"):
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], chat_template=template, tokenize=False)
            for tokenizer in (before, after)
        ]
        assert prompts[0] == prompts[1] and "hi" in prompts[0]


COPIED = [
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "source.spm",
    "target.spm",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "tekken.json",
    "bpe_simple_vocab_16e6.txt.gz",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "generation_config.json",
    "modeling_own.py",
    "LICENSE",
    "additional_chat_templates/rag.jinja",
    "own_package/__init__.py",
    "own_package/deep/code.py",
    "custom_generate/generate.py",
    "voices/config.json",
    "name with spaces é.txt",
]
LEFT = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "training_args.bin",
    "optimizer.pt",
    "rng_state.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "model.Q4.gguf",
    "consolidated.00.pth",
    "params.json",
    "README.md",
    "adapter_config.json",
    "trainer_state.json",
    "calibration.safetensors",
    ".gitattributes",
    ".cache/huggingface/download/config.json.metadata",
    "__pycache__/modeling_own.pyc",
    "original/tokenizer.model",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "onnx/tokenizer.json",
    "checkpoint-500/optimizer.pt",
    "checkpoint-500/tokenizer.json",
    "another_model/model.safetensors",
    "another_model/config.json",
]


def test_what_is_copied_and_what_is_left(tiny_llama, tmp_path):
    model = plain(tiny_llama, tmp_path / "model")
    for name in COPIED + LEFT:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(name.encode())
    (model / "tokenizer_old").mkdir()  # a folder of a tokenizer's name, which is no file to be copied
    output = packed(model, tmp_path / "packed")
    found = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    own = {"config.json", "model.safetensors", "README.md", "lowra_report.json", "lowra_digests.json"}
    assert found == own | set(COPIED)
    assert all((output / name).read_bytes() == name.encode() for name in COPIED)
    assert b"lowra" in (output / "README.md").read_bytes()


def test_an_output_among_the_sources_files_is_not_copied_into_itself(tiny_llama, tmp_path):
    model = plain(tiny_llama, tmp_path / "model")
    one_file(model)
    for name in ("tokenizer_small", "again"):  # the second has the first beside the weights too
        output = packed(model, model / name)
        assert not [path for path in output.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("gone"), "link to nothing"),
        (os.mkfifo, "named pipe"),
    ],
)
def test_files_that_cannot_be_copied_are_named_before_the_work(tiny_llama, tmp_path, make, message):
    model = plain(tiny_llama, tmp_path / "model")
    make(model / "merges.txt")
    with pytest.raises(OSError, match=f"merges.txt .*{message}"):
        packed(model, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == [model]


def test_links_are_followed_and_do_not_go_in_circles(tmp_path):
    """Snapshots of the hub are links to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("x")
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    (model / "vocab.json").symlink_to("../blobs/1")
    (model / "inner" / "back").symlink_to("..")
    (model / "linked").symlink_to("../blobs")
    assert sorted(map(str, companions(model))) == ["linked/1", "vocab.json"]


def test_the_hub_gives_the_same_files():
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += [name for name in COPIED]
    second = ["original/consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors"]
    assert list(filter_repo_objects(wanted + second, ignore_patterns=NOT_WANTED)) == wanted


def test_a_large_amount_is_said(tmp_path, caplog):
    save_file({}, tmp_path / "model.safetensors")
    with open(tmp_path / "data.jsonl", "wb") as file:
        file.truncate(2 << 30)
    with caplog.at_level("WARNING"):
        assert len(companions(tmp_path)) == 1
    assert "1 files, 2.1 GB" in caplog.text
