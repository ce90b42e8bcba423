"""Whole modules without a GPU: launches of their passes, recorded on the meta device, what they save for the backward
pass, and what the model makes of them.

    found = record_module(workload)     # as it goes by itself; record_module(workload, recompute=False): layer by layer
    found.forward, found.saved          # launches of ours; bytes

The module's own code runs: its operators, when they are called on meta tensors, record the launches that they would
make on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import byte_model, model
from bench.aot import Launch, recording
from bench.gpus import Gpu
from bench.modelled import Modelled, estimate
from bench.modules import ModuleWorkload
from daam.block_ops import BLOCKS
from daam.gated import GATED
from daam.ops import OPERATORS

_ROOM = ("empty", "new_empty", "empty_like", "empty_strided")  # operators of torch that make room, and launch nothing


@dataclass(frozen=True)
class Recorded:
    """Hold what a module does in a forward and a backward pass: launches of ours by pass, how many torch makes beside
    them, and the bytes that are saved in between, of each storage once and no parameters.
    """

    passes: dict[str, list[Launch]]
    others: dict[str, int]
    saved: int

    def count(self, name: str) -> int:
        """Return how many launches a pass is, "forward" or "backward"."""
        return len(self.passes[name]) + self.others[name]


class _Launching(TorchDispatchMode):
    """Run operators of ours as on a GPU, but that launches are recorded, and count those of torch that launch."""

    def __init__(self):
        super().__init__()
        self.others = 0
        operators = (*OPERATORS.values(), *BLOCKS.values(), GATED)
        self.ours: dict[object, Callable] = {one.forward_op: one._forward_triton for one in operators}
        self.ours |= {one.backward_op: one._backward_triton for one in operators}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.ours:
            with self:  # what torch does between launches of ours counts too
                return self.ours[func](*args, **kwargs or {})
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and func._schema.name.partition("::")[2] not in _ROOM:
            given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
            self.others += result.untyped_storage()._cdata not in given  # no view, or a copy where one is wanted
        return result


@contextlib.contextmanager
def _recording() -> Iterator[tuple[list[Launch], _Launching]]:
    """Record launches of ours in the list that is given, and count those of torch."""
    with recording() as launches, _Launching() as mode:
        yield launches, mode


def record_module(workload: ModuleWorkload, recompute: bool | None = None) -> Recorded:
    """Return what a module does on the Triton backend, with gradients of x and of all parameters. recompute: as
    `daam.density_block` has it.
    """
    x, grad_y = workload.x.requires_grad_(), workload.x
    module = workload.build("triton").to("meta")
    if workload.algorithm != "gate":
        module.recompute = recompute
    params = [p for p in module.parameters() if p.requires_grad]
    saved: dict[int, int] = {}
    known = {p.untyped_storage()._cdata for p in module.parameters()}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in known:
            saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _recording() as (forward, first):
        y = module(x)
    y = y[0] if isinstance(y, tuple) else y
    with _recording() as (backward, second):
        torch.autograd.grad(y, (x, *params), grad_y)
    return Recorded(
        {"forward": forward, "backward": backward}, {"forward": first.others, "backward": second.others},
        sum(saved.values()),
    )  # fmt: skip


def model_module(workload: ModuleWorkload, gpu: Gpu, recompute: bool | None = None) -> dict[str, Modelled]:
    """Return what the passes of a module are modelled to take. Launches of torch are launches that take no time by
    themselves: they add up partial sums, and change dtypes of numbers of a position.
    """
    recorded, found = record_module(workload, recompute), {}
    for name, launches in recorded.passes.items():
        estimates = [one for _, one in estimate(launches, gpu)]
        seconds = [one.seconds for one in estimates] + [0.0] * recorded.others[name]
        share = byte_model.least_bytes(workload, name) / gpu.copy / 1e9 / sum(seconds)
        limit = max(estimates, key=lambda one: one.seconds).limit
        found[name] = Modelled(1e6 * model.add_launches(seconds, gpu), share, limit)
    return found


def bound_formula(workload: ModuleWorkload, gpu: Gpu) -> dict[str, Modelled]:
    """Return the least that the passes of a module's formula take, however a compiler fuses it: a lower bound of
    torch.compile, no prediction of it.

    Assumed is an ideal fusion, which no compiler is known to find. A block reads x once and writes y once, whatever is
    between; its backward pass reads x and grad_y, finds all else anew and writes dx, and its parameters' sums over
    chunks take a second launch. A gate reads x for the sum over channels and again for the product, a launch each, and
    x and grad_y twice, with a third launch for its parameters. What is read again comes from L2 as far as that holds
    it. Launches take what memory takes, as of reads that are never waited for, and no arithmetic.
    """
    gate, size, found = workload.algorithm == "gate", float(workload.x.nbytes), {}
    passes = {"forward": [(1, 0, 0), (1, 1, 1)], "backward": [(2, 0, 0), (2, 1, 2), (0, 0, 0)]}
    if not gate:
        passes = {"forward": [(1, 1, 0)], "backward": [(2, 1, 0), (0, 0, 0)]}
    for name, launches in passes.items():
        seconds = [_time_memory(*(n * size for n in moved), gpu) for moved in launches]
        share = byte_model.least_bytes(workload, name) / gpu.copy / 1e9 / sum(seconds)
        found[name] = Modelled(1e6 * model.add_launches(seconds, gpu), share, "memory")
    return found


def _time_memory(read: float, written: float, cached: float, gpu: Gpu) -> float:
    """Return the seconds that memory takes for bytes that a launch moves, of which L2 may hold some."""
    return model.find_memory_time(model.Launched([], 32, 0, 4, 1, 1.0, read, written, cached), gpu)
