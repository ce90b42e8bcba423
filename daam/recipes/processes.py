"""Processes that share a recipe's work, as torchrun starts them: torchrun --nproc-per-node=2 -m daam.recipes.train.

Each takes its own of the shards or the parts of a run and writes their files; nothing else passes between them but the
word that all are done. So what comes out does not depend on their number, to the bit. Batches that are split among
processes would sum gradients in another order, and send them at every step. The price: a run of five parts is no faster
on more than five processes, and each process reads the data, and holds a model, for itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from daam.recipes.errors import UserError

Item = TypeVar("Item")
PATIENCE = timedelta(days=30)  # one process waits as long as another one works
TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets, beside WORLD_SIZE


def rank() -> int:
    """Return the number of this process, from 0; 0 where it is alone."""
    return distributed.get_rank() if _joined() else 0


def count() -> int:
    """Return the number of processes; 1 where this one is alone."""
    return distributed.get_world_size() if _joined() else 1


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Return the items that are this process's: every one where it is alone."""
    return items[rank() :: count()]


def wait() -> None:
    """Return when all processes are here; raise a UserError where one of them ended before."""
    if not _joined():
        return
    try:
        distributed.barrier()
    except RuntimeError:
        raise UserError("another process ended while this one waited for it: run the same command again") from None


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Make this one of the processes that torchrun started, for the block, and yield the device of this one: of "cuda"
    the GPU of its place on the machine. Only the first one prints, and of errors only that of the process that fails
    first is raised: others, which mostly fail for the same reason or for lack of that one, exit. Where nobody started
    several processes, nothing is done.

    Raises a UserError where they were not started by torchrun, or have fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size < 2 or _joined():
        yield device
        return
    if missing := [name for name in TORCHRUN if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} are not set: start several processes with torchrun"
        )
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        device = _gpu_of(device)
        torch.cuda.set_device(device)
    store, number, _ = next(distributed.rendezvous("env://", timeout=PATIENCE))
    backend = "nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    with contextlib.ExitStack() as stack:
        if number:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield device
        except BaseException:
            if not _fails_first(store):
                raise SystemExit(1) from None
            raise
    # not after an error: torchrun ends the others, which may be waiting
    sys.stdout.flush()
    distributed.destroy_process_group()


def _gpu_of(device: str) -> str:
    """Return the GPU of this process's place on its machine, of the device "cuda"."""
    place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if torch.device(device).index is not None:
        raise UserError(f"--device is {device}, expected cuda: each process takes a GPU of its own")
    if place >= gpus:
        raise UserError(f"--nproc-per-node is {place + 1} or more, but torch finds {gpus} GPUs, expected one for each")
    return f"cuda:{place}"


def _fails_first(store: distributed.Store) -> bool:
    """Return whether no other process has failed before, as far as can be told."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the process that keeps the store has ended
        return True


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
