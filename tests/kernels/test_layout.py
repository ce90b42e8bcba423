"""Views of strided tensors: what merges, what becomes the inner dimension, and that every element is addressed once."""

import itertools

import pytest
import torch
from helpers import GRADS, LAYOUTS, strided

from daam.kernels.layout import varies, view

GENERATOR = torch.Generator().manual_seed(0)


def addresses(operand, one):
    """Offsets of all elements that a kernel reaches through an operand, in the order (outer, head, chunk, inner)."""
    axis, inner, *outer = operand.strides
    offsets = []
    for place in range(one.places):
        base = 0
        for size, stride in zip(one.sizes, outer, strict=True):
            base, place = base + place % size * stride, place // size
        for row, col in itertools.product(range(one.heads * one.chunk), range(one.inner)):
            offsets.append(base + row * axis + col * inner)
    return offsets


@pytest.mark.parametrize("along", ["inner", "chunk", "nothing"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 6), 0), ((4, 6), 1), ((2, 4, 3), 1), ((2, 3, 4, 5), 2), ((1, 4, 1, 3), 1)]
)
def test_every_element_is_addressed_once_in_every_tensor(shape, axis, layout, grads, along):
    feature_axis = axis if along == "chunk" else (axis + 1) % len(shape)
    if along == "inner" and shape[feature_axis] == 1:
        pytest.skip("a parameter of one feature varies along nothing")
    x, grad = (strided(shape, name, torch.float32, GENERATOR) for name in (layout, grads))
    one = view(x, [None, grad], axis, 2, feature_axis, along)
    assert one.places * one.heads * one.chunk * one.inner == x.numel()
    assert one.chunk == shape[axis] // 2 and one.operands[1] is None
    of_x, of_grad = (addresses(one.operands[i], one) for i in (0, 2))
    assert len(set(of_x)) == x.numel()
    # read in x's order, the memory of both gives every element its own gradient
    order = torch.full([max(of_x) + 1], -1)
    order.as_strided(shape, x.stride()).copy_(torch.arange(x.numel()).reshape(shape))
    memory = grad.as_strided([max(of_grad) + 1], [1])
    assert torch.equal(memory[of_grad], grad.reshape(-1)[order[of_x]])


@pytest.mark.parametrize(
    ("shape", "axis", "feature_axis", "along", "sizes", "inner"),
    [
        ((32, 24, 1024), 1, 2, "inner", (32,), 1024),
        ((8, 16, 768), 2, 2, "chunk", (), 128),
        ((8, 16, 768), 2, 2, "nothing", (), 128),
        ((32, 256, 8, 8), 1, 3, "nothing", (32,), 64),
        ((32, 256, 8, 8), 1, 3, "inner", (8, 32), 8),
        ((2, 3, 4, 5, 6), 2, 4, "inner", (5, 6), 6),
        ((7, 5), 0, 1, "inner", (), 5),
        ((7,) * 2, 1, 1, "chunk", (), 7),
        ((1, 24, 1), 1, 2, "nothing", (), 1),
    ],
)
def test_what_merges(shape, axis, feature_axis, along, sizes, inner):
    one = view(torch.empty(shape), [], axis, 1, feature_axis, along)
    assert (one.sizes, one.inner) == (sizes, inner)
    assert one.by_axis == (axis == len(shape) - 1 or inner == 1)


def test_what_does_not_merge_in_one_tensor_merges_in_none():
    x, grad = torch.empty(4, 5, 6), torch.empty(6, 5, 4).permute(2, 1, 0)
    assert view(x, [], 2, 1, 2, "chunk").sizes == ()
    assert view(x, [grad], 2, 1, 2, "chunk").sizes == (4,)


def test_varies():
    assert varies(torch.empty(2, 1), 1, 1) == "nothing"
    assert varies(torch.empty(2, 3), 1, 1) == "chunk"
    assert varies(torch.empty(2, 3), 1, 2) == "inner"
