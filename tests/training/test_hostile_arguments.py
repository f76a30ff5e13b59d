"""Every subcommand with arguments that cannot be meant: one sentence, exit status 2, and nothing written."""

import pytest
import torch

from lowra.commands import main
from lowra.device import choose_device


@pytest.fixture(scope="module")
def place(tiny_llama, text_files, tmp_path_factory):
    """Folder with a recipe, files that are none, and links to model and text."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "model").symlink_to(tiny_llama)
    (folder / "text.txt").write_bytes((text_files / "train.txt").read_bytes())
    (folder / "latin.txt").write_bytes(b"caf\xe9\n" * 500)
    (folder / "latin.yaml").write_bytes(b"rank: \xe9\n")
    (folder / "recipe.yaml").write_text("block_size: 64\nmax_steps: 1\nrank: 4\n")
    assert main(["quantize", str(tiny_llama), "--rank", "4", "--output", str(folder / "packed")]) == 0
    return folder


_DATA = ["train_file={}/text.txt", "validation_file={}/text.txt"]
COMMANDS = {
    "quantize": ["quantize", "{}/model", "--rank=4", "--output", "{}/out"],
    "calibrated": ["quantize", "{}/model", "--output", "{}/out"],
    "generate": ["generate", "{}/packed", "--prompt=The"],
    "chat": ["chat", "{}/packed"],
    "prompt": ["generate", "{}/packed"],
    "evaluate": ["evaluate", "{}/packed", "--data={}/text.txt", "--block-size=64"],
    "finetune": ["finetune", "{}/recipe.yaml", "model={}/model", *_DATA, "output={}/out"],
    "recipe": ["finetune"],
    "compare": ["compare", "{}/recipe.yaml", "model={}/model", *_DATA, "--methods=lowra", "--output", "{}/out"],
    "demo": ["demo", "--output", "{}/out", "--model={}/model", "--train={}/text.txt", "--validation={}/text.txt"],
    "adapter": ["adapter", "quantize", "{}/packed/initial_adapter", "--base={}/packed", "--output", "{}/out"],
    "inspect": ["inspect"],
    "label": ["adapter", "inspect"],
    "original": ["inspect", "{}/packed"],
}
_DEVICES = [
    "mps",
    "cuda:9",
    "cuda:-1",
    "meta",
    "",
    "gpu",
    "cpu:7",
    "cuda:" + "9" * 20,
    "xla",
    "hpu",
    "cuda:0:0",
    "\udcff",
]
_NO_NUMBERS = ["nan", "inf", "-1", "1e400", "", "0x10", "-inf"]
_NUMBERS = {
    "quantize": [
        "--bits",
        "--rank",
        "--alpha",
        "--loftq-steps",
        "--feedback",
        "--group-size",
        "--iterations",
        "--refine",
    ],
    "generate": ["--tokens", "--temperature", "--seed"],
    "chat": ["--tokens", "--temperature", "--seed"],
    "evaluate": ["--block-size", "--batch-size"],
    "demo": ["--steps", "--learning-rate", "--seed"],
    "compare": ["--bits", "--seeds"],
    "adapter": ["--bits", "--ratio", "--static-h"],
}
_NO_FILES = ["{}/latin.txt", "{}/none", "{}", "", "/dev/null", "~nobody-here/x"]
CASES = [
    *((name, f"--device={device}") for name in ("quantize", "generate", "evaluate") for device in _DEVICES),
    *((name, f"{o}={value}") for name, options in _NUMBERS.items() for o in options for value in _NO_NUMBERS),
    *(("calibrated", f"--calibrate={file}") for file in _NO_FILES),
    *(("calibrated", f"--calibrate={{}}/text.txt --calibration-tokens={count}") for count in (-1, 0, "nan")),
    *(("calibrated", f"--calibrate=self --reconstruct=1 --reconstruct-tokens={count}") for count in (-1, 0, 9, "nan")),
    *(("evaluate", f"--data={file}") for file in _NO_FILES),
    *(("adapter", f"--method=gptq --calibration={file}") for file in _NO_FILES),
    *(("prompt", f"--prompt={prompt}") for prompt in ("", "a" * 1000, "a" * 70, "\udcff", "caf\ud800")),
    *(("generate", f"--tokens={count}") for count in (126, 10**8, "9" * 24, 0)),
    *(("generate", f"--adapter={place}") for place in ("", "{}", "{}/text.txt", "{}/none")),
    *(("recipe", file) for file in ("{}/latin.yaml", "{}/none", "{}", "", "{}/text.txt", "~nobody-here/x")),
    *(("compare", f"--methods={methods}") for methods in ("", "lowra:", "lowra:x", ":", "lowra:rank=0", "lowra:=")),
    *(("compare", f"--bits={bits}") for bits in ("2,", "5", "two")),
    *(("inspect", folder) for folder in ("", "{}", "{}/none", "{}/text.txt", "{}/model")),
    *(("label", folder) for folder in ("", "{}", "{}/none", "{}/text.txt", "{}/packed/initial_adapter")),
    *(("original", f"--original={folder}") for folder in ("", "{}", "{}/none")),
    *(("quantize", f"--menu={menu}") for menu in ("", "a", "5", "1,,2", "-1", "nan")),
    *(("quantize", f"--budget=true --bits={bits}") for bits in ("nan", "inf", "-1")),
    *(
        ("finetune", override)
        for override in (
            "output=*best", "model=", "model={}", "train_file={}/latin.txt", "validation_file=/dev/null", "method=foo",
            "scheduler=foo", "scheduler=warmup_stable_decay", "scheduler=cosine_with_min_lr", "optimizer=foo",
            "optimizer=adamw_apex_fused", "optimizer=galore_adamw", "report_to=foo", "report_to=wandb", "rank=99999",
            "task=summarization", "task=poetry", "\udcff=1", "learning_rate=.nan", "seed=-1", "=", "bf16=1",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("command", "arguments"), CASES, ids=[f"{name} {given[:40]!a}" for name, given in CASES])
def test_one_sentence_and_nothing_written(place, capsys, command, arguments):
    words = arguments.split(" ") if arguments.startswith("--") else [arguments]
    words = [word.replace("{}", str(place)) for word in [*COMMANDS[command], *words]]
    if command == "finetune":  # which takes no key twice
        words = [word for word in words[:-1] if word.partition("=")[0] != words[-1].partition("=")[0]] + words[-1:]
    try:
        status = main(words)
    except SystemExit as left:  # of argparse, which also says how the command is used
        status = left.code
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    assert status == 2, said[-1:]
    assert said[-1].startswith("lowra: ") or ": error: " in said[-1]
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", _DEVICES)
def test_devices_that_are_not_there(name):
    if name == "cuda:9" and torch.cuda.device_count() > 9:
        pytest.skip("there are ten GPUs here")
    with pytest.raises(ValueError, match="is no device|There is no"):
        choose_device(name)


def test_devices_that_are_there():
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
