"""How the emulator is put in Triton's way, and what stops it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.memory import FaultError

ROOT = Path(__file__).parents[2]


def refusal(**environment) -> str:
    """Return the text that pytest ends with where it cannot emulate."""
    command = [sys.executable, "-m", "pytest", "--device", "emulated", "--collect-only", "-q", "tests/emulator"]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    return done.stderr.strip()


def test_the_interpreter_leaves_nothing_to_emulate():
    assert refusal(TRITON_INTERPRET="1") == "ERROR: --device emulated: unset TRITON_INTERPRET"


def test_gcc_is_needed():
    assert refusal(PATH="").startswith("ERROR: --device emulated: there is no gcc, which compiles")


@pytest.mark.emulated
def test_an_error_in_a_launch_is_raised_by_it(emulated):
    """Check that an error passes through Triton's launcher, which is C, and that the next launch is as before."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def _number(x, n, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, BLOCK) < n)

    x, launches = torch.empty(20, dtype=torch.int32), len(emulated.launched)
    with pytest.raises(FaultError, match=r"_number: @%p\d+ st\.global.*test_driver\.py.* outside every tensor"):
        _number[(1,)](x, 21, BLOCK=32, enable_fp_fusion=True)
    _number[(1,)](x, 20, BLOCK=32, enable_fp_fusion=True)
    assert x.tolist() == list(range(20))
    assert emulated.launched[launches:] == ["_number"]
