"""A tool chain for the library of the CUDA 12 line, where no nvcc of CUDA 12 is to be had: from nvcc 13 and PyPI.

    python scripts/cuda12_toolkit.py /tmp/cuda-12.9                    # with nvcc 13 installed; downloads 47 MB
    CUDACXX=/tmp/cuda-12.9/bin/nvcc make dist                          # or a build by CMake (CONTRIBUTING.md)

PyPI has of CUDA 12.9 what decides which drivers serve a library: the runtime that is linked in, ptxas that makes the
machine code, and the headers; not nvcc, cudafe++ and cicc, which read C++. Those are taken from the CUDA 13 that is
installed, with the one header that cudafe++ writes for (crt/host_runtime.h). The PTX that cicc writes gets the version
of 12.9 at its top, and ptxas 12.9 refuses it where it uses anything that came later. An nvcc of CUDA 12.8 or 12.9 needs
none of this: give it as CUDACXX.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

_WHEELS = ("nvidia-cuda-nvcc-cu12==12.9.*", "nvidia-cuda-runtime-cu12==12.9.*", "nvidia-cuda-cccl-cu12==12.9.*")
_OF_13 = ("nvcc", "cudafe++", "fatbinary", "bin2c", "nvlink", "__nvcc_device_query", "crt")
_PROFILE = """
TOP              = $(_HERE_)/..
CICC_PATH        = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH            += $(CICC_PATH):$(_HERE_):
INCLUDES        +=  "-I$(TOP)/include" $(_SPACE_)
LIBRARIES        =+ $(_SPACE_) "-L$(TOP)/lib64"
"""
_CICC = """#!/bin/sh
"{cicc}" "$@" || exit $?
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then sed -i 's/^[.]version 9[.].*/.version 8.8/' "$2"; fi
  shift
done
"""


def toolkit_of_13() -> pathlib.Path:
    """The folder of the CUDA that is installed.

    Raises:
        SystemExit: none, or none of CUDA 13.
    """
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not pathlib.Path(nvcc).exists():
        raise SystemExit("No nvcc was found: install CUDA 13, or name its nvcc in CUDACXX.")
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = next((line.partition("=")[2] for line in said.splitlines() if line.startswith("#$ TOP=")), "")
    root = pathlib.Path(top.strip()).resolve()
    if not (root / "nvvm/bin/cicc").exists():
        raise SystemExit(f"{nvcc} belongs to {root}, which has no nvvm/bin/cicc: take a whole CUDA 13.")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    if "release 13." not in version:
        raise SystemExit(f"{nvcc} is not of CUDA 13; one of CUDA 12.8 or 12.9 serves as it is.")
    return root


def assemble(root: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts the parts of both together.

    Args:
        root: of CUDA 13.
        folder: a new one.
    """
    for name in ("bin", "nvvm/bin", "nvvm/libdevice", "include", "lib64"):
        (folder / name).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", scratch]
        subprocess.run([*pip, *_WHEELS], check=True)
        for wheel in pathlib.Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(scratch)
        parts = pathlib.Path(scratch) / "nvidia"
        for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl"):
            shutil.copytree(parts / part / "include", folder / "include", dirs_exist_ok=True)
        shutil.copytree(parts / "cuda_runtime/lib", folder / "lib64", dirs_exist_ok=True)
        shutil.copy(parts / "cuda_nvcc/bin/ptxas", folder / "bin")
        shutil.copytree(parts / "cuda_nvcc/nvvm/libdevice", folder / "nvvm/libdevice", dirs_exist_ok=True)
    for name in _OF_13:
        copy = shutil.copytree if (root / "bin" / name).is_dir() else shutil.copy
        copy(root / "bin" / name, folder / "bin" / name)
    shutil.copy(root / "include/crt/host_runtime.h", folder / "include/crt/host_runtime.h")
    (folder / "bin/nvcc.profile").write_text(_PROFILE)
    (folder / "nvvm/bin/cicc").write_text(_CICC.format(cicc=root / "nvvm/bin/cicc"))
    for path in (folder / "bin/ptxas", folder / "nvvm/bin/cicc"):
        path.chmod(0o755)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="a new one")
    folder = parser.parse_args().folder.resolve()
    if folder.exists():
        raise SystemExit(f"{folder} exists: name a new folder.")
    assemble(toolkit_of_13(), folder)
    print(f"CUDACXX={folder / 'bin/nvcc'}")


if __name__ == "__main__":
    main()
