"""Kernels that launches need, as many as Triton compiles."""

import os
import random

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl

from bench import variants
from bench.aot import Launch, recording
from daam.kernels import density, operands, tiles


@triton.jit
def fill(x, sizes, value, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), value + sizes[0])


def launch(x=torch.float32, offset=0, size=3, value=3, block=16, num_warps=4):
    room = torch.empty(64, dtype=x, device="meta")
    return Launch(fill, (room[offset:], (size,), value), {"BLOCK": block, "num_warps": num_warps})


ONE = [launch(), launch(value=5, size=9)]
CASES = [  # launches, and the kernels they need
    (ONE, 1),
    (ONE + [launch(value=1)], 2),
    (ONE + [launch(value=16), launch(value=160)], 2),
    (ONE + [launch(value=2**31), launch(value=-(2**31) - 1)], 3),  # the first is a multiple of 16, too
    (ONE + [launch(value=1.0), launch(value=16.5)], 2),
    (ONE + [launch(value=None)], 2),
    (ONE + [launch(size=1), launch(size=16), launch(size=32)], 3),
    (ONE + [launch(torch.bfloat16), launch(torch.bfloat16, offset=8)], 2),
    (ONE + [launch(offset=1), launch(offset=2), launch(offset=4)], 2),
    (ONE + [launch(block=32)], 2),
    (ONE + [launch(num_warps=8)], 2),
]


@pytest.mark.parametrize(("launches", "expected"), CASES)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_as_many_as_triton_compiles(launches, expected, target):
    assert variants.count_variants(launches, target) == {"fill": expected}
    assert variants.count_variants(launches * 2, target) == {"fill": expected}


def test_none_of_nothing():
    assert variants.count_variants([]) == {}


def test_kernels_of_a_pass_have_names_of_their_own():
    x, p = torch.empty(3, 24, 64, device="meta"), torch.empty(1, 64, device="meta")
    with recording() as launches:
        for batch in (x, x, x[:2], x.double(), x[:, :12]):
            density.backward(batch, None, batch, p, p, None, None, 1, 2, 1e-5, False, True, True)
    found = variants.find_variants(launches)
    assert {name: len(keys) for name, keys in found.items()} == {"density_backward": 3, "param_gradients": 2}
    assert found == variants.find_variants(reversed(launches))


def test_lengths_that_an_algorithm_takes():
    tensor = next(iter(variants.TENSORS))
    found = {
        name: len(variants.record_lengths(name, tensor, torch.bfloat16, 4, range(10))["forward"])
        for name in ("density", "mixture", "gate")
    }
    # of lengths 4 and 8; 8 and 9; 4 to 9
    assert found == {"density": 2, "mixture": 2, "gate": 6}


# Where tiles change: lengths that they are made for, and the next, aligned and not.
CHANGES = sorted({
    n + more for table in (operands.ALIGNED, tiles.ROWS, tiles.COLUMNS) for n in table for more in (-8, -1, 0, 1, 8)
    if 0 < n + more <= 2000
} | {257, 512, 1000, 1024, 2000})  # fmt: skip
MOST = {("(8, n, 768), norm_axis 1", 1): 29, ("(4, 64, n), norm_axis 2", 1): 36, ("(4, 64, n), norm_axis 2", 4): 36}


@pytest.mark.parametrize("algorithm", variants.ALGORITHMS)
@pytest.mark.parametrize(("tensor", "heads"), MOST, ids=str)
def test_few_kernels_serve_many_lengths(tensor, heads, algorithm):
    """Check how many kernels a pass needs of all lengths up to 2000, those of heads of unequal length included."""
    for launches in variants.record_lengths(algorithm, tensor, torch.bfloat16, heads, CHANGES).values():
        counts = variants.count_variants(launches)
        assert sum(counts.values()) <= MOST[tensor, heads], counts


@pytest.mark.parametrize("algorithm", variants.ALGORITHMS)
@pytest.mark.parametrize(("tensor", "most"), list(zip(variants.TENSORS, (20, 20), strict=True)))
def test_a_training_loop_compiles_few_kernels(tensor, most, algorithm):
    """Check a hundred random lengths."""
    lengths = random.Random(0).sample(range(1, 2001), 100)
    for launches in variants.record_lengths(algorithm, tensor, torch.bfloat16, 1, lengths).values():
        counts = variants.count_variants(launches)
        assert sum(counts.values()) <= most, counts


def test_a_line_a_pass(capsys, monkeypatch):
    words = "variants --algorithm density --dtypes fp32 --heads 1 --longest 2"
    monkeypatch.setattr("sys.argv", words.split())
    variants.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(variants.TENSORS)
    assert lines[0].startswith("density, forward, (8, n, 768), norm_axis 1, fp32, heads: 1 ")
    assert lines[0].split()[-3:] == ["2", "density_forward", "2"]
