"""Processes that hold pieces of an axis: what each of them checks, and how they are forked (`forked.py`)."""

import contextlib
import functools
import itertools
import sys
import traceback
from unittest import mock

import torch
import torch.distributed as dist
from forked import finish, start
from helpers import attend, find_scales, inputs, oracle, within

import daam


def run(world, store, function, *args):
    """Call function(rank, *args) in so many forked processes of a gloo group, and assert that all end well."""

    def one(rank):
        try:
            dist.init_process_group(
                "gloo", store=dist.FileStore(str(store / "store"), world), rank=rank, world_size=world
            )
            function(rank, *args)
            dist.destroy_process_group()
        except BaseException:  # the child would print no traceback of an assertion
            traceback.print_exc()
            sys.stdout.flush()
            raise

    outputs = [store / f"{rank}.txt" for rank in range(world)]
    status = finish(start([functools.partial(one, rank) for rank in range(world)], outputs))
    assert status == [0] * world, "\n".join(path.read_text()[-3000:] for path in outputs)


@contextlib.contextmanager
def counted():
    """Yield a list that gets the number of elements of every exchange of this process."""
    gather, found = dist.all_gather, []

    def count(outputs, numbers, **options):
        found.append(numbers.numel())
        return gather(outputs, numbers, **options)

    with mock.patch.object(dist, "all_gather", count):
        yield found


def piece(t, axis, sizes, rank):
    """Return the piece of a tensor that a process holds."""
    first, last = list(itertools.accumulate(sizes, initial=0))[rank : rank + 2]
    return t[(slice(None),) * axis + (slice(first, last),)]


def attend_pieces(rank, case, given, sizes, backend, group):
    """Return this process's y, weights and gradients, by name; those of the parameters summed over all processes."""
    axis = case.positive_axis
    cut = functools.partial(piece, axis=axis, sizes=sizes, rank=rank)
    leaves = [t.detach().clone().requires_grad_() for t in (cut(given.x), *given.params)]
    mask = None if given.mask is None else cut(given.mask)
    out = attend(case, *leaves, mask, backend=backend, group=group)
    outputs = dict(zip(("y", "weights"), out if case.weights else (out,), strict=False))
    grads = [cut(t) for t in (given.grad_y, given.grad_weights)[: len(outputs)]]
    found = torch.autograd.grad(list(outputs.values()), leaves, grads)
    for grad in found[1:]:
        dist.all_reduce(grad)
    return outputs | dict(zip(case.gradients, found, strict=True))


def check(rank, case, sizes, backend="eager", dtype=torch.float64, bound=1e-11, group=None, given=None):
    """Check a case whose axis is spread over processes against float64 of the formula on all of it."""
    given = given or inputs(case, dtype)
    expected, group = oracle(case, given), group or daam.AxisPieces(dist.group.WORLD, sizes)
    scales = find_scales(expected)
    dtypes = dict(zip(case.gradients[1:], (p.dtype for p in given.params), strict=True))
    for name, result in attend_pieces(rank, case, given, sizes, backend, group).items():
        wanted = expected[name]
        if name not in dtypes:
            wanted = piece(wanted, case.positive_axis, sizes, rank)
        assert (result.shape, result.dtype) == (wanted.shape, dtypes.get(name, dtype)), name
        difference = (result.detach().double() - wanted).abs().max().item() if wanted.numel() else 0.0
        within(difference / scales[name], bound, f"{name} of {case} in {sizes} on {backend}")
