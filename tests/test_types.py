"""Types: a user's script passes mypy and runs. torch's own types, which take mypy half a minute, are for slow tests."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/typed_user.py"
CONFIG = "[mypy]\nwarn_unused_ignores = True\nfollow_imports = silent\n"
WITHOUT_TORCH = "[mypy-torch,torch.*]\nfollow_imports = skip\n"


def check(config, folder, script=SCRIPT, cwd=ROOT):
    """Return (exit status, output) of mypy."""
    pytest.importorskip("mypy")
    (folder / "mypy.ini").write_text(config)
    command = [sys.executable, "-m", "mypy", "--config-file", folder / "mypy.ini", "--cache-dir", folder, script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("config", [CONFIG + WITHOUT_TORCH, pytest.param(CONFIG, marks=pytest.mark.slow)])
def test_a_typed_script_passes_mypy(config, tmp_path):
    status, output = check(config, tmp_path)
    assert status == 0, output


def test_it_runs():
    names = runpy.run_path(str(SCRIPT))
    assert names["total"].shape == () and names["weights"].shape == names["x"].shape and len(names["of_layers"]) == 2
    assert names["backend"] in ("triton", "eager")


@pytest.mark.slow
def test_checkers_find_a_strict_editable_install(tmp_path):
    """Check it elsewhere than in the checkout: `pip install -e .` alone leaves a hook, which no checker reads."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in ("daam", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", tmp_path / "prefix")
    mode = ("--config-settings", "editable_mode=strict")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, *mode, "-e", source], check=True)
    (listed,) = tmp_path.glob("prefix/**/__editable__*.pth")
    folder = listed.read_text().strip()
    assert sorted(path.name for path in Path(folder).iterdir()) == ["daam"]
    script = shutil.copy(SCRIPT, tmp_path)
    config = CONFIG + f"mypy_path = {folder}\n" + WITHOUT_TORCH
    assert check(config, tmp_path, script, cwd=tmp_path)[0] == 0
    assert "import-not-found" in check(CONFIG + WITHOUT_TORCH, tmp_path, script, cwd=tmp_path)[1]
