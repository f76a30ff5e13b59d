"""Weights under `variant=`, in shards, in subfolders of the hub: whoever saves them has digests, whoever loads asks."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import logits_of
from transformers import AutoModelForCausalLM

from lowra.checkpoints.companions import companions
from lowra.commands import main
from lowra.integrations import integrity

LAYER = "model.layers.1.mlp.down_proj"
DENSE, PACKED = "model.norm.weight", f"{LAYER}.levels"
SHARDED = {"max_shard_size": "30KB"}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def flip(folder, name, variant):
    """Changes a bit of a tensor in whichever file of a variant has it."""
    ending = f"*.{variant}*.safetensors" if variant else "model*.safetensors"
    for path in folder.glob(ending):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1).view(torch.uint8)[0] ^= 1
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(f"{folder} has no {name} in {ending}")


@pytest.fixture(scope="module")
def model(packed_llama):
    return load(packed_llama)


@pytest.mark.parametrize("options", [{}, SHARDED], ids=["whole", "sharded"])
@pytest.mark.parametrize("variant", ["fp16", "my-run.v2"])
def test_every_tensor_of_a_variant_has_a_digest(model, tmp_path, caplog, capsys, variant, options):
    model.save_pretrained(tmp_path, variant=variant, **options)
    with caplog.at_level(logging.WARNING, logger="lowra"):
        again = load(tmp_path, variant=variant)
    assert not [record for record in caplog.records if "digests" in record.getMessage()]
    assert torch.equal(logits_of(again), logits_of(model))
    assert main(["verify", str(tmp_path)]) == 0
    for name in (DENSE, PACKED):
        flip(tmp_path, name, variant)
        with pytest.raises(ValueError, match=name):
            load(tmp_path, variant=variant)
        assert main(["verify", str(tmp_path)]) == 2
        assert name in capsys.readouterr().err
        flip(tmp_path, name, variant)


def test_a_variant_beside_the_usual_weights_leaves_those_alone(packed_llama, model, tmp_path, capsys):
    folder = shutil.copytree(packed_llama, tmp_path / "both")
    usual = (folder / "lowra_digests.json").read_bytes()
    model.save_pretrained(folder, variant="fp16")
    assert (folder / "lowra_digests.json").read_bytes() == usual
    assert torch.equal(logits_of(load(folder)), logits_of(load(folder, variant="fp16")))
    assert main(["verify", str(folder)]) == 0
    flip(folder, DENSE, "fp16")
    load(folder)  # whole as ever
    assert main(["verify", str(folder)]) == 2 and DENSE in capsys.readouterr().err
    # neither the digests nor the index of a variant belong to what is made of this checkpoint
    assert not [path for path in companions(folder) if "fp16" in path.name]


def test_a_folder_of_a_variant_alone_says_so(model, tmp_path, capsys):
    model.save_pretrained(tmp_path, variant="fp16")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "variant='fp16'" in capsys.readouterr().err


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("first", [{}, SHARDED], ids=["whole first", "shards first"])
def test_what_was_saved_last_is_what_is_loaded(packed_llama, tmp_path, variant, first):
    """Transformers leaves the single file of an earlier save beside new shards, and loads that."""
    model = load(packed_llama)
    model.save_pretrained(tmp_path, variant=variant, **first)
    with torch.no_grad():
        model.get_submodule(LAYER).levels *= 1.5
        model.model.norm.weight += 0.25
    model.save_pretrained(tmp_path, variant=variant, **({} if first else SHARDED))
    assert torch.equal(logits_of(load(tmp_path, variant=variant)), logits_of(model))
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize(("subfolder", "variant"), [("", None), ("packed/two", None), ("packed", "fp16")])
def test_digests_of_the_hub_are_sought_where_the_weights_are(model, tmp_path, caplog, monkeypatch, subfolder, variant):
    repository = tmp_path / "models--someone--something"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit / subfolder
    model.save_pretrained(folder, variant=variant)
    digests = folder / ("lowra_digests.json" if variant is None else f"lowra_digests.{variant}.json")
    hub = digests.rename(tmp_path / "downloaded.json")

    def download(name, file_name, **options):
        where = {key: options.get(key) for key in ("cache_dir", "local_files_only", "subfolder")}
        assert (name, file_name) == ("someone/something", digests.name)
        assert where == {"cache_dir": tmp_path, "local_files_only": True, "subfolder": subfolder}
        return str(hub)

    monkeypatch.setattr(integrity, "cached_file", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {"cache_dir": tmp_path, "local_files_only": True, "subfolder": subfolder, "variant": variant}
    with caplog.at_level(logging.WARNING, logger="lowra"):
        load("someone/something", **options)
    assert not [record for record in caplog.records if "digests" in record.getMessage()]
    flip(folder, DENSE, variant)
    with pytest.raises(ValueError, match=DENSE):
        load("someone/something", **options)
