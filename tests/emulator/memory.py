"""Memory that checks every access: the host's, of which a launch may touch its own tensors alone, and shared memory.

Both are arrays of bytes. An access is of `count` numbers of `size` bytes each, in a row and aligned to all of them, by
every thread that takes part; programs and warps are those threads'.
"""

from __future__ import annotations

import ctypes

import numpy as np
from emulator.values import UNSIGNED

# The host's address space as one array, but for its first page, and its last ones: those no tensor has.
FIRST, LAST = 0x1000, (1 << 47) - 0x1000
MANY = 63  # instead of a warp: several


class FaultError(RuntimeError):
    """Report what would be wrong on a GPU: an access, a race, threads that wait for others in vain."""


def _host() -> dict[int, np.ndarray]:
    """Return the host's memory, by the size of its elements in bytes."""
    everything = np.frombuffer((ctypes.c_uint8 * (LAST - FIRST)).from_address(FIRST), np.uint8)
    return {bits // 8: everything.view(kind) for bits, kind in UNSIGNED.items()}


HOST = _host()


def _aligned(addresses: np.ndarray, size: int, count: int) -> None:
    if (addresses & (size * count - 1)).any():
        raise FaultError(f"an address that is not a multiple of {size * count} bytes")


def _store(memory: np.ndarray, places: np.ndarray, values: list[np.ndarray], programs, warps) -> None:
    """Store values. Where threads of one warp store different ones at one place, any of them may stay, as PTX has it:
    here the last one's. Where that of another warp is different, it is an error.
    """
    for i, value in enumerate(values):
        memory[places + i] = value
        lost = memory[places + i] != value
        if lost.any():
            keys = np.stack([places, programs, warps], 1)[::-1]
            last = len(places) - 1 - np.unique(keys, axis=0, return_index=True)[1]
            if lost[last].any():
                raise FaultError("a race: two warps store different values at one address at once")


class Global:
    """Access the host's memory, at its own addresses.

    spans: where tensors of the launch begin and end, [start, end).
    """

    def __init__(self, spans: list[tuple[int, int]]):
        spans = sorted(span for span in spans if span[0] < span[1])
        self.starts = np.array([start for start, _ in spans], np.int64)
        self.ends = np.array([end for _, end in spans], np.int64)

    def load(self, addresses: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        """Return the numbers at the addresses, an array for each of the count."""
        places = self._places(addresses, size, count, "a load")
        return [HOST[size][places + i] for i in range(count)]

    def store(self, addresses: np.ndarray, size: int, values: list[np.ndarray], programs, warps) -> None:
        """Store values, an array for each number of a thread."""
        _store(HOST[size], self._places(addresses, size, len(values), "a store"), values, programs, warps)

    def _places(self, addresses: np.ndarray, size: int, count: int, access: str) -> np.ndarray:
        _aligned(addresses, size, count)
        tensor = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = tensor < 0
        if self.ends.size:
            outside |= addresses + size * count > self.ends[tensor]
        if outside.any():
            first = int(addresses[outside.argmax()])
            raise FaultError(f"{access} of {outside.sum()} threads outside every tensor, at {first:#x} first")
        return (addresses - FIRST) // size


class Shared:
    """Hold the shared memory of a number of programs that run at once, and who has touched it since they last waited.

    It holds NaN at first. Of every byte it is known which warp wrote it last and which read it last, and how often
    the program's threads had waited for each other by then: what two warps touch, one of them to write, without a
    barrier between is a race, whether or not it did harm here, where warps run in step. Only warps that write the same
    may do so at once, as they do where several hold the same numbers. Both are kept as one number, 64 times the
    barriers and the warp, -1 before the first.
    """

    def __init__(self, size: int, programs: int):
        self.size = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(programs * self.size, 0xFF, np.uint8)
        self.writers = np.full(self.bytes.shape, -1, np.int64)
        self.readers = np.full(self.bytes.shape, -1, np.int64)
        self.barriers = np.zeros(programs, np.int64)

    def wait(self, programs: np.ndarray) -> None:
        """Count a barrier of these programs."""
        self.barriers[programs] += 1

    def load(self, addresses: np.ndarray, size: int, count: int, programs, warps) -> list[np.ndarray]:
        """Return the numbers at the addresses within their programs' memory, an array for each of the count."""
        places = self._places(addresses, size, count, programs)
        touched, since, mark = self._touched(places, size * count, programs, warps)
        self._check("reads", "wrote", _other_warps(self.writers[touched], since, mark), self.writers[touched], mark)
        self._mark(self.readers, touched, since, mark)
        memory = self.bytes.view(UNSIGNED[8 * size])
        return [memory[places // size + i] for i in range(count)]

    def store(self, addresses: np.ndarray, size: int, values: list[np.ndarray], programs, warps) -> None:
        """Store values, an array for each number of a thread, within the memory of their programs."""
        places = self._places(addresses, size, len(values), programs)
        touched, since, mark = self._touched(places, size * len(values), programs, warps)
        self._check("writes", "read", _other_warps(self.readers[touched], since, mark), self.readers[touched], mark)
        races = _other_warps(self.writers[touched], since, mark)
        if races.any():
            races &= self.bytes[touched] != np.stack(values, 1).view(np.uint8)
            self._check("writes", "wrote", races, self.writers[touched], mark)
        self._mark(self.writers, touched, since, mark)
        _store(self.bytes.view(UNSIGNED[8 * size]), places // size, values, programs, warps)

    def _places(self, addresses, size: int, count: int, programs):
        _aligned(addresses, size, count)
        if ((addresses < 0) | (addresses + size * count > self.size)).any():
            raise FaultError(f"an access outside the {self.size} bytes of shared memory")
        return addresses + programs * self.size

    def _touched(self, places, length: int, programs, warps):
        """Return the bytes that each thread touches, what marks of its program since the last barrier begin at, and the
        thread's mark.
        """
        since = 64 * self.barriers[programs][:, None]
        mark = np.broadcast_to(since + warps[:, None], (len(places), length))
        return places[:, None] + np.arange(length), since, mark

    @staticmethod
    def _mark(marks, touched, since, mark) -> None:
        """Mark bytes with the warps that touch them, or with MANY."""
        new = np.where(_other_warps(marks[touched], since, mark), since + MANY, mark)
        marks[touched] = new
        several = marks[touched] != new  # of the warps that touch them now, the last one's mark stands there
        marks[touched[several]] = np.broadcast_to(since + MANY, touched.shape)[several]

    @staticmethod
    def _check(does: str, did: str, race, marks, mark) -> None:
        if race.any():
            warp, writer = int(mark[race][0]) % 64, int(marks[race][0]) % 64
            writer = "several warps" if writer == MANY else f"warp {writer}"
            raise FaultError(f"a race: warp {warp} {does} shared memory that {writer} {did} with no barrier between")


def _other_warps(marks, since, mark):
    """Tell for each mark whether another warp left it since the last barrier."""
    return (marks >= since) & (marks != mark)
