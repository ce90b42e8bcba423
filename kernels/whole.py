"""Streamed chunks, many of them: one program takes all steps of a pass over its chunks, strip after strip.

Few long chunks fill a GPU by their strips: a program each, and a launch a step (`streamed.py`). Where there are many,
one launch will do: a program takes the turns of all programs of all these launches that work on its chunks, with a
barrier after each step. What a step reads again then comes from the L2 cache, and memory reads x once. Bits are those
of launches step by step: kernels are the same, and `Extent.program` tells them whose turn it is.
"""

import triton
import triton.language as tl

from .operands import Extent


@triton.jit(repr=lambda call: f"{call.constants['NAME']}_whole")
def take_steps(
    steps, extent, KERNELS: tl.constexpr, CONSTANTS: tl.constexpr, MERGES: tl.constexpr, NAME: tl.constexpr,
    PLAN: tl.constexpr, MERGED: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Run kernels on their arguments, steps: those that MERGES says merge strips once, others for each strip. SOURCES
    says what they are made of, since Triton knows compiled kernels by the mere names of functions in a tuple.
    """
    tile = tl.program_id(0)
    for i in tl.static_range(len(KERNELS)):
        turns = 1 if MERGES[i] else extent.n_strips >> 1
        for turn in range(turns):
            turn_extent = Extent(
                extent.sizes, extent.strides, extent.n_tiles, extent.n_blocks, extent.n_strips, extent.strip,
                extent.chunk, extent.longest, extent.inner, tile * turns + turn,
            )  # fmt: skip
            KERNELS[i](*steps[i], turn_extent, *CONSTANTS[i], MERGED if MERGES[i] else PLAN)
        tl.debug_barrier()
