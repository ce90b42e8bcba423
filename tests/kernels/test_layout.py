"""Views of strided tensors: what merges, what becomes the inner dimension, and that every element is addressed once."""

import itertools

import pytest
import torch
from helpers import GRADS, LAYOUTS, strided

from daam.kernels import budgets
from daam.kernels.operands import find_layout, varies

pytest.importorskip("triton")
from daam.kernels import host

GENERATOR = torch.Generator().manual_seed(0)


def addresses(operand, plan):
    """Return the offsets of all elements that a kernel reaches through an operand, in the order (outer, head, chunk,
    inner).
    """
    axis, inner, *outer = operand.strides
    offsets = []
    for place in range(plan.places):
        base = 0
        for size, stride in zip(plan.sizes, outer, strict=True):
            base, place = base + place % size * stride, place // size
        for row, col in itertools.product(range(plan.length), range(plan.inner)):
            offsets.append(base + row * axis + col * inner)
    return offsets


@pytest.mark.parametrize("dimension", ["inner", "chunk", "nothing"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 6), 0), ((4, 6), 1), ((2, 4, 3), 1), ((2, 3, 4, 5), 2), ((1, 4, 1, 3), 1)]
)
def test_every_element_is_addressed_once_in_every_tensor(shape, axis, layout, grads, dimension):
    feature_axis = {"chunk": axis, "inner": (axis + 1) % len(shape), "nothing": None}[dimension]
    if dimension == "inner" and shape[feature_axis] == 1:
        pytest.skip("a parameter of one feature varies along nothing")
    x, grad = (strided(shape, name, torch.float32, GENERATOR) for name in (layout, grads))
    plan = find_layout(x, [None, grad], axis, 2, feature_axis)
    assert plan.places * plan.length * plan.inner == x.numel()
    assert plan.chunk == shape[axis] // 2 and plan.operands[1] is None
    x_offsets, grad_offsets = (addresses(plan.operands[i], plan) for i in (0, 2))
    assert len(set(x_offsets)) == x.numel()
    # read in x's order, the memory of both gives every element its own gradient
    order = torch.full([max(x_offsets) + 1], -1)
    order.as_strided(shape, x.stride()).copy_(torch.arange(x.numel()).reshape(shape))
    memory = grad.as_strided([max(grad_offsets) + 1], [1])
    assert torch.equal(memory[grad_offsets], grad.reshape(-1)[order[x_offsets]])


@pytest.mark.parametrize(
    ("shape", "axis", "feature_axis", "sizes", "inner"),
    [
        ((32, 24, 1024), 1, 2, (32,), 1024),
        ((8, 16, 768), 2, 2, (), 128),
        ((8, 16, 768), 2, None, (), 128),
        ((32, 256, 8, 8), 1, None, (32,), 64),
        ((32, 256, 8, 8), 1, 3, (8, 32), 8),
        ((2, 3, 4, 5, 6), 2, 4, (5, 6), 6),
        ((7, 5), 0, 1, (), 5),
        ((7,) * 2, 1, 1, (), 7),
        ((1, 24, 1), 1, None, (), 1),
    ],
)
def test_what_merges(shape, axis, feature_axis, sizes, inner):
    plan = find_layout(torch.empty(shape), [], axis, 1, feature_axis)
    assert (plan.sizes, plan.inner) == (sizes, inner)
    assert plan.contiguous == (axis == len(shape) - 1 or inner == 1)


def check_decoded(x, axis, heads):
    found = host.plan(budgets.FORWARD, 1, 2, axis, heads, None, False, (x.shape, x.stride(), x.dtype), None)
    constants = found.constants["PLAN"]
    assert found.encoded.decode(constants.UNIT, constants.FASTEST) == found.extent


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 24, 64), (2, 13, 64), (3, 4100), (2, 4101)], ids=str)
def test_what_kernels_decode_is_what_was_encoded(shape, layout):
    x = strided(shape, layout, torch.float16, GENERATOR)
    for axis, heads in itertools.product(range(x.dim()), (1, 2, 3)):
        check_decoded(x, axis, heads)


@pytest.mark.parametrize("shape", [(16, 24, 64), (16, 8192)], ids=str)
@pytest.mark.parametrize("size", [56, 60, 61], ids=str)
def test_what_no_unit_divides_is_decoded_too(size, shape):
    """Check views of rows that are longer than the part which they show, and whose strides do not tell."""
    x = torch.empty(shape, dtype=torch.float16, device="meta")[..., : shape[-1] - 64 + size]
    for axis, heads in itertools.product(range(x.dim()), (1, 2)):
        check_decoded(x, axis, heads)


def test_what_does_not_merge_in_one_tensor_merges_in_none():
    x, grad = torch.empty(4, 5, 6), torch.empty(6, 5, 4).permute(2, 1, 0)
    assert find_layout(x, [], 2, 1, 2).sizes == ()
    assert find_layout(x, [grad], 2, 1, 2).sizes == (4,)


def test_varies():
    assert [varies(1, feature_axis) for feature_axis in (None, 1, 2)] == ["nothing", "chunk", "inner"]
