"""Types: a user's script passes mypy and runs; with torch's own types, which take mypy half a minute, only when slow."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/typed_user.py"
CONFIG = "[mypy]\nwarn_unused_ignores = True\nfollow_imports = silent\n"
WITHOUT_TORCH = "[mypy-torch,torch.*]\nfollow_imports = skip\n"


def check(config, folder, script=SCRIPT):
    """Return (exit status, output) of mypy."""
    pytest.importorskip("mypy")
    (folder / "mypy.ini").write_text(config)
    command = [sys.executable, "-m", "mypy", "--config-file", folder / "mypy.ini", "--cache-dir", folder, script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("config", [CONFIG + WITHOUT_TORCH, pytest.param(CONFIG, marks=pytest.mark.slow)])
def test_a_typed_script_passes_mypy(config, tmp_path):
    status, output = check(config, tmp_path)
    assert status == 0, output


def test_it_runs():
    names = runpy.run_path(str(SCRIPT))
    assert names["total"].shape == () and names["weights"].shape == names["x"].shape and len(names["of_layers"]) == 2
    assert names["backend"] in ("triton", "eager")
