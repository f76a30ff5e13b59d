"""Other people's trainers on a packed folder: axolotl, LLaMA-Factory and Unsloth. None knows lowra.

Each pins other versions of Transformers and PEFT, so they run in environments of their own (docs/guide/trainers.md);
where one is not installed, its test is skipped.
"""

import importlib.metadata
import json
import subprocess
import sys

import peft
import pytest
import yaml
from other_processes import environment
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow
STEPS = 4

# As Unsloth's notebooks have it. The packed folder, the one to write to, and steps.
UNSLOTH = """
import sys
from unsloth import FastLanguageModel  # first, since it replaces code of the others
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
packed, output, steps = sys.argv[1:]
model, tokenizer = FastLanguageModel.from_pretrained(packed, load_in_4bit=False, dtype=torch.float32)
layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=4, target_modules=layers)
rows = Dataset.from_dict({"text": ["The city lies on a river."] * 16})
settings = SFTConfig(
    output_dir=output, max_steps=int(steps), per_device_train_batch_size=2, max_length=64, learning_rate=1e-3,
    bf16=False, report_to="none",
)
SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=settings).train()
model.save_pretrained(output)
"""


@pytest.fixture
def rows(tmp_path):
    """A file of instructions and answers."""
    folder = tmp_path / "data"
    folder.mkdir()
    answer = {"instruction": "Say where it lies.", "input": "", "output": "The city lies on a river."}
    (folder / "mine.json").write_text(json.dumps([answer] * 32))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    return folder / "mine.json"


def installed(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed here")


def trained(module, settings, folder, *options):
    """What a program says that trains by these settings."""
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return run(["-m", module, "train", "settings.yaml", *options], folder)


def run(arguments, folder):
    """What Python says with these arguments."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    surroundings = environment(AXOLOTL_DO_NOT_TRACK="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=500, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


def assert_belongs_to(packed, adapter, said):
    """The adapter went on from the packed base's start, and loads with its record."""
    assert f"begins from {packed / 'initial_adapter'} (loftq, rank 4)" in said
    assert json.loads((adapter / "lowra_base.json").read_text())["init"] == "loftq"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    ids = AutoTokenizer.from_pretrained(packed)("A city", return_tensors="pt").input_ids
    tuned = model(ids).logits
    model.load_adapter(str(packed / "initial_adapter"), "start")
    model.set_adapter("start")
    assert not model(ids).logits.equal(tuned)


def test_axolotl(packed_with_tokenizer, rows, tmp_path):
    installed("axolotl")
    _, packed = packed_with_tokenizer
    settings = {
        "base_model": str(packed), "adapter": "lora", "lora_r": 4, "lora_alpha": 4, "lora_target_linear": True,
        "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
        "datasets": [{"path": str(rows), "type": "alpaca"}], "sequence_len": 512, "micro_batch_size": 2,
        "gradient_accumulation_steps": 1, "max_steps": STEPS, "num_epochs": 1, "learning_rate": 1e-3, "bf16": False,
        "optimizer": "adamw_torch", "lr_scheduler": "constant", "val_set_size": 0, "output_dir": "out",
    }  # fmt: skip
    said = trained("axolotl.cli.main", settings, tmp_path, "--launcher", "python")
    assert_belongs_to(packed, tmp_path / "out", said)


def test_llama_factory(packed_with_tokenizer, rows, tmp_path):
    installed("llamafactory")
    _, packed = packed_with_tokenizer
    settings = {
        "model_name_or_path": str(packed), "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4,
        "lora_alpha": 4, "lora_target": "all", "dataset": "mine", "dataset_dir": str(rows.parent), "cutoff_len": 128,
        "template": "default", "output_dir": "out", "max_steps": STEPS, "per_device_train_batch_size": 2,
        "learning_rate": 1e-3, "report_to": "none",
    }  # fmt: skip
    assert_belongs_to(packed, tmp_path / "out", trained("llamafactory.cli", settings, tmp_path))


def test_unsloth(packed_with_tokenizer, tmp_path):
    """On a processor. Its layers for GPUs read dense weights (docs/guide/unsloth.md)."""
    installed("unsloth")
    _, packed = packed_with_tokenizer
    assert_belongs_to(packed, tmp_path / "out", run(["-c", UNSLOTH, packed, tmp_path / "out", STEPS], tmp_path))
