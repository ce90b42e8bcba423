"""Calls of all that has kernels, and digests of their results: `python tests/digests.py cpu 2 5x40 eager triton`."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a command
from helpers import ALGORITHMS, Case, Inputs, inputs, run

import daam

Results = dict[str, Tensor]
# columns and rows on chip, streamed columns
CASES = (Case((3, 24, 9), 1, heads=8), Case((5, 40), -1), Case((3, 300, 2), 1))
ROWS = ("y", "weights", "gate", "weights0", "weights1", "dx")  # results of which a batch has those of its rows


def permute_rows(t: Tensor | None, order: Tensor | None) -> Tensor | None:
    """Return a tensor with the rows of its batch in an order, if there are both."""
    return t if t is None or order is None else t[order.to(t.device)]


def attend(case: Case, backend: str, device: str, order: Tensor | None = None) -> Results:
    """Return the results of a case, of its rows in an order."""
    given = inputs(case, torch.float32, device=device)
    x, mask, *grads = (permute_rows(t, order) for t in (given.x, given.mask, given.grad_y, given.grad_weights))
    return run(case, Inputs(x, given.params, mask, *grads), backend)


def attend_layers(stable: bool, backend: str, device: str, order: Tensor | None = None) -> Results:
    """Return the results of layers of a block, in one launch where there are kernels."""
    generator = torch.Generator().manual_seed(0)
    x, grad_y = (permute_rows(torch.randn(4, 24, 5, generator=generator), order).to(device) for _ in range(2))
    params = [(torch.rand(2, n, generator=generator) + 0.2).to(device).requires_grad_() for n in (2, 3, 2, 3)]
    leaves = [x.requires_grad_(), *params]
    y, weights = daam.density_block(
        x, params[:2], params[2:], stable=stable, recompute=True, return_weights=True, backend=backend
    )
    grads = torch.autograd.grad(y, leaves, grad_y)
    return {"y": y, "weights0": weights[0], "weights1": weights[1], "dx": grads[0]} | name_gradients(grads[1:])


def gate(backend: str, device: str, order: Tensor | None = None) -> Results:
    """Return the results of the density gate."""
    generator, module = torch.Generator().manual_seed(0), daam.DensityGate(9, 3, backend=backend)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x, grad_y = (permute_rows(torch.randn(4, 9, 41, generator=generator), order).to(device) for _ in range(2))
    y, found = module.to(device)(x.requires_grad_())
    dx, *grads = torch.autograd.grad([y, found], [x, *module.parameters()], [grad_y, found.detach()])
    return {"y": y, "gate": found, "dx": dx} | name_gradients(grads)


def name_gradients(grads: list[Tensor]) -> Results:
    """Return gradients of parameters by name."""
    return {f"d_{i}": t for i, t in enumerate(grads)}


CALLS: dict[str, Callable[..., Results]] = {
    **{
        str(case): functools.partial(attend, case)
        for case in (case.but(algorithm=name) for name in ALGORITHMS for case in CASES)
    },
    "layers": functools.partial(attend_layers, False),
    "stable layers": functools.partial(attend_layers, True),
    "gated": gate,
}


def digest(results: Results) -> str:
    """Return the SHA-256 of all bits of some results and of their names, shapes and strides."""
    found = hashlib.sha256()
    for name, t in results.items():
        found.update(f"{name} {tuple(t.shape)} {t.stride()}".encode())
        found.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests(backends: list[str], device: str, word: str) -> dict[str, str]:
    """Return the digest of every call whose name has a word in it, on some backends."""
    chosen = {name: call for name, call in CALLS.items() if word in name}
    return {
        f"{name}, {backend}": digest(call(backend, device)) for backend in backends for name, call in chosen.items()
    }


if __name__ == "__main__":
    place, threads, part, *names = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if os.environ.get("TRITON_INTERPRET") == "1":
        import conftest

        conftest.hasten_interpreter()
    print(json.dumps(digests(names, place, part)))
