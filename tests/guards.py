"""Launches among canaries, and loads that find what nobody wrote."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from daam.kernels import launch

MARGIN = 512  # bytes on either side: allocations begin at multiples of it, or of fewer bytes
CANARY = 0xFF  # in every byte: NaN in each floating dtype, and neither True nor False in a mask
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Kernels that put a number in place of one they were given, by the argument that holds it: statistics of chunks have
# the least exponent where 1/n stood.
IN_PLACE = {"merge_scales": 2}


class Fence:
    """Hold a copy of a storage for one launch, in which every byte that is no element of its tensors is a canary."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.original = bytes_of(tensors[0])
        places = torch.arange(self.original.numel(), device=self.original.device)
        known = torch.zeros_like(places, dtype=torch.bool)
        for t in tensors:
            size = t.element_size()
            shape, strides = (*t.shape, size), (*(size * step for step in t.stride()), 1)
            known[places.as_strided(shape, strides, size * t.storage_offset()).reshape(-1)] = True
        self.known = torch.nn.functional.pad(known, (MARGIN, MARGIN))
        self.memory = torch.full(self.known.shape, CANARY, dtype=torch.uint8, device=known.device)
        self.memory[self.known] = self.original[known]
        self.before = self.memory.clone()

    def view(self, t: Tensor, memory: Tensor) -> Tensor:
        """Return what stands for a tensor in the copy, or in one of its own size."""
        offset = MARGIN // t.element_size() + t.storage_offset()
        return t.new_empty(0).set_(memory.untyped_storage(), offset, t.shape, t.stride())

    def check(self, name: str, in_place: bool) -> None:
        """Assert that the launch of a kernel wrote elements alone, no NaN, and changed none that had been written, but
        where it does so in place.
        """
        changed = self.memory != self.before
        assert not (changed & ~self.known).any(), f"{name} writes beside a tensor, or between its elements"
        for t in self.tensors:
            old, new = self.view(t, self.before), self.view(t, self.memory)
            if t.is_floating_point():
                assert in_place or not (~old.isnan() & (old != new)).any(), f"{name} changes what had been written"
                bits = INTEGERS[t.element_size()]
                assert not (new.isnan() & (old.view(bits) != new.view(bits))).any(), f"{name} writes NaN"
            else:
                assert torch.equal(old, new), f"{name} changes a {t.dtype}"

    def restore(self) -> None:
        """Copy what was written to the storage."""
        self.original[self.known[MARGIN:-MARGIN]] = self.memory[self.known]


def bytes_of(t: Tensor) -> Tensor:
    """Return all bytes of a tensor's storage."""
    storage = t.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage, 0, (storage.nbytes(),), (1,))


def tensors_in(args: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, those of no element left out."""
    if isinstance(args, Tensor) and args.numel():
        yield args
    elif isinstance(args, tuple):
        for arg in args:
            yield from tensors_in(arg)


def replace_tensors(args: object, replace) -> object:
    """Return nested tuples with replace(tensor) in place of each tensor that `tensors_in` yields."""
    if isinstance(args, tuple):
        found = [replace_tensors(arg, replace) for arg in args]
        return type(args)(*found) if hasattr(args, "_fields") else tuple(found)
    return replace(args) if isinstance(args, Tensor) and args.numel() else args


@contextlib.contextmanager
def guarding() -> Iterator[list[str]]:
    """Give every launch copies of its tensors with canaries around them and between their elements, and check them
    after it: no canary is overwritten, nor an element that had been written before, and none becomes NaN, as one does
    that was computed from a canary. In the interpreter, no load may find NaN: what nobody has written, or a canary,
    whatever becomes of it. No tensor of a call may hold NaN. The names of what runs are yielded.
    """
    original, names = launch.launch, []

    def guarded(kernel, grid, *args, **options):
        name, storages = kernel.fn.__name__, {}
        for t in tensors_in(args):
            storages.setdefault(t.untyped_storage().data_ptr(), []).append(t)
        fences = {pointer: Fence(tensors) for pointer, tensors in storages.items()}

        def fence(t):
            found = fences[t.untyped_storage().data_ptr()]
            return found.view(t, found.memory)

        original(kernel, grid, *replace_tensors(args, fence), **options)
        place = IN_PLACE.get(name)
        in_place = {t.untyped_storage().data_ptr() for t in (() if place is None else tensors_in(args[place]))}
        for pointer, one in fences.items():
            one.check(name, pointer in in_place)
            one.restore()
        names.append(name)

    with mock.patch.object(launch, "launch", guarded), loads_checked():
        yield names


@contextlib.contextmanager
def loads_checked() -> Iterator[None]:
    """Let every load of the interpreter fail that finds NaN, or in a mask what is neither True nor False."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    original = builder.create_masked_load

    def load(ptrs, mask, *args):
        result = original(ptrs, mask, *args)
        found = result.data[np.broadcast_to(mask.data, result.data.shape)]
        assert not is_canary(found, result.dtype.scalar.is_bf16()).any(), "a load of what nobody has written"
        return result

    with mock.patch.object(builder, "create_masked_load", load):
        yield


def is_canary(values: np.ndarray, bf16: bool) -> np.ndarray:
    """Tell which values are NaN, or of integers, which are masks here, neither 0 nor 1. bf16: they are its bits."""
    if bf16:
        return (values & 0x7FFF) > 0x7F80
    return np.isnan(values) if values.dtype.kind == "f" else (values != 0) & (values != 1)
