"""A library of packed adapters: mixed batches, a small cache, and adapters that do not touch one another."""

import pytest
import torch
from adapter_models import make_base
from peft import LoraConfig, get_peft_model
from test_adapter_labels import edit_label
from test_adapter_storage import store

from lowra import fast_decoding
from lowra.adapters import AdapterLibrary, LabelError, LoraQuantSettings, load_packed, quantize_loraquant, read_adapter
from lowra.adapters.joint import quantize_joint
from lowra.adapters.labels import make_label
from lowra.adapters.storage import read_packed, write_packed, write_shared
from lowra.checkpoints.atomic import written_beside

NAMES = ("law", "news", "code")


@pytest.fixture(scope="module")
def packed_folders(adapter_folders, tmp_path_factory):
    above, base = tmp_path_factory.mktemp("packed"), make_base()
    for name, folder in zip(NAMES, adapter_folders, strict=True):
        store(quantize_loraquant(read_adapter(folder), LoraQuantSettings(refine=False)), base, above / name)
    return above


@pytest.fixture()
def library(packed_folders, base):
    library = AdapterLibrary(base, cache_size=2)
    for name in NAMES:
        library.add(name, packed_folders / name)
    return library


@pytest.fixture(scope="module")
def alone(packed_folders):
    """Logits of each adapter loaded by itself, as a function of tokens."""
    models = {name: load_packed(make_base(), packed_folders / name).eval() for name in NAMES}
    models["__base__"] = make_base()
    return lambda name, tokens: models[name](tokens).logits


def test_mixed_batch_gives_each_row_its_adapter(library, alone, tokens):
    names = ["law", "code", "__base__", "law"]
    library.prepare(names)
    logits = library.model(tokens, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = alone(name, tokens[row : row + 1])
        assert torch.allclose(logits[row : row + 1], expected, atol=1e-5), name


def test_generation_takes_names_too(library, alone, tokens):
    names = ["law", "news", "law", "__base__"]
    library.prepare(names)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    found = library.model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), adapter_names=names, **options
    )
    last = alone("news", found[1:2, :-1])[0, -1]
    assert found[1, -1] == last.argmax()


def test_a_model_is_prepared_for_inference_whatever_of_it_was_in_training(library):
    library.prepare(["law"])
    next(module for module in library.model.modules() if not list(module.children())).train()
    library.prepare(["law"])
    assert not any(module.training for module in library.model.modules())


def test_switching_uses_the_weights_of_the_chosen_adapter(library, alone, tokens):
    for name in ("law", "news", "law", "code", "news"):
        library.switch(name)
        assert torch.equal(library.model(tokens).logits, alone(name, tokens)), name


def test_cache_keeps_the_most_recent(library):
    library.prepare(["law"])
    library.prepare(["news"])
    library.prepare(["law"])
    library.prepare(["code"])
    assert library.decoded == ["law", "code"]
    assert set(library.model.peft_config) == {"law", "code"}


def test_active_adapter_stays_in_the_cache(library, alone, tokens):
    library.switch("law")
    library.prepare(["news"])
    library.prepare(["code"])
    assert set(library.decoded) == {"law", "code"}
    assert torch.equal(library.model(tokens).logits, alone("law", tokens))


def test_a_batch_without_names_goes_through_the_base_until_a_switch_and_after_the_last(library, alone, tokens):
    library.prepare(["law", "news"])
    assert torch.equal(library.model(tokens).logits, alone("__base__", tokens))
    library.switch("law")
    assert torch.equal(library.model(tokens).logits, alone("law", tokens))
    library.prepare(["code"])
    library.remove("law")
    assert torch.equal(library.model(tokens).logits, alone("__base__", tokens))
    names = ["code"] * len(tokens)
    assert torch.allclose(library.model(tokens, adapter_names=names).logits, alone("code", tokens), atol=1e-5)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    for custom in ({}, {"custom_generate": fast_decoding}):
        found = library.model.generate(input_ids=tokens, **options, **custom)
        assert torch.equal(found[:, -1], alone("__base__", found[:, :-1])[:, -1].argmax(-1))


def test_a_switch_that_is_refused_changes_nothing(library, alone, tokens, monkeypatch):
    library.switch("law")
    monkeypatch.setattr("lowra.adapters.library.attach", lambda *_: (_ for _ in ()).throw(ValueError("no fit")))
    with pytest.raises(ValueError, match="no fit"):
        library.switch("news")
    monkeypatch.undo()
    library.prepare(["code"])
    library.prepare(["news"])
    assert torch.equal(library.model(tokens).logits, alone("law", tokens))


def test_others_are_untouched_when_one_goes(library, tokens):
    library.prepare(["law", "news"])
    names = ["law"] * 4
    before = library.model(tokens, adapter_names=names).logits
    weights = {n: p.data_ptr() for n, p in library.model.named_parameters() if ".law." in n}
    library.remove("news")
    library.prepare(["code"])
    assert torch.equal(library.model(tokens, adapter_names=names).logits, before)
    assert weights == {n: p.data_ptr() for n, p in library.model.named_parameters() if ".law." in n}
    assert "news" not in library and len(library) == 2


def test_a_batch_for_the_base_alone_may_be_the_first_and_the_last(library, alone, tokens):
    names = ["__base__"] * len(tokens)
    for _ in range(2):
        library.prepare(names)
        assert torch.allclose(library.model(tokens, adapter_names=names).logits, alone("__base__", tokens), atol=1e-5)
        library.remove(library.decoded[0])
        assert torch.equal(library.model(tokens).logits, alone("__base__", tokens))
    for name in library.names:
        library.remove(name)
    with pytest.raises(ValueError, match="has no adapters, so its model takes no names"):
        library.prepare(names)


def test_library_can_be_emptied_and_filled_again(library, packed_folders, alone, tokens):
    library.switch("law")
    for name in NAMES:
        library.remove(name)
    library.add("law", packed_folders / "law")
    library.switch("law")
    assert torch.equal(library.model(tokens).logits, alone("law", tokens))


def test_memory_report_counts_bits_and_decoded_copies(library):
    memory = library.memory()
    assert memory["adapters"] == 3 and memory["decoded_bytes"] == 0
    assert memory["packed_bytes"] == sum(library._packed[name].tensor_bytes for name in NAMES)
    assert memory["average_bits"] == 16 * memory["packed_bytes"] / memory["float16_bytes"]
    library.prepare(["law"])
    memory = library.memory()
    assert memory["decoded_adapters"] == 1
    assert memory["decoded_bytes"] == 4 * library._packed["law"].parameters  # float32


def test_joint_adapters_share_one_basis_in_memory(adapter_folders, base, tokens, tmp_path):
    joint = quantize_joint([read_adapter(folder) for folder in adapter_folders])
    with written_beside(tmp_path / "joint") as folder:
        write_shared(folder, joint[0].shared)
        for name, packed in zip(NAMES, joint, strict=True):
            packed.label = make_label(packed, base=base)
            (folder / name).mkdir()
            write_packed(folder / name, packed)
    for name, packed in zip(NAMES, joint, strict=True):
        loaded, simulated = read_packed(tmp_path / "joint" / name).dequantize(), packed.dequantize()
        assert loaded.keys() == simulated.keys()
        assert all(torch.equal(tensor, simulated[key]) for key, tensor in loaded.items())
    library = AdapterLibrary(base, cache_size=3)
    for name in NAMES:
        library.add(name, tmp_path / "joint" / name)
    assert library.memory()["shared_bytes"] == sum(t.numel() * 2 for t in joint[0].shared.tensors.values())
    library.prepare(NAMES)
    library.model(tokens[:3], adapter_names=list(NAMES))
    for name in NAMES:
        library.remove(name)
    assert library.memory()["shared_bytes"] == 0
    (tmp_path / "joint" / "shared_basis.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="shared_basis"):
        library.add("law", tmp_path / "joint" / "law")


def test_refusals_name_the_remedy(library, packed_folders, base, tmp_path):
    with pytest.raises(ValueError, match="cache_size"):
        library.prepare(NAMES)
    with pytest.raises(ValueError, match="no adapter 'art'"):
        library.prepare(["art"])
    with pytest.raises(ValueError, match="already has"):
        library.add("law", packed_folders / "law")
    for name in ("", "a.b", "__base__"):
        with pytest.raises(ValueError, match="cannot be used"):
            library.add(name, packed_folders / "law")
    with pytest.raises(ValueError, match="at least 1"):
        AdapterLibrary(make_base(), cache_size=0)
    with pytest.raises(ValueError, match="PeftModel"):
        AdapterLibrary(get_peft_model(make_base(), LoraConfig(target_modules="all-linear")))
    taken = make_base()
    model = get_peft_model(taken, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="on which a PeftModel is already"):
        AdapterLibrary(taken)
    AdapterLibrary(model.unload())


def test_labels_are_checked_when_an_adapter_is_added(adapter_folder, tmp_path):
    base = make_base()
    packed = quantize_loraquant(read_adapter(adapter_folder), LoraQuantSettings(refine=False))
    folder = store(packed, base, tmp_path / "packed")
    other = AdapterLibrary(make_base(seed=1))
    with pytest.raises(LabelError, match="another base"):
        other.add("law", folder)
    assert len(other) == 0
    with pytest.warns(UserWarning, match="another base"):
        other.add("law", folder, force=True)
    edit_label(folder, retire="2020-01-01")
    with pytest.raises(LabelError, match="retired"):
        AdapterLibrary(base).add("law", folder)


def test_adapter_of_other_shapes_is_refused_by_name(adapter_folder, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    packed = quantize_loraquant(read_adapter(adapter_folder), LoraQuantSettings(refine=False))
    folder = store(packed, None, tmp_path / "packed")
    config = dict(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    for layers in (2, 1):
        model = LlamaForCausalLM(LlamaConfig(**(config | {"num_hidden_layers": layers})))
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="does not fit the model"):
            load_packed(model, folder, force=True)
