"""Builds of the CUDA library for one chip, beside the installed one, and the tools that look into them."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "build" / "kernels"
# Names of internal linkage hold a hash of the source's path and text.
_INTERNAL = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}")


def find_tool(name: str, remedy: str) -> str:
    """Path of a program: on PATH, beside this Python, in a CUDA toolkit, or in NVIDIA's packages of this Python.

    Raises:
        SystemExit: it is in none of them; says `remedy`.
    """
    places = [sysconfig.get_path("scripts"), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    places += [str(folder) for folder in pathlib.Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        sys.exit(f"{name} is not on this machine: {remedy}.")
    return found


def build(source: pathlib.Path, name: str, arch: str, *options: str, fresh: bool = False) -> tuple[pathlib.Path, str]:
    """Builds the libraries of the tree `source` for one chip under build/kernels/NAME.

    Args:
        arch: compute capability without the dot, such as "90", with which the files of Hopper's own instructions
            are built, for sm_90a.
        options: more arguments of cmake.
        fresh: compile everything again, so that the log is complete.

    Returns:
        The CUDA library, and what the build printed.

    Raises:
        SystemExit: there is no nvcc, or the build failed.
    """
    find_tool("nvcc", "install a CUDA toolkit, or set CUDA_HOME to where one is")
    cmake, ninja = (find_tool(tool, "`make build` installs it into .venv") for tool in ("cmake", "ninja"))
    folder = FOLDER / name
    # Ninja keeps what one compiler prints together.
    configure = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(source), "-B", str(folder)]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={arch}-real", *options]
    compile_all = [cmake, "--build", str(folder), "--parallel", str(len(os.sched_getaffinity(0)))]
    log = _run(configure) + _run(compile_all + (["--clean-first"] if fresh else []))
    libraries = list(folder.glob("**/libbitsandbytes_lowra_cuda*.so"))
    if not libraries:
        sys.exit(f"The build in {folder} made no CUDA library:\n{log[-2000:]}")
    return libraries[0], log


def head_sources(commit: str) -> pathlib.Path:
    """The sources of a commit, as a folder under build/kernels."""
    folder = FOLDER / "sources" / commit
    if not folder.exists():
        archive = subprocess.run(
            ["git", "archive", commit, "CMakeLists.txt", "csrc"], cwd=ROOT, check=True, capture_output=True
        )
        folder.mkdir(parents=True)
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def kernel_names(mangled: list[str]) -> dict[str, str]:
    """Readable names of kernels by their mangled ones, without namespaces, arguments and type details."""
    demangled = subprocess.run(
        [find_tool("c++filt", "install binutils")], input="\n".join(mangled), text=True, check=True, capture_output=True
    ).stdout.splitlines()
    return {name: _shortened(text) for name, text in zip(mangled, demangled, strict=True)}


def without_hashes(text: str) -> str:
    """`text` with names of internal linkage that are the same for the same source anywhere."""
    return _INTERNAL.sub("12_GLOBAL__N_1", text)


def _shortened(name: str) -> str:
    depth, kept = 0, ""
    for symbol in re.sub(r"lowra::|\(anonymous namespace\)::|^void ", "", name):
        if symbol == "(" and depth == 0:
            break
        depth += (symbol == "<") - (symbol == ">")
        kept += symbol
    kept = re.sub(r"\((?:int|bool)\)", "", kept)
    return kept.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return done.stdout
