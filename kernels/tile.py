"""What stands in a tile (`walk.py`): loads, stores, masks, and numbers of its chunks."""

from typing import NamedTuple

import triton
import triton.language as tl

from .walk import columns_inside, offsets_of, pointers_of


class Gradients(NamedTuple):
    """Hold the blocks of grad_y as it came, of grad_y and of grad_weights with 0 where not valid; [] for none."""

    raw: list
    y: list
    weights: list


@triton.jit
def load_blocks(t, mask, tile, view, RAW: tl.constexpr, PLAN: tl.constexpr):
    """Return (raw, blocks): a tile as it came, 0 outside, and with 0 for what is not valid. Without RAW both may be the
    latter, and where all columns have one mask nothing else is loaded.
    """
    SHARED: tl.constexpr = mask is not None and len(mask.strides) == 1 + len(view.sizes)
    pointers, loaded = pointers_of(t, tile.position, view, PLAN), []
    for i in tl.static_range(PLAN.N_BLOCKS):
        wanted = tile.inside[i] if RAW or not SHARED else tile.inside[i] & tile.valid[i]
        loaded = loaded + [tl.load(pointers[i], wanted, 0)]
    raw = [block.to(PLAN.ACC) for block in loaded]
    blocks = raw
    if mask is not None and (RAW or not SHARED):
        blocks = []
        for i in tl.static_range(PLAN.N_BLOCKS):
            blocks = blocks + [tl.where(tile.valid[i], raw[i], 0.0)]
    return raw, blocks


@triton.jit
def load_gradients(inputs, tile, view, RAW: tl.constexpr, PLAN: tl.constexpr):
    """Return the Gradients of a tile; grad_y is 0 where there is none."""
    raw = [tl.zeros([1, 1], PLAN.ACC) for _ in tile.inside]
    y, weights = raw, []
    if inputs.grad_y is not None:
        raw, y = load_blocks(inputs.grad_y, inputs.mask, tile, view, RAW, PLAN)
    if inputs.grad_weights is not None:
        _raw, weights = load_blocks(inputs.grad_weights, inputs.mask, tile, view, False, PLAN)
    return Gradients(raw, y, weights)


@triton.jit
def store_blocks(t, blocks, tile, view, PLAN: tl.constexpr):
    """Store the elements of a tile that are inside."""
    pointers = pointers_of(t, tile.position, view, PLAN)
    for i in tl.static_range(PLAN.N_BLOCKS):
        tl.store(pointers[i], blocks[i].to(t.data.dtype.element_ty), tile.inside[i])


@triton.jit
def float_of(bits, ACC: tl.constexpr):
    """Return the number whose bits in fp64 came as an integer: floats come as fp32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def zero_padding(x, padding):
    """Return x as statistics count it: 0 at padded positions."""
    return x if padding is None else [tl.where(block == padding, 0.0, block) for block in x]


@triton.jit
def store_outputs(outputs, x, raw, weights, padding, tile, view, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store y = x·weights (+ x), or x where it is padding, and the weights where they are wanted."""
    y = []
    for i in tl.static_range(PLAN.N_BLOCKS):
        gated = x[i] * weights[i]
        if padding is not None:
            gated = tl.where(x[i] == padding, x[i], gated)
        y = y + [gated + raw[i] if RESIDUAL else gated]
    store_blocks(outputs.y, y, tile, view, PLAN)
    if outputs.weights is not None:
        store_blocks(outputs.weights, weights, tile, view, PLAN)


@triton.jit
def store_dx(dx, grad, raw, tile, view, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store dx = grad (+ grad_y, which is raw), with 0 for grad where x is not valid."""
    blocks = []
    for i in tl.static_range(PLAN.N_BLOCKS):
        direct = tl.where(tile.valid[i], grad[i], 0.0)
        blocks = blocks + [direct + raw[i] if RESIDUAL else direct]
    store_blocks(dx, blocks, tile, view, PLAN)


# --- Numbers of a chunk: tensors (n, …, heads, …) whose last stride, encoded, leads to the next number --
@triton.jit
def number_pointers(t, head, position, view):
    """Return (pointers [1, BLOCK_C] to each column's first number, the distance to the next, which are inside)."""
    strides = [stride >> 1 for stride in t.strides]
    base, within = offsets_of(strides, view, position.outer, head, position.column, tl.arange(0, 1), position.columns)
    return t.data + base + within, strides[len(view.sizes) + 2], columns_inside(position, view)


@triton.jit
def load_numbers(t, head, position, view, N: tl.constexpr):
    """Return the first N numbers of each column's chunk, [1, BLOCK_C] each."""
    pointers, distance, inside = number_pointers(t, head, position, view)
    numbers = []
    for i in tl.static_range(N):
        numbers = numbers + [tl.load(pointers + i * distance, inside, 0.0)]
    return numbers


@triton.jit
def store_numbers(t, head, position, view, numbers):
    """Store numbers of each column's chunk."""
    pointers, distance, inside = number_pointers(t, head, position, view)
    for i in tl.static_range(len(numbers)):
        tl.store(pointers + i * distance, numbers[i], inside)
