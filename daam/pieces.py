"""Pieces of a normalised axis in several processes: who holds which heads, and exchanges between all processes."""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Union

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup


@dataclass(frozen=True)
class AxisPieces:
    """Say that a normalised axis is spread over the processes of a group, each with a contiguous piece, in rank order.

    group: a ProcessGroup, or a DeviceMesh of one dimension; kept by its name, so that modules which hold one can be
        copied and pickled.
    sizes: positions of each process's piece, 0 included, the same in all processes. None: processes tell each other,
        as a part of each call's first exchange, and a GPU is waited for. Where they are said, and every head lives in
        one process, nothing is exchanged.

    Raises:
        TypeError: group is not one. ValueError: sizes are not as many as processes, or negative.
    """

    group: ProcessGroup | DeviceMesh | str
    sizes: tuple[int, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "group", _name_of(self.group))
        if self.sizes is None:
            return
        sizes, world = tuple(map(operator.index, self.sizes)), count_processes(self.group)
        if len(sizes) != world or min(sizes) < 0:
            raise ValueError(f"sizes is {self.sizes}, expected {world} numbers, 0 or more, one a process of the group")
        object.__setattr__(self, "sizes", sizes)


Group = Union["ProcessGroup", "DeviceMesh", "AxisPieces", None]  # as functions and modules take one


def pieces_of(group: Group) -> AxisPieces | None:
    """Return the argument `group` of functions and modules as pieces; raise TypeError where it is no group."""
    if group is None or isinstance(group, AxisPieces):
        return group
    if hasattr(group, "sizes") and hasattr(group, "group"):  # of another copy of this package (`hub.py`)
        return AxisPieces(group.group, group.sizes)
    return AxisPieces(group)


def _name_of(group: object) -> str:
    """Return the name of a group, which `resolve` takes."""
    if isinstance(group, str):
        return group
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(f"group is a DeviceMesh of {group.ndim} dimensions, expected one: take mesh['name']")
        group = group.get_group()
    if not hasattr(group, "group_name"):
        raise TypeError(f"group is a {type(group).__name__}, expected a ProcessGroup, a DeviceMesh or AxisPieces")
    return group.group_name


def resolve(name: str) -> ProcessGroup:
    """Return the group of a name."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # groups are known by name to compilers too

    return _resolve_process_group(name)


def count_processes(name: str) -> int:
    """Return the number of processes of a group."""
    return resolve(name).size()


def rank_in(name: str) -> int:
    """Return the place of this process in a group."""
    return resolve(name).rank()


# --- Heads ----------------------------------------------------------------------------------------
class Share(NamedTuple):
    """Hold heads of equal length, of which this process has `length` positions from `start` on, of its own piece.

    head, heads: the first head, and how many; all of each are here but for a shared one, which is alone.
    slot: which of this process's shared heads it is, None of those that are all here.
    places: of a shared head, the process and the slot of each piece that is not empty, in order.
    offset, total: of a shared head, its positions before this piece, and all of them.
    """

    head: int
    heads: int
    start: int
    length: int
    slot: int | None = None
    places: tuple[tuple[int, int], ...] = ()
    offset: int = 0
    total: int = 0


class Cut(NamedTuple):
    """Hold the parts of a process, the most shared heads that a process has, and the largest piece of one."""

    parts: tuple[Share, ...]
    n_slots: int
    longest: int


@functools.lru_cache(maxsize=1024)
def cut_heads(sizes: tuple[int, ...], rank: int, heads: int) -> Cut:
    """Return which heads a process has, of an axis whose pieces have these sizes."""
    edges, total = (0, *itertools.accumulate(sizes)), sum(sizes)
    bounds = [total // heads * head for head in range(heads)] + [total]
    pieces = [  # of each process: (head, from, to) of all it has of a head
        [(h, max(first, bounds[h]), min(first + size, bounds[h + 1])) for h in range(heads)]
        for first, size in zip(edges[:-1], sizes, strict=True)
    ]
    pieces = [[piece for piece in of_one if piece[1] < piece[2]] for of_one in pieces]
    shared = [[piece for piece in of_one if piece[1:] != (bounds[piece[0]], bounds[piece[0] + 1])] for of_one in pieces]
    places: dict[int, list[tuple[int, int]]] = {}
    for process, of_one in enumerate(shared):
        for slot, (head, *_) in enumerate(of_one):
            places.setdefault(head, []).append((process, slot))
    parts: list[Share] = []
    for piece in pieces[rank]:
        head, first, last = piece
        start, length = first - edges[rank], last - first
        if piece in shared[rank]:
            offset, slot = first - bounds[head], shared[rank].index(piece)
            parts.append(
                Share(head, 1, start, length, slot, tuple(places[head]), offset, bounds[head + 1] - bounds[head])
            )
        elif parts and parts[-1].slot is None and length * parts[-1].heads == parts[-1].length:
            before = parts[-1]
            parts[-1] = before._replace(heads=before.heads + 1, length=before.length + length)
        else:
            parts.append(Share(head, 1, start, length))
    longest = max((last - first for of_one in shared for _, first, last in of_one), default=0)
    return Cut(tuple(parts), max(map(len, shared)), longest)


# --- Exchange -------------------------------------------------------------------------------------
# of each group and kind of call, as its processes last told; the same in all of them
_sizes: weakref.WeakKeyDictionary[ProcessGroup, dict[tuple, tuple[int, ...]]] = weakref.WeakKeyDictionary()
MOST_KINDS = 1024
_BASE = 4096  # sizes go as two numbers, each exact in fp32


def find_sizes(
    pieces: AxisPieces, kind: tuple, x: Tensor, axis: int, check: Callable[[int], None]
) -> tuple[int, ...]:  # fmt: skip
    """Return the sizes of all pieces as they are said, or were in the last call of a kind; ask all processes where that
    was none, or had a sum that check raises a ValueError of, which all processes then do.

    Raises:
        ValueError: sizes are said, and x has another, or check raises it.
    """
    size = x.shape[axis]
    if pieces.sizes is not None:
        if (said := pieces.sizes[rank_in(pieces.group)]) != size:
            raise ValueError(f"x has {size} positions along norm_axis, expected {said}, as group's sizes say")
        check(sum(pieces.sizes))
        return pieces.sizes
    known = _sizes.setdefault(resolve(pieces.group), {})
    if kind in known:
        try:
            check(sum(known[kind]))
        except ValueError:  # of sizes that may be no more
            del known[kind]
    if kind not in known:
        if len(known) >= MOST_KINDS:
            known.clear()
        told = gather(pieces.group, torch.tensor([size], device=x.device))
        known[kind] = tuple(told.flatten().tolist())
        check(sum(known[kind]))
    return known[kind]


def gather(name: str, numbers: Tensor) -> Tensor:
    """Return what every process of a group gives, (processes, …), in rank order: one exchange of all with all."""
    import torch.distributed

    group = resolve(name)
    found = numbers.new_empty((group.size(), *numbers.shape))
    torch.distributed.all_gather(list(found.unbind(0)), numbers.contiguous(), group=group)
    return found


def gather_checked(pieces: AxisPieces, kind: tuple, numbers: Tensor, size: int) -> Tensor | None:
    """Return what `gather` does; None where pieces have other sizes than processes told before, which all then know."""
    if pieces.sizes is not None:
        return gather(pieces.group, numbers)
    header = numbers.new_tensor(divmod(size, _BASE))
    found = gather(pieces.group, torch.cat((numbers.flatten(), header)))
    told = tuple(int(high) * _BASE + int(low) for high, low in found[:, -2:].tolist())
    if told != (known := _sizes[resolve(pieces.group)])[kind]:
        known[kind] = told
        return None
    return found[:, :-2].reshape(len(found), *numbers.shape)
