"""`lowra env`, and the warning that names it."""

import json
import logging
import pathlib
import types

import pytest
import torch

from bitsandbytes.backends.lowra import libraries, native, native_cpu, reference
from lowra.commands import main
from lowra.inspection import environment
from lowra.integrations.patching import Patch


def told(capsys):
    assert main(["env", "--json"]) == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    return "\n".join(lines), json.loads(last)


def test_env_says_what_runs_here(capsys):
    text, found = told(capsys)
    assert found["versions"]["torch"] == torch.__version__
    cpu = found["kernels"]["cpu"]
    assert cpu["tried"] == "works"
    assert found["libraries"]["cpu"]["loaded"] == native.cpu_available()
    if native.cpu_available():
        assert cpu["in_use"] in ("avx512vnni", "avx512", "avxvnni", "avx2", "neondot", "neon", "generic")
        assert f"{cpu['in_use']}, tried: works" in text
    if torch.version.cuda is None:
        assert "without CUDA" in found["libraries"]["cuda"]["why_not"]
    assert found["switched_off"] == []
    assert found["autoload"].startswith(("on:", "not installed:"))


@pytest.mark.skipif(not native.cpu_available(), reason="the CPU library was not built")
def test_env_says_why_kernels_are_not_in_use(monkeypatch, capsys):
    monkeypatch.setenv("LOWRA_CPU", "generic")
    try:
        _, found = told(capsys)
    finally:
        native_cpu.choose_instructions(None)
    assert found["kernels"]["cpu"]["in_use"] == "generic"
    assert found["settings"]["LOWRA_CPU"] == "generic"
    monkeypatch.setattr(environment.native_cpu, "instructions", lambda: ["generic"])
    monkeypatch.setattr(environment, "_processor_flags", lambda: {"avx2", "f16c", "fma"})
    monkeypatch.delenv("LOWRA_CPU")
    _, found = told(capsys)
    assert "no avx512f" in found["kernels"]["cpu"]["not_in_use"]["avx512"]


def test_env_says_what_a_guard_switched_off(monkeypatch, capsys):
    gone = Patch(target="peft.peft_model:PeftModel.no_longer", why="Adapters.", door="none", since="none")
    monkeypatch.setattr(environment, "TABLE", (gone,))
    text, found = told(capsys)
    assert "no_longer (it is gone)" in found["switched_off"][0] and "no_longer" in text


def test_a_kernel_that_decodes_wrongly_is_told(monkeypatch):
    decode = reference.dequantize
    monkeypatch.setattr(native_cpu, "dequantize", lambda packed, dtype: -decode(packed, dtype))
    monkeypatch.setattr(reference, "dequantize", lambda packed, dtype: -decode(packed, dtype))
    assert environment._try(torch.device("cpu")).startswith("gives wrong values")


def test_a_library_that_serves_nothing_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "left_aside", {})
    assert libraries.load(tmp_path / "libmissing.so", "cpu") is None
    assert libraries.left_aside["cpu"] == "libmissing.so was not built"
    damaged = tmp_path / "libdamaged.so"
    damaged.write_bytes(b"no library")
    assert libraries.load(damaged, "cpu") is None
    assert "cannot be loaded" in libraries.left_aside["cpu"]


def test_the_cuda_library_is_of_the_line_that_pytorch_and_the_driver_serve():
    def not_asked():
        raise AssertionError("the driver was asked for nothing")

    assert libraries.cuda_line(13, [12, 13], not_asked) == 13
    assert libraries.cuda_line(12, [12, 13], not_asked) == 12
    assert libraries.cuda_line(12, [], not_asked) == 12
    assert libraries.cuda_line(13, [12], lambda: 13) == 12  # drivers serve older lines
    assert libraries.cuda_line(12, [13], lambda: 13) == 13
    assert libraries.cuda_line(12, [13], lambda: 12) == 12  # which is not there: left aside, with the reason
    assert libraries._driver_line() >= 0  # nothing of PyTorch tells, in no version


def test_env_says_for_which_card_the_code_was_compiled():
    hopper = environment._cuda_kernels(90, True, [9, 0])
    assert hopper == {"in_use": "native, code for compute capability 9.0", "not_in_use": {}}
    turing = environment._cuda_kernels(75, False, [7, 5])
    assert turing["in_use"].endswith("7.5")
    assert "use float16" in turing["not_in_use"]["tensor, for bfloat16"]
    assert "Hopper" in turing["not_in_use"]["wgmma, many"]
    volta = environment._cuda_kernels(0, False, [7, 0])
    assert volta["in_use"] == "PyTorch reference" and "no code for this GPU" in volta["not_in_use"]["native"]


def test_a_gpu_without_code_takes_the_reference_and_is_told(monkeypatch):
    monkeypatch.setattr(libraries, "left_aside", {})
    library = types.SimpleNamespace(
        lowra_cuda_error=lambda: b"no kernel image is available for execution on the device"
    )
    monkeypatch.setattr(native, "_cuda", library)
    assert native.covered(0) and native.covered(4) and not native.covered(5)
    assert libraries.left_aside == {}
    assert not native.covered(10)
    assert "no code for this GPU (no kernel image" in libraries.left_aside["cuda"]


def test_the_reference_warns_once_off_the_cpu(monkeypatch, caplog):
    native._warn_of_reference.cache_clear()
    monkeypatch.setattr(libraries, "left_aside", {"cuda": "libbitsandbytes_lowra_cuda13.so was not built"})
    with caplog.at_level(logging.WARNING):
        assert native.by_reference(sum, torch.device("cpu"), [1, 2]) == 3
        assert not caplog.records
        for _ in range(2):
            assert native.by_reference(sum, torch.device("cuda"), [1, 2]) == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cuda13.so was not built" in record.getMessage() and "lowra env" in record.getMessage()
    native._warn_of_reference.cache_clear()


def test_bfloat16_with_code_for_turing_warns_once(monkeypatch, caplog):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(native, "call_cuda", lambda *arguments: 1)
    for code, warnings in ((80, 0), (75, 1)):
        monkeypatch.setattr(native, "cuda_code", lambda device, code=code: (code, False))
        native.product_is_quicker.cache_clear()
        assert native.product_is_quicker(device, torch.float16, 1, 64, 64)
        for tokens in (1, 2):
            assert native.product_is_quicker(device, torch.bfloat16, tokens, 64, 64)
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * warnings
    assert "dtype=torch.float16" in caplog.text and "fp16=True" in caplog.text
    native.product_is_quicker.cache_clear()
    native._warn_of_bfloat16.cache_clear()


def test_every_reference_kernel_goes_by_the_warning():
    """A reference called in an op without it would be slow in silence."""
    folder = pathlib.Path(native.__file__).parent
    source = (folder / "ops.py").read_text() + (folder / "table_gradients.py").read_text()
    for call in ("reference.quantize(", "reference.dequantize(", "reference.encode_scales(", "lloyd.lloyd_max("):
        assert call not in source
