"""The parts of the vLLM plugin that need no vLLM: shares of packed weights, the check of adapters, the door.

The engine itself is started in tests/tools/test_vllm.py.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import lowra
from lowra import autoload
from lowra.integrations.vllm.adapters import check_adapter_for
from lowra.integrations.vllm.sharing import Share, packed_weight, rows_of_rank, take_share
from lowra.weights.cutting import join

WHOLES = (64, 32, 32)  # q, k and v of the tiny model


@pytest.fixture(scope="module")
def stored(packed_llama):
    """Tensors of the packed q, k and v of a layer, by name and leaf."""
    with safe_open(packed_llama / "model.safetensors", framework="pt") as file:
        names = [key for key in file.keys() if key.startswith("model.layers.0.self_attn.")]
        tensors = {name: file.get_tensor(name) for name in names}
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        found.setdefault(module.rpartition(".")[2], {})[leaf] = tensor
    return found


@pytest.fixture(scope="module")
def parts(stored):
    return {(i,): packed_weight(name, stored[name], 64, 64) for i, name in enumerate(("q_proj", "k_proj", "v_proj"))}


def share_of(rank, ranks, columns=range(64)):
    rows = tuple(rows_of_rank("qkv_proj", whole, whole // ranks, rank, ranks) for whole in WHOLES)
    return Share("qkv_proj", 64, WHOLES, rows, columns)


def dense_of(weights):
    return torch.cat([weight.dequantize() for weight in weights])


def test_whole_with_8_bit_scales_parts_stay_as_they_are(parts):
    assert take_share(parts, share_of(0, 1)) == list(parts.values())


@pytest.mark.parametrize("columns", [range(64), range(32), range(32, 64)])
def test_shares_of_ranks_are_one_weight_and_bit_for_bit_those_of_the_dense_one(parts, columns):
    for rank in (0, 1):
        (weight,) = take_share(parts, share_of(rank, 2, columns))
        halves = [part.dequantize().chunk(2)[rank] for part in parts.values()]
        assert torch.equal(weight.dequantize(), torch.cat(halves)[:, columns.start : columns.stop])
        bits = [int(b) for b in weight.row_bits[weight.matrix().row_order.long()]]
        assert bits == sorted(bits, reverse=True)


def test_outputs_that_the_checkpoint_has_merged(parts):
    """As Phi-3 has q, k and v in one weight: each rank takes rows of each."""
    whole = join(list(parts.values()))
    for rank in (0, 1):
        (weight,) = take_share({(0, 1, 2): whole}, share_of(rank, 2))
        assert torch.equal(weight.dequantize(), dense_of(take_share(parts, share_of(rank, 2))))


def test_more_ranks_than_pieces_share_them():
    """Four ranks with two heads of keys, as vLLM gives them out."""
    assert [rows_of_rank("k_proj", 32, 16, rank, 4).start for rank in range(4)] == [0, 0, 16, 16]
    assert [rows_of_rank("replicated", 32, 32, rank, 4).start for rank in range(4)] == [0] * 4


@pytest.mark.parametrize(("rows", "ranks"), [(24, 2), (16, 3), (64, 2)])
def test_outputs_that_cannot_be_cut_are_refused(rows, ranks):
    with pytest.raises(ValueError, match="k_proj has 32 rows .* serve with another tensor-parallel size"):
        rows_of_rank("k_proj", 32, rows, 0, ranks)


def test_what_does_not_fit_is_refused(parts, stored):
    with pytest.raises(ValueError, match=r"brought \[0, 2\] of them"):
        take_share({outputs: part for outputs, part in parts.items() if outputs != (1,)}, share_of(0, 1))
    with pytest.raises(ValueError, match="needs 32 rows, and the checkpoint has 64"):
        take_share({**parts, (1,): parts[(0,)]}, share_of(0, 1))
    with pytest.raises(ValueError, match="cut at column 4: .* another tensor-parallel size"):
        take_share(parts, share_of(0, 1, range(4, 64)))
    with pytest.raises(ValueError, match="lacks scale_steps of q_proj"):
        packed_weight("q_proj", {k: v for k, v in stored["q_proj"].items() if k != "scale_steps"}, 64, 64)
    with pytest.raises(ValueError, match="q_proj is dense in the checkpoint"):
        packed_weight("q_proj", {"weight": torch.zeros(64, 64)}, 64, 64)
    with pytest.raises(ValueError, match="no packed weight of 128 columns"):
        packed_weight("q_proj", stored["q_proj"], 128, 64)


def config_of(folder):
    return lowra.LowRAConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.fixture
def adapter(packed_llama, tmp_path):
    """A copy of the initial adapter."""
    return shutil.copytree(packed_llama / "initial_adapter", tmp_path / "adapter")


def test_adapters_of_this_packing_pass(packed_llama, adapter, caplog):
    check_adapter_for(adapter, config_of(packed_llama))
    assert not caplog.text
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed_llama), adapter)
    model.save_pretrained(adapter.parent / "saved")
    check_adapter_for(adapter.parent / "saved", config_of(packed_llama))


def test_adapters_of_another_packing_or_damaged_ones_are_refused(dense_llama, packed_llama, adapter, tmp_path, caplog):
    other = tmp_path / "other"
    options = lowra.LowRAConfig(bits=1.5, refine=2), lowra.AdapterRecipe(rank=4)
    lowra.quantize_checkpoint(str(dense_llama), other, *options, progress=False)
    with pytest.raises(ValueError, match=r"another packing .*refine=0 vs 2.* Serve its own base\.$"):
        check_adapter_for(adapter, config_of(other))
    (adapter / "lowra_base.json").unlink()  # its weights repeat it
    with pytest.raises(ValueError, match="another packing"):
        check_adapter_for(adapter, config_of(other))
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    with safe_open(foreign / "adapter_model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, foreign / "adapter_model.safetensors")
    check_adapter_for(foreign, config_of(packed_llama))
    assert "nothing tells whether it was trained on this packing" in caplog.text
    mixed = shutil.copytree(packed_llama / "initial_adapter", tmp_path / "mixed")
    shutil.copy(other / "initial_adapter" / "adapter_model.safetensors", mixed)
    with pytest.raises(ValueError, match="has other bytes than were saved"):
        check_adapter_for(mixed, config_of(packed_llama))


def test_adapters_with_tables_of_their_own_are_refused(packed_llama, adapter):
    (adapter / "tables.safetensors").touch()
    with pytest.raises(ValueError, match="levels and scales of its own .* `lowra merge`.* tables=frozen has none"):
        check_adapter_for(adapter, config_of(packed_llama))


def test_the_door_registers_without_importing_lowra_or_raising(monkeypatch):
    registered = {}
    module = types.ModuleType("vllm.model_executor.layers.quantization")
    module.QuantizationConfig = type("QuantizationConfig", (), {})
    module.register_quantization_config = lambda name: lambda kind: registered.setdefault(name, kind)
    for above in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, above, types.ModuleType(above))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "lowra.integrations.vllm.config", raising=False)
    monkeypatch.setattr(autoload, "_state", "")
    autoload.register_with_vllm()
    assert issubclass(registered["lowra"], module.QuantizationConfig) and autoload.state() == ""
    sys.modules["vllm"].__version__ = "0.99.0"  # without the modules that the plugin rests on
    with pytest.raises(ValueError, match=r"served with vLLM 0.32, and this is 0.99.0, .* install vllm==0.32"):
        registered["lowra"].from_config({})
    del module.register_quantization_config
    autoload.register_with_vllm()
    assert autoload.state().startswith("failed: vLLM's door: AttributeError")


def test_the_wheel_declares_the_door():
    text = (pathlib.Path(lowra.__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nlowra = "lowra_autoload:register_with_vllm"' in text


def test_nothing_of_vllm_is_imported_with_lowra():
    code = "import sys, lowra; assert not {n for n in sys.modules if n.startswith(('vllm', 'lowra.integrations.vllm'))}"
    subprocess.run([sys.executable, "-c", code], check=True)
