"""Whole modules, counted and modelled: launches, saved bytes, and what the model makes of them, without a GPU."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from bench import audit
from bench.byte_model import kernel_bytes
from bench.gpus import GPUS
from bench.modelled import count_moved, estimate
from bench.modules import ModuleWorkload, modules
from bench.recorded import bound_formula, record_module
from daam.kernels.algorithms import count_tensors

GPU = GPUS["h200"]
BLOCK = ModuleWorkload("block", "mixture", (64, 1024), 1, 4, 5, "float32", layers=3)
LARGE = ModuleWorkload("block", "mixture", (8192, 1024), 1, 4, 5, layers=3)
GATE = ModuleWorkload("gate-module", "gate", (8, 64, 600), 2, 1, 4, "float32")
WHOLE = [one for one in modules("cuda") if not one.in_model]


@pytest.mark.parametrize(
    ("recompute", "forward", "backward", "least", "most"), [(None, 1, 2, 1, 1.1), (False, 3, 6, 2.9, 3.1)]
)
def test_launches_and_saved_bytes_of_a_block(recompute, forward, backward, least, most):
    """Check three layers: one launch forward and two backward that save x alone, or as many times each by each."""
    found = record_module(BLOCK, recompute)
    assert (found.count("forward"), found.count("backward")) == (forward, backward)
    assert least <= found.saved / BLOCK.x.nbytes <= most and found.others == {"forward": 0, "backward": 0}


def test_launches_and_saved_bytes_of_a_gate():
    """Check its launches by name; beside x it saves two fp32 numbers a position, of 64 channels. What torch launches:
    two sums in fp64 and their dtypes, and a zero.
    """
    found = record_module(GATE)
    names = {name: [one.name for one in launches] for name, launches in found.passes.items()}
    assert names["forward"] == ["gated_project", "gate_forward", "gated_forward"]
    assert names["backward"] == ["gated_sums", "gate_backward", "param_gradients", "gated_backward"]
    assert found.saved == GATE.x.nbytes + 2 * 8 * 600 * 4
    assert found.others == {"forward": 0, "backward": 5}


@pytest.mark.parametrize("workload", [*WHOLE, LARGE], ids=str)
def test_kernel_bytes_are_those_of_the_launches(workload):
    """Check what kernels move of x, which the byte model counts by itself, but where L2 holds what is read again."""
    for name, launches in record_module(workload).passes.items():
        numbers = ("gate_", "strip_", "forward_streamed", "backward_streamed") if workload.algorithm == "gate" else ()
        large = [one for one in launches if count_tensors(one.name) and not one.name.startswith(numbers)]
        moved = sum(sum(count_moved(one)) for one in large)
        small = {"forward": 1, "backward": 2}[name] * workload.params_bytes
        assert kernel_bytes(workload, name) == moved * workload.x.nbytes + small


def test_what_later_launches_find_in_l2():
    """Check that a layer finds what the one before it wrote, and of what the backward pass reads the gradient alone."""
    passes = record_module(LARGE, recompute=False).passes
    size = LARGE.x.nbytes
    for name, held in (("forward", 1), ("backward", 1)):
        first, second = [one for key, one in estimate(passes[name], GPU) if key != "param_gradients"][:2]
        saved = held * size * (1 / GPU.read - 1 / GPU.l2_read) / 1e9
        assert first.memory - second.memory == pytest.approx(saved, rel=0.2)


@pytest.mark.parametrize("workload", [BLOCK, GATE], ids=str)
def test_bound_by_hand(workload):
    """Check that it has the launches of an ideal fusion and the bytes that a pass must move, at most at L2's speed."""
    launches = {"gate": {"forward": 2, "backward": 3}}.get(workload.algorithm, {"forward": 1, "backward": 2})
    for name, found in bound_formula(workload, GPU).items():
        starts = GPU.launch + (launches[name] - 1) * GPU.next
        moved = workload.moved[name] * workload.x.nbytes
        assert starts + moved / GPU.l2_read / 1e3 < found.us < starts + moved / GPU.copy / 1e3 * 1.01


@pytest.mark.slow
def test_modelled_times(capsys):
    """Check what is printed: that a small block is faster together, and that no way takes less than the bound."""
    audit._print_module(BLOCK, GPU)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(line[0] == str(BLOCK) for line in lines)
    assert [" ".join(line[1:-6]) for line in lines] == ["fused", "layer by layer", "formula, at least"]
    for place in (-6, -3):
        together, apart, least = (float(line[place]) for line in lines)
        assert least <= together < apart
