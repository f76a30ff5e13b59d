"""The real commands of other tools on a packed folder: none of them knows lowra, and none is told of it."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import pytest
import torch
from datasets import Dataset
from other_processes import environment
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

pytestmark = pytest.mark.slow

BIN = pathlib.Path(sys.executable).parent
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture
def rows(tmp_path):
    """Folder with a train.jsonl of texts."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [json.dumps({"text": f"A city number {i} on a river."}) for i in range(16)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(command, folder):
    if not (BIN / command[0]).exists():
        pytest.skip(f"{command[0]} is not installed here")
    command = [str(BIN / command[0]), *map(str, command[1:])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_trl_sft_trains_on_a_packed_folder(packed_with_tokenizer, rows, tmp_path):
    _, packed = packed_with_tokenizer
    options = "--use_peft --lora_r 4 --lora_alpha 4 --lora_target_modules all-linear --max_steps 2 --use_cpu "
    options += "--per_device_train_batch_size 2 --bf16 false --report_to none --max_length 64"
    command = ["trl", "sft", "--model_name_or_path", packed, "--dataset_name", rows, "--output_dir", tmp_path / "out"]
    said = run([*command, *options.split()], tmp_path)
    assert "'train_loss'" in said and f"begins from {packed / 'initial_adapter'} (loftq, rank 4)" in said
    assert json.loads((tmp_path / "out" / "lowra_base.json").read_text())["init"] == "loftq"


def test_lm_eval_measures_a_packed_folder_with_its_adapter(packed_with_tokenizer, rows, tmp_path):
    """Byte perplexity as the harness counts it: of base and adapter, and far from that of the base alone."""
    _, packed = packed_with_tokenizer
    task = {
        "task": "river",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(rows / "train.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "validation_split": "validation",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    (tmp_path / "river.yaml").write_text(json.dumps(task))  # JSON is YAML
    arguments = f"pretrained={packed},peft={packed / 'initial_adapter'}"
    command = ["lm_eval", "run", "--model", "hf", "--model_args", arguments, "--tasks", "river"]
    options = ["--include_path", tmp_path, "--device", "cpu", "--batch_size", "4", "--output_path", tmp_path / "out"]
    said = run([*command, *options], tmp_path)
    assert "byte_perplexity" in said and "without it the outputs are far off" not in said
    (found,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["river"]["byte_perplexity,none"] > 1


def test_transformers_serve_answers_for_a_packed_folder(packed_with_tokenizer, tmp_path):
    if not is_serve_available():
        pytest.skip("transformers[serving] is not installed here")
    packed = shutil.copytree(packed_with_tokenizer[1], tmp_path / "packed")
    (packed / "chat_template.jinja").write_text(TEMPLATE)
    body = {"model": str(packed), "messages": [{"role": "user", "content": "A city"}], "max_tokens": 4}
    command = [BIN / "transformers", "serve", packed, "--device", "cpu", "--port"]
    answer, said = answer_of_server(command, "v1/chat/completions", body, tmp_path)
    assert answer["usage"]["completion_tokens"] == 4, said
    assert "packed together with an initial adapter" in said  # the base alone is served


def test_text_generation_webui_answers_with_an_adapter_as_transformers_does(packed_with_tokenizer, tmp_path):
    """Without its pages, whose Gradio is on no index. TEXTGEN names its sources, and no package has them."""
    server = pathlib.Path(os.environ.get("TEXTGEN", "")) / "server.py"
    if not server.is_file():
        pytest.skip("TEXTGEN names no folder with text-generation-webui's server.py")
    packed = shutil.copytree(packed_with_tokenizer[1], tmp_path / "models" / "packed")
    shutil.copytree(packed / "initial_adapter", tmp_path / "loras" / "start")
    command = [sys.executable, server, "--nowebui", "--api", "--cpu", "--model-dir", tmp_path / "models"]
    command += ["--model", "packed", "--lora-dir", tmp_path / "loras", "--lora", "start", "--api-port"]
    body = {"prompt": "A city", "max_tokens": 8, "temperature": 0, "do_sample": False, "add_bos_token": False}
    answer, _ = answer_of_server(command, "v1/completions", body, server.parent)
    model = AutoPeftModelForCausalLM.from_pretrained(packed / "initial_adapter", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    ids = tokenizer("A city", return_tensors="pt").input_ids
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def answer_of_server(command, place, body, folder):
    """What a server answers that is told its port last, and what it said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        surroundings = environment(PYTHONUNBUFFERED="1")
        command = [*map(str, command), str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=surroundings, cwd=folder)
        try:
            answer = ask(f"http://localhost:{port}/{place}", body, server)
        finally:
            server.kill()
            server.wait()
            log.seek(0)
            said = log.read()
            print(said)
    return answer, said


def ask(url, body, server):
    """Posts once the server listens."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(120):
        assert server.poll() is None, "the server stopped"
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError("the server did not start")


def test_sft_trainer_by_the_name_of_a_packed_folder_begins_from_its_start(packed_with_tokenizer, tmp_path, caplog):
    trl = pytest.importorskip("trl")
    options = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "max_length": 64}
    trainer = trl.SFTTrainer(
        str(packed_with_tokenizer[1]),
        args=trl.SFTConfig(str(tmp_path), per_device_train_batch_size=2, **options),
        train_dataset=Dataset.from_dict({"text": ["A city on a river."] * 4}),
        peft_config=LoraConfig(r=4),
    )
    assert "adapter 'default' begins from" in caplog.text
    trainer.train()
    assert "far off" not in caplog.text
