"""The guide's notebook runs from top to bottom."""

import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = json.loads((ROOT / "docs" / "guide" / "first_hour.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(cells)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.search(r"text: ([\d.]+) before, ([\d.]+) after", done.stdout).groups())
    loaded, merged = (float(re.search(rf"the {what} model: ([\d.]+)", done.stdout)[1]) for what in ("loaded", "merged"))
    assert after < before / 2 and loaded == after and abs(merged - after) < 0.02 * after, done.stdout
