"""Execute a program: its threads in step, a block of instructions at a time, the first block that has any first.

Programs of a launch run many at a time, side by side in the same arrays. Where threads take different ways, those in
the lowest block go on and the others wait, so that they meet again where ways meet in the text. Threads of a warp wait
for each other before a shuffle, those of a program before a barrier: where all wait for somebody who never comes, it
is an error. What goes wrong names the kernel, the instruction and the line that it comes from.
"""

from __future__ import annotations

import functools

import numpy as np
from emulator import ptx
from emulator.instructions import step
from emulator.memory import FaultError, Global, Shared
from emulator.ptx import Block, Instruction

AT_ONCE = 1 << 15  # threads of a batch of programs


class Executable:
    """Run a program whose instructions have become steps.

    executed: instructions of all executables so far, one that threads execute together counting once.
    """

    executed = 0

    def __init__(self, text: str):
        self.program = ptx.parse(text)
        self.steps = [[(step(i), i) for i in block.instructions] for block in self.program.blocks]

    def run(self, grid: tuple[int, int, int], shared: int, params: dict[str, int], memory: Global) -> None:
        """Run a launch.

        Args:
            grid: programs along x, y and z.
            shared: bytes of shared memory of each program.
            params: the bits of every parameter, by name.
            memory: what the launch may touch.

        Raises:
            FaultError: the launch would be wrong on a GPU.
        """
        total, at_once = grid[0] * grid[1] * grid[2], max(1, AT_ONCE // self.program.threads)
        for first in range(0, total, at_once):
            programs = np.arange(first, min(total, first + at_once))
            threads = Threads(programs, grid, self.program.threads, shared, params, memory)
            try:
                with np.errstate(all="ignore"):
                    self._run(threads)
            except FaultError as error:
                raise FaultError(f"{self.program.name}: {error}") from error

    def _run(self, threads: Threads) -> None:
        blocks = self.program.blocks
        while (number := threads.next_block(blocks)) is not None:
            for execute, instruction in self.steps[number]:
                self._guard(execute, threads, instruction)
            Executable.executed += len(self.steps[number])
            self._leave(threads, number, blocks[number])

    def _guard(self, execute, threads: Threads, instruction: Instruction) -> None:
        try:
            execute(threads)
        except Exception as error:
            fault = error if isinstance(error, FaultError) else f"{type(error).__name__}: {error}"
            raise FaultError(f"{instruction}: {fault}") from error

    def _leave(self, threads: Threads, number: int, block: Block) -> None:
        if block.jump is None:
            threads.go(number + 1)
        elif block.jump.opcode == "trap":
            raise FaultError(f"{block.jump}: a trap")
        elif block.jump.predicate is None:
            threads.go(block.target)
        else:
            threads.part(threads.holds(block.jump), block.target, number + 1)


@functools.lru_cache(maxsize=128)
def executable(text: str) -> Executable:
    """Return the `Executable` of the kernel of a PTX module, made once for the same text."""
    return Executable(text)


class Threads:
    """Hold the threads of a batch of programs: registers, by name, and where in the program each thread is.

    A register is an array of bits with one element for each thread, or one element for all of them. mask: who executes
    the instruction at hand, None where all do. programs, warps: each thread's program within the batch, and its warp.
    """

    def __init__(self, programs: np.ndarray, grid, threads: int, shared: int, params: dict[str, int], memory: Global):
        self.threads, self.count = threads, threads * len(programs)
        self.params, self.memory, self.shared = params, memory, Shared(shared, len(programs))
        self.registers: dict[str, np.ndarray] = {}
        self.mask: np.ndarray | None = None
        self.block, self.blocks = 0, None  # where all are, or, where they are not together, each one
        index = np.tile(np.arange(threads, dtype=np.uint32), len(programs))
        self.programs, self.warps = np.repeat(np.arange(len(programs)), threads), (index // 32).astype(np.int64)
        x, y, z = (np.repeat(axis.astype(np.uint32), threads) for axis in np.unravel_index(programs, grid, order="F"))
        self.special = {"%tid.x": index, "%laneid": index % 32, "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
        sizes = map(np.uint32, (threads, *grid))
        self.special |= dict(zip(("%ntid.x", "%nctaid.x", "%nctaid.y", "%nctaid.z"), sizes, strict=True))

    # --- registers ---

    def write(self, name: str, bits: np.ndarray) -> None:
        """Write bits, one element a thread, to a register of the active threads; a thread that never wrote it holds
        NaN.
        """
        if self.mask is not None:
            previous = self.registers.get(name)
            bits = np.where(self.mask, bits, _unwritten(bits.dtype) if previous is None else previous)
        self.registers[name] = bits

    def write_active(self, name: str, bits: np.ndarray) -> None:
        """Write bits, one element an active thread, to a register of the active threads."""
        if self.mask is not None:
            everybody = np.full(self.count, _unwritten(bits.dtype))
            everybody[self.mask] = bits
            bits = everybody
        self.write(name, bits)

    def spread(self, value) -> np.ndarray:
        """Return a value broadcast to one element for each thread."""
        return np.broadcast_to(value, (self.count,))

    def active(self, value) -> np.ndarray:
        """Return a value with one element for each active thread."""
        return self.spread(value) if self.mask is None else self.spread(value)[self.mask]

    def owners(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the programs and the warps of the active threads."""
        return self.active(self.programs), self.active(self.warps)

    def holds(self, instruction: Instruction) -> np.ndarray:
        """Tell for each thread, as an array, whether an instruction's predicate holds."""
        predicate = self.spread(self.registers[instruction.predicate])
        return ~predicate if instruction.negated else predicate

    # --- who is there ---

    def need_whole_warps(self, waits: str) -> None:
        """Raise FaultError where only some threads of a warp are active."""
        self._whole(32, f"{waits} without some threads of a warp")

    def need_whole_programs(self, waits: str) -> np.ndarray:
        """Return the programs whose threads are active; raise FaultError where only some threads of one are."""
        return np.flatnonzero(self._whole(self.threads, f"{waits} without some threads of a program"))

    def _whole(self, size: int, problem: str) -> np.ndarray:
        groups = self.spread(True if self.mask is None else self.mask).reshape(-1, size)
        whole = groups.all(1)
        if (groups.any(1) != whole).any():
            raise FaultError(problem)
        return whole

    # --- where they are ---

    def next_block(self, blocks: tuple[Block, ...]) -> int | None:
        """Return the number of the block to execute, and choose its threads; None where all threads have returned."""
        if self.blocks is not None:
            lowest = self.blocks.min()
            self.mask = self.blocks == lowest
            if not self.mask.all():
                return self._first_ready(blocks)
            self.block, self.blocks, self.mask = int(lowest), None, None
        return self.block if self.block < len(blocks) else None

    def _first_ready(self, blocks: tuple[Block, ...]) -> int:
        """Return the number of the first block that some threads can begin, and choose them."""
        for number in np.unique(self.blocks):
            if number == len(blocks):
                break
            self.mask, waits = self.blocks == number, blocks[number].waits
            if waits:
                groups = self.mask.reshape(-1, 32 if waits == "warp" else self.threads)
                self.mask = np.repeat(groups.all(1), groups.shape[1])
            if self.mask.any():
                return int(number)
        waiting = blocks[self.blocks.min()].instructions[0]
        raise FaultError(f"{waiting}: threads wait for others that never come")

    def go(self, target: int) -> None:
        """Send the active threads to a block."""
        if self.blocks is None:
            self.block = target
        else:
            self.blocks[self.mask] = target

    def part(self, chosen: np.ndarray, target: int, alternative: int) -> None:
        """Send the chosen ones of the active threads to the block `target`, and the others to `alternative`."""
        if self.blocks is not None:
            self.blocks = np.where(self.mask, np.where(chosen, target, alternative), self.blocks)
        elif chosen.all():
            self.block = target
        elif not chosen.any():
            self.block = alternative
        else:
            self.blocks = np.where(chosen, target, alternative)


def _unwritten(dtype: np.dtype):
    return np.bool_(True) if dtype == np.bool_ else dtype.type(np.iinfo(dtype).max)
