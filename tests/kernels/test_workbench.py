"""The kernel workbench's own logic, which needs neither GPU nor nvcc: what got slower, labels, names, registers."""

import pathlib
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS / "kernels")]

import cuda_builds  # noqa: E402
import registers  # noqa: E402
import sass_diff  # noqa: E402
import slower  # noqa: E402


def row(us, what="product", tokens=8, bits=1.5):
    return {"what": what, "rows": 64, "in_features": 128, "bits": bits, "tokens": tokens, "us": us}


@pytest.mark.parametrize("threshold, expected", [(5, [8, 1]), (20, [8]), (60, []), (0, [8, 1, 2])])
def test_slower_beyond_the_threshold_worst_first(threshold, expected):
    earlier = [row(10, tokens=t) for t in (1, 2, 4, 8, 16)]
    now = [row(us, tokens=t) for t, us in ((1, 12), (2, 10.1), (4, 10), (8, 15), (32, 99))]
    worse, compared = slower.slower(now, earlier, threshold)
    assert [found["tokens"] for _, found in worse] == expected
    assert compared == 4


@pytest.mark.parametrize("now", [[], [row(1, what="quantise")], [row(1, bits="bf16")], [row(1, tokens=None)]])
def test_runs_without_a_common_number_are_refused(now):
    with pytest.raises(ValueError, match="no number in common"):
        slower.slower(now, [row(1)], 5)


@pytest.mark.parametrize("text", ["[]", "{}", '{"device": "x"}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="no file that bench_kernels"):
        slower.report([row(1)], "x", str(tmp_path / "other.json"), 5)


def test_an_instruction_more_moves_no_label():
    before = sass_diff._with_labels([(0, "MOV R1, R2"), (16, "@P0 BRA 0x30"), (32, "ADD R1, R1"), (48, "EXIT")])
    after = sass_diff._with_labels(
        [(0, "MOV R1, R2"), (16, "NOP"), (32, "@P0 BRA 0x40"), (48, "ADD R1, R1"), (64, "EXIT")]
    )
    assert [line for line in after if line != "NOP"] == before
    assert before == ["MOV R1, R2", "@P0 BRA label 0", "ADD R1, R1", "label 0:", "EXIT"]


def test_names_are_the_same_wherever_the_source_lies():
    internal = "51_GLOBAL__N__2a173723_18_table_gradients_cu_b6a1bce4"
    first = f"_ZN5lowra{internal}22table_gradients_kernelI6__halfLb1EEEvNS0_4taskE"
    other = first.replace("2a173723", "00000000").replace("b6a1bce4", "ffffffff")
    assert cuda_builds.without_hashes(first) == cuda_builds.without_hashes(other) != first
    name = cuda_builds.without_hashes(first)
    assert cuda_builds.kernel_names([name]) == {name: "table_gradients_kernel<fp16, true>"}


def test_registers_are_read_from_what_ptxas_prints():
    name = "_ZN5lowra12_GLOBAL__N_116lloyd_max_kernelENS0_6searchE"
    log = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_90'
ptxas info    : Function properties for {name}
    32 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 32 bytes cumulative stack size, 4304 bytes smem
"""
    (found,) = registers.usage(log)
    assert (found["kernel"], found["registers"], found["stores"], found["loads"], found["shared"]) == (
        "lloyd_max_kernel", "128", "24", "28", 4304,
    )  # fmt: skip
