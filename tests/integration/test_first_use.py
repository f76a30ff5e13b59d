"""Large checkpoints on a CPU are read through before they are first used, whichever way that is, not while loading."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import inputs_of, logits_of
from transformers import AutoModelForCausalLM

import lowra
from lowra.checkpoints.integrity import DIGESTS_FILE, known_tensors
from lowra.commands import main
from lowra.integrations import integrity

CODES, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def packed(dense_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "packed"
    lowra.quantize_checkpoint(str(dense_llama), folder, lowra.LowRAConfig(bits=1.75), progress=False)
    return folder


@pytest.fixture
def load(packed, tmp_path, monkeypatch):
    """Loads it as if it were large, with a bit of a tensor flipped."""
    monkeypatch.setattr(integrity, "_READ_AT_ONCE", 0)

    def loaded(damaged=None, file="model.safetensors"):
        if damaged is None:
            return AutoModelForCausalLM.from_pretrained(packed).eval()
        folder = tmp_path / "damaged"
        folder.mkdir()
        for path in packed.iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / file)
        tensors[damaged].view(-1).view(torch.uint8)[5] ^= 4
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    return loaded


USES = {
    "forward": logits_of,
    "one layer": lambda model: model.model.layers[0].mlp.up_proj(torch.ones(1, 64)),
    "generate": lambda model: model.generate(**inputs_of(model), max_new_tokens=2, do_sample=False),
    "state dict": lambda model: model.state_dict(),
    "dense": lambda model: model.dequantize(),
    "copy": copy.deepcopy,
    "pickle": pickle.dumps,
    "moved first": lambda model: logits_of(model.to(torch.bfloat16)),
    "compiled": lambda model: torch.compile(model.model.layers[0].mlp.up_proj, backend="eager")(torch.ones(1, 64)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("damaged", [CODES, NORM])
def test_damage_is_found_before_any_number_comes_of_it(load, use, damaged):
    model = load(damaged)
    for _ in range(2):
        with pytest.raises(Exception, match=f"has other bytes than were written in 1 tensor.*{damaged}"):
            USES[use](model)


@pytest.mark.parametrize("use", USES)
def test_what_is_whole_is_read_once(load, use, monkeypatch):
    model, read = load(), []

    def known(*args):
        read.append(args)
        return known_tensors(*args)

    monkeypatch.setattr(integrity, "known_tensors", known)
    USES[use](model)
    logits_of(model)
    assert len(read) == 1


@pytest.mark.parametrize("later", ["gone", "another", "elsewhere"])
def test_what_is_read_is_what_was_loaded_wherever_its_folder_is_by_then(load, packed, tmp_path, monkeypatch, later):
    expected = logits_of(load())
    shutil.copytree(packed, tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("own").eval()
    if later == "gone":
        shutil.rmtree("own")
    elif later == "another":
        (tmp_path / "other").write_bytes(b"of another packing")
        (tmp_path / "other").replace(tmp_path / "own" / "model.safetensors")
    else:
        monkeypatch.chdir("/")
    assert torch.equal(logits_of(model), expected)


def test_damage_is_found_though_the_file_is_mended_after_the_load(load, packed, tmp_path):
    model = load(CODES)
    shutil.copy(packed / "model.safetensors", tmp_path / "whole")
    (tmp_path / "whole").replace(tmp_path / "damaged" / "model.safetensors")
    with pytest.raises(ValueError, match=CODES):
        logits_of(model)


def test_a_saved_copy_is_not_made_of_damage(load, tmp_path):
    with pytest.raises(ValueError, match=CODES):
        load(CODES).save_pretrained(tmp_path / "copy")


def test_digests_of_files_that_were_written_anew_do_not_matter(load, packed, tmp_path):
    """Another program's order of the same tensors has other files, and is looked through tensor by tensor."""
    expected = logits_of(load())
    other = tmp_path / "other"
    other.mkdir()
    for path in packed.iterdir():
        if path.is_file():
            (other / path.name).write_bytes(path.read_bytes())
    save_file(load_file(other / "model.safetensors"), other / "model.safetensors")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(other).eval()), expected)
    assert main(["verify", str(other)]) == 0


@pytest.mark.parametrize("field", ["packing", "files", "tensors"])
def test_digests_of_another_checkpoint_are_refused_or_do_no_harm(load, dense_llama, tmp_path, field):
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "other", lowra.LowRAConfig(bits=1.5), progress=False)
    lowra.quantize_checkpoint(str(dense_llama), tmp_path / "own", lowra.LowRAConfig(bits=1.75), progress=False)
    own, other = (json.loads((tmp_path / name / DIGESTS_FILE).read_text()) for name in ("own", "other"))
    (tmp_path / "own" / DIGESTS_FILE).write_text(json.dumps({**own, field: other[field]}))
    expected = logits_of(load())
    try:
        found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "own").eval())
    except ValueError as error:
        assert "mixed" in str(error) or "other bytes" in str(error)
    else:
        assert torch.equal(found, expected)
    assert main(["verify", str(tmp_path / "own")]) == (0 if field == "files" else 2)
