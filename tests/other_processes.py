"""Processes that tests start: they find this `lowra`, also where another is installed."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import lowra


def environment(**variables: str) -> dict[str, str]:
    """Of a process that imports this `lowra` and asks no hub."""
    paths = filter(None, [str(pathlib.Path(lowra.__file__).parents[1]), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **variables}


def run_pair(script: pathlib.Path, *arguments: Any, **variables: str) -> None:
    """Runs a script by two processes of one thread each, as `torchrun` starts them; without a GPU unless one is named.

    Raises:
        AssertionError: it failed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    surroundings = environment(**{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables})
    command += map(str, [script, *arguments])
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
