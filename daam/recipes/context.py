"""Train the DAT on sequences that are too long for one process: density attention along an axis that is spread out.

Each of --context processes holds a piece of every sequence, (batch, layers, positions, features), and every such group
of processes a part of each batch: with torchrun, processes / context parts. Attention along the positions exchanges
numbers of its heads (`group`), means over positions are summed over a group, and a `DATDecoder` classifies these. All
of it is under DistributedDataParallel, which averages gradients over all processes, where those of an axis that is
spread out are parts of a sum: `sum_over` makes them as many times larger as a group has processes. So the losses are
those of one process, but for rounding.

    python -m daam.recipes.context
    torchrun --nproc-per-node=4 -m daam.recipes.context --context 2

Sequences are made up: values have a long tail above their mean in one class, and below it in the other, and no mean
without weights tells them apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import daam
from daam.pieces import AxisPieces, Group, count_processes, resolve
from daam.recipes import processes
from daam.recipes.arguments import positive
from daam.recipes.errors import Parser, UserError, guarded

LAYERS, FEATURES, BATCH = 6, 32, 8


class LongTransformer(nn.Module):
    """Classify sequences of all layers of an encoder, (batch, layers, positions, features), pieces of which are in the
    processes of a group: density attention along the positions, their means, and a `daam.DATDecoder`.

    n_positions: of all pieces.
    """

    def __init__(self, n_positions: int, heads: int, group: Group = None):
        super().__init__()
        self.attention = daam.MultiHeadDAAM(FEATURES, heads, norm_axis=2, group=group)
        self.decoder = daam.DATDecoder(LAYERS, FEATURES, 2, conv_channels=16)
        self.n_positions = n_positions

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, (batch, 2), the same in all processes of a group."""
        sums = self.attention(x).sum(2)
        if self.attention.group is not None:
            sums = sum_over(sums, self.attention.group)
        return self.decoder(sums / self.n_positions)


def sum_over(sums: Tensor, group: AxisPieces) -> Tensor:
    """Return the sums over a group's processes, whose losses are all the same function of them: so the gradient of each
    process's share is that of the sum, times the processes that have it.
    """
    total = sums.detach().clone()
    torch.distributed.all_reduce(total, group=resolve(group.group))
    return total + (sums - sums.detach()) * count_processes(group.group)


def make_batch(step: int, n_positions: int) -> tuple[Tensor, Tensor]:
    """Return sequences of a step, (BATCH, LAYERS, n_positions, FEATURES), and their classes, the same everywhere."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(BATCH) % 2
    x = torch.empty(BATCH, LAYERS, n_positions, FEATURES).exponential_(generator=generator) - 1
    return x * (2 * labels - 1)[:, None, None, None], labels


def train(mesh: DeviceMesh | None, n_positions: int, heads: int, steps: int, rate: float) -> list[float]:
    """Return the loss of each step. mesh: of dimensions data and context; None for one process."""
    torch.manual_seed(0)
    rows, columns, group = slice(None), slice(None), None
    if mesh is not None:
        rows = _cut(BATCH, mesh["data"])
        columns, group = _cut(n_positions, mesh["context"]), mesh["context"]
    model: nn.Module = LongTransformer(n_positions, heads, group)
    model = model if mesh is None else DistributedDataParallel(model)
    optimiser, losses = torch.optim.Adam(model.parameters(), rate), []
    for step in range(steps):
        x, labels = make_batch(step, n_positions)
        loss = cross_entropy(model(x[rows, :, columns]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mean = loss.detach().clone()
        if mesh is not None:
            torch.distributed.all_reduce(mean, torch.distributed.ReduceOp.SUM)
            mean /= mesh.size()
        losses.append(mean.item())
    return losses


def _cut(size: int, mesh: DeviceMesh) -> slice:
    """Return what this process has of so many: the first ones have one more where they do not divide."""
    n, rank = mesh.size(), mesh.get_local_rank()
    bounds = list(itertools.accumulate((size // n + (i < size % n) for i in range(n)), initial=0))
    return slice(bounds[rank], bounds[rank + 1])


@partial(guarded, several=True)
def main(argv: list[str] | None = None) -> None:
    """Run the command line: train, and print the loss of each step."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=positive, default=1, help="processes that share a sequence")
    parser.add_argument("--positions", type=positive, default=2050, help="of a sequence; heads must divide them")
    parser.add_argument("--heads", type=positive, default=2, help="of density attention along the positions")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, help="file for the losses, as JSON")
    given = parser.parse_args(argv)
    with processes.joined("cpu"):
        mesh, n = None, processes.count()
        if n % given.context:
            raise UserError(f"--context is {given.context}, expected a divisor of the {n} processes")
        if BATCH % (n // given.context):
            raise UserError(f"{n // given.context} parts do not divide a batch of {BATCH} sequences")
        if n > 1:
            mesh = init_device_mesh("cpu", (n // given.context, given.context), mesh_dim_names=("data", "context"))
        losses = train(mesh, given.positions, given.heads, given.steps, given.rate)
        for step, loss in enumerate(losses):
            print(f"step {step + 1}: loss {loss:.4f}")
        if given.output is not None and processes.rank() == 0:
            given.output.write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
