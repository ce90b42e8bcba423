"""Times of kernels that only move memory: how much a GPU moves, by what is in flight and how long its accesses are.

A program takes every so many tiles [ROWS, COLUMNS] of a matrix, and has one of them in flight at a time: COLUMNS fp16
values that stand side by side, ROWS times, so many bytes a thread. Where nothing is written, the compiler adds up the
first values before it asks for the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench import core
from bench.device.session import Job, Session
from bench.device.times import median_seconds
from bench.model import resident_warps

LENGTH, WIDTH = 131_072, 1024  # of a matrix: 256 MiB
MULTIPROCESSORS = 132  # where there is no GPU to ask


@dataclass(frozen=True)
class Stream:
    """Describe a kernel and its launch.

    reads, writes: matrices. rounds: 2, where the second matrix is loaded once sums of the first are known. thread:
    bytes of one matrix that a thread loads at once. warps: launched for a multiprocessor, which may have registers for
    fewer. run: bytes side by side. mib: of one matrix. times: how often all of it is gone through.
    """

    reads: int = 1
    writes: int = 1
    rounds: int = 1
    thread: int = 64
    warps: int = 16
    run: int = 512
    mib: int = LENGTH * WIDTH * 2 >> 20
    times: int = 1

    @property
    def columns(self) -> int:
        """Return the columns of a tile."""
        return self.run // 2

    @property
    def num_warps(self) -> int:
        """Return the warps of a program: one, as far as programs are not too many for a multiprocessor."""
        return max(1, self.warps // 32)

    @property
    def rows(self) -> int:
        """Return the rows of a tile."""
        return 32 * self.num_warps * self.thread // self.run

    @property
    def asked(self) -> int:
        """Return the bytes that so many warps ask for before they need the first of them."""
        both = self.reads if self.rounds == 1 else 1
        return 32 * self.warps * self.thread * both

    def resident(self, registers: int, shared: int = 0) -> int:
        """Return how many of the warps stand on a multiprocessor, by registers a thread and bytes a program shares."""
        return min(self.warps, resident_warps(registers, shared, self.num_warps))


@triton.jit
def stream(
    x, other, y, totals, n_tiles, n_blocks, stride, times, READS: tl.constexpr, WRITES: tl.constexpr,
    ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store x, or x + other, in y, or add it up for each program where nothing is written."""
    total = tl.zeros([ROWS, COLUMNS], tl.float16)
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    for _ in range(times):
        for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
            row, block = tile // n_blocks, tile % n_blocks
            offsets = (row * ROWS + rows) * stride + block * COLUMNS + columns
            values = tl.load(x + offsets, cache_modifier=".cg")  # what is read again comes from L2, not from L1
            if READS == 2:
                if ROUNDS == 2:
                    values += tl.load(other + offsets, tl.sum(values, 1)[:, None] != 1.0, 0.0)
                else:
                    values += tl.load(other + offsets)
            if WRITES == 1:
                tl.store(y + offsets, values)
            else:
                total += values
    if WRITES == 0:
        tl.store(totals + tl.program_id(0), tl.sum(tl.sum(total.to(tl.float32), 1), 0))


THREADS, WARPS, RUNS = (16, 32, 64, 128), (2, 4, 8, 16, 32, 64), (32, 64, 128, 256, 512)
STREAMS = [
    *(Stream(r, w, thread=t, warps=n) for r, w in ((1, 0), (1, 1), (2, 1)) for t in THREADS for n in WARPS),
    *(Stream(2, 1, rounds=2, thread=t, warps=n) for t in THREADS for n in WARPS),
    *(Stream(1, w, warps=n, run=run) for w in (0, 1) for n in (8, 16, 32) for run in RUNS),
    *(Stream(1, 0, warps=32, mib=mib, times=t) for mib in (4, 16, 32, 40, 48, 64) for t in (1, 11)),
]


def jobs(session: Session) -> list[Job]:
    """Return a job a stream, each once."""
    return [Job(name(one), partial(time_stream, session, one)) for one in dict.fromkeys(STREAMS)]


def name(one: Stream) -> str:
    """Return what differs from a copy, as text."""
    differing = {key: value for key, value in asdict(one).items() if value != getattr(Stream(), key)}
    return "stream-" + ("-".join(f"{key}{value}" for key, value in differing.items()) or "copy")


def time_stream(session: Session, one: Stream) -> Iterator[dict]:
    """Yield what a stream takes, microseconds and GB/s of all that it reads and writes, and how many warps fit."""
    if session.compiling:
        matrices = (torch.empty(1, dtype=torch.float16) for _ in range(3))
        launch(one, *matrices, torch.empty(1), MULTIPROCESSORS)
        yield {}
        return
    matrices = draw_matrices()
    count = torch.cuda.get_device_properties(core.DEVICE).multi_processor_count
    seconds = median_seconds(core.Step(lambda: None, lambda _: launch(one, *matrices, count)), 9)
    moved = (one.reads + one.writes) * one.times * one.mib << 20
    compiled = launch(one, *matrices, count)
    yield {
        "us": round(1e6 * seconds, 2),
        "gb_per_s": round(moved / seconds / 1e9),
        **asdict(one),
        "num_warps": one.num_warps,
        "asked": one.asked,
        "registers": compiled.n_regs,
        "resident_warps": one.resident(compiled.n_regs, compiled.metadata.shared),
    }


def launch(one: Stream, x: Tensor, other: Tensor, y: Tensor, totals: Tensor, multiprocessors: int) -> Any:
    """Launch a stream on so many multiprocessors and return the compiled kernel."""
    n_blocks = WIDTH // one.columns
    n_tiles = (one.mib << 19) // (one.rows * one.columns)
    return stream[(multiprocessors * one.warps // one.num_warps,)](
        x, other, y, totals, n_tiles, n_blocks, WIDTH, one.times, READS=one.reads, WRITES=one.writes, ROUNDS=one.rounds,
        ROWS=one.rows, COLUMNS=one.columns, num_warps=one.num_warps, num_stages=1,
    )  # fmt: skip


@lru_cache(maxsize=1)
def draw_matrices() -> tuple[Tensor, ...]:
    """Return two matrices to read, one to write, and room for a sum of every program, on the device."""
    x, other, y = (torch.zeros(LENGTH, WIDTH, dtype=torch.float16, device=core.DEVICE) for _ in range(3))
    return x, other, y, torch.empty(1 << 16, device=core.DEVICE)
