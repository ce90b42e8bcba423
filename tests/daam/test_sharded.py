"""An axis that is spread over processes: results and gradients are those of all of it in one."""

import pytest
import spread
import torch
import torch.distributed as dist
from helpers import ALGORITHMS, Case

import daam

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    (case.but(algorithm=name), sizes)
    for name in ALGORITHMS
    for case, sizes in (
        (Case((3, 24, 5), 1), (7, 0, 17)),
        (
            Case((3, 24, 5), 1, heads=4, residual=True, layout="transposed"),
            (7, 12, 5),
        ),  # two shared heads in the middle
        (Case((2, 3, 24), 2, heads=2, mask=True, grads="expanded"), (4, 15, 5)),
        (Case((24, 4), 0, heads=3, mask=True, weights=False), (8, 8, 8)),  # nothing is shared
        (Case((2, 25, 3), 1, heads=3 if name != "density" else 5, layout="sliced"), (20, 2, 3)),
    )
]
CASES += [
    (Case((2, 24, 3), 1, heads=2, padding=0.0, algorithm="mixture"), (5, 8, 11)),
    (Case((2, 24, 3), 1, heads=2, padding=0.0, algorithm="stable", clamps=True), (5, 8, 11)),
    (Case((2, 24, 3), 1, heads=1, eps=0.5, algorithm="mixture"), (5, 8, 11)),
    (Case((2, 24, 3), 1, heads=1, clamps=True, mask=True, algorithm="stable"), (5, 8, 11)),
    (Case((2, 3, 24), 2, heads=3, params="one"), (10, 8, 6)),
]


def check_all(rank, backend):
    for case, sizes in CASES:
        spread.check(rank, case, sizes, backend)


def test_pieces_of_three_processes(tmp_path):
    spread.run(3, tmp_path, check_all, "eager")


@pytest.mark.kernel
def test_pieces_on_kernels(tmp_path, device):
    spread.run(3, tmp_path, check_all, "triton")
