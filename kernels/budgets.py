"""What a pass holds on chip before registers spill, as data: elements a thread, and the longest chunks (`tiles.py`)."""

from __future__ import annotations

import functools
from typing import NamedTuple

LONGEST_CONTIGUOUS, LONGEST_STRIDED = 4096, 256  # positions of a chunk that stays on chip
ALONE = 24  # the longest chunk of columns that one thread has: layers of a large encoder, with a kernel of their own


class Budget(NamedTuple):
    """Hold what one pass can have without spilling, which depends on what is alive at once: elements a thread, those of
    them that it loads at once (8 are 128 bits of bf16), and the longest chunks that stay on chip. What is not said of a
    pass is as density attention's forward pass has it.
    """

    contiguous: int = 32  # elements a thread: a row of 1024 is one warp's, and waits for no barrier
    contiguous_full: int = 32  # with a mask or weights, or parameters for every position
    contiguous_most: int = 32  # with both
    long: int = 32  # of rows past LONGEST_CONTIGUOUS
    together: int = 32  # of several rows that share a program
    strided: int = 48  # 24 layers two columns at a time, or 12 or 6 blocks of them 64 or 128 bits wide
    strided_masked: int = 48  # with a mask, or where blocks do not divide the chunk
    strided_full: int = 24  # with weights, or parameters for every position, or of fp32
    # of chunks longer than these, two loaded at once, where there is no mask, no weights, and parameters do not follow
    strided_long: int = 32
    strided_alone: int = ALONE  # the longest chunk that is one thread's, if that can hold two; loads get as narrow as 2
    streamed: int = 32
    streamed_full: int = 32  # with parameters for every position
    contiguous_vector: int = 8
    strided_vector: int = 8
    strided_least_vector: int = 4  # where longer ones would leave a chunk to more lanes
    streamed_vector: int = 8
    streamed_registers: int | None = 128  # of rows, a thread's: four programs a multiprocessor; None: spills
    longest_contiguous: int = 2 * LONGEST_CONTIGUOUS
    longest_along: int = LONGEST_CONTIGUOUS  # where parameters vary along it
    longest_masked: int = LONGEST_CONTIGUOUS  # with a mask
    longest_strided: int = LONGEST_STRIDED
    longest_long: int = LONGEST_STRIDED  # that has strided_long

    def divide(self, divisor: int, least: int = 1) -> Budget:
        """Return a budget of the same vectors and chunks for so many times the numbers an element."""
        elements = ("contiguous", "contiguous_full", "contiguous_most", "strided", "strided_masked", "strided_full")
        names = (*elements, "long", "together", "strided_long", "strided_alone", "streamed", "streamed_full")
        return self._replace(**{name: max(least, getattr(self, name) // divisor) for name in names})


FORWARD = Budget(long=64, longest_contiguous=4 * LONGEST_CONTIGUOUS, longest_along=2 * LONGEST_CONTIGUOUS)
FORWARD_MIXTURE = Budget(strided_masked=32, longest_contiguous=4 * LONGEST_CONTIGUOUS)
FORWARD_GATE = Budget(
    contiguous=36, strided_masked=32, strided_full=16, strided_alone=12, streamed=16, strided_vector=4,
    streamed_vector=4,
)  # fmt: skip
# x, grad_y and the weights are alive at once
BACKWARD = Budget(
    contiguous_full=16, contiguous_most=16, strided_masked=32, strided_full=16, streamed_full=16, contiguous_vector=4,
    strided_vector=4,
)  # fmt: skip
# so are k and s
BACKWARD_MIXTURE = Budget(
    contiguous_full=16, contiguous_most=16, strided_masked=24, strided_full=16, strided_vector=4,
    strided_least_vector=2,
)  # fmt: skip
# x - mean is alive while Gaussians are added where chunks clamp
BACKWARD_STABLE = BACKWARD_MIXTURE._replace(
    together=16, strided=32, streamed=16, streamed_vector=4, streamed_registers=168
)
# so are all numbers of up to four Gaussians
BACKWARD_GATE = Budget(
    contiguous=36, contiguous_full=8, contiguous_most=8, together=24, strided=24, strided_masked=12, strided_full=8,
    strided_alone=12, streamed=8, longest_long=64, contiguous_vector=2, strided_vector=4, strided_least_vector=2,
    streamed_vector=4,
)  # fmt: skip


@functools.cache
def gate_forward(n_gaussians: int) -> Budget:
    """Return the gate's budget, half as much for five to eight Gaussians, a quarter for more."""
    return FORWARD_GATE.divide(min(4, _doublings(n_gaussians)))


@functools.cache
def gate_backward(n_gaussians: int) -> Budget:
    """Return the gate's budget, half as much for every doubling. Longer chunks are streamed rather than spilled."""
    divisor = _doublings(n_gaussians)
    longest = {"longest_contiguous": 8192, "longest_masked": 2048, "longest_strided": 128}
    registers = None if divisor > 2 else BACKWARD_GATE.streamed_registers
    budget = BACKWARD_GATE.divide(divisor, least=2)._replace(streamed_registers=registers)
    return budget._replace(**{name: max(32, length // divisor) for name, length in longest.items()})


def _doublings(n_gaussians: int) -> int:
    """Return 1 for up to four Gaussians, 2 for up to eight, 4 for up to sixteen, …"""
    return 1 << max(0, (n_gaussians - 1).bit_length() - 2)


# --- Layers (`layers.py`) -------------------------------------------------------------------------
MOST_LAYERS = 4  # of one launch: with more of them a thread would hold less than a load is wide
# one layer is alive at a time, but the code of all is there: where blocks are many, too, it compiles slowly
FORWARD_LAYERS = FORWARD_MIXTURE._replace(long=32, longest_contiguous=2 * LONGEST_CONTIGUOUS)
FORWARD_MORE_LAYERS = FORWARD_LAYERS._replace(
    contiguous_full=16,
    contiguous_most=16,
    strided=24,
    strided_masked=24,
    strided_full=24,
    strided_long=16,
    strided_alone=12,
)
# x_l, the distance from the mean and the weights of every layer are alive at once
BACKWARD_LAYERS = BACKWARD_MIXTURE._replace(
    contiguous=16, contiguous_full=8, contiguous_most=8, long=8, together=16, strided=16, strided_masked=16,
    strided_full=16, strided_long=16, strided_alone=8, longest_contiguous=2048, longest_masked=2048,
    longest_strided=128, longest_long=128,
)  # fmt: skip


@functools.cache
def layers_forward(n_layers: int) -> Budget:
    """Return the budget of so many layers."""
    return FORWARD_LAYERS if n_layers < 3 else FORWARD_MORE_LAYERS


@functools.cache
def layers_backward(n_layers: int) -> Budget:
    """Return the budget of so many layers, half as much for three or four as for two. Of four, columns of more than 64
    would spill: sixteen warps have 128 registers a thread.
    """
    budget = BACKWARD_LAYERS.divide(1 if n_layers < 3 else 2)
    return budget if n_layers < 4 else budget._replace(strided_long=4, longest_strided=64, longest_long=64)


@functools.cache
def stable_layers_backward(n_layers: int) -> Budget:
    """Return the stabilised mixture's budget of so many layers: of several rows a thread holds half as much."""
    budget = layers_backward(n_layers)
    return budget._replace(together=budget.together // 2)
