"""Count the kernels that Triton compiles for many shapes: `python -m bench.variants`, without a GPU and a compiler.

Triton compiles a kernel anew for other constants, dtypes, and integers that are 1 or multiples of 16. Its own launch
path says which launches share a kernel, up to where it would compile one.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator
from unittest import mock

import torch
import triton

from bench.aot import Launch, Offline, find_keywords
from bench.configurations import DTYPES
from bench.modelled import record_passes
from daam.kernels.algorithms import ALGORITHMS

# Tensors by name: their shape of a length, the axis that is normalised, and whether parameters may follow features
TENSORS = {
    "(8, n, 768), norm_axis 1": (lambda n: (8, n, 768), 1, True),
    "(4, 64, n), norm_axis 2": (lambda n: (4, 64, n), 2, False),
}


class _Counting(Offline):
    """Answer as a driver which target to compile for, of a device whose kernels are but their keys."""

    def get_current_device(self) -> str:
        return f"{self.name}, counted"


def _keep_key(kernel, key: str, _signature, device: str, *_how, **_named) -> str:
    """Keep and return a key as the compiled kernel of that key."""
    kernel.device_caches[device][0][key] = key
    return key


def find_variants(launches: Iterable[Launch], target: str = "sm_90") -> dict[str, set[str]]:
    """Return the keys of the kernels that Triton compiles for recorded launches, by the name of their function."""
    found = defaultdict(set)
    with (
        mock.patch.object(triton.runtime.driver, "_active", _Counting(target)),
        mock.patch.object(triton.JITFunction, "_do_compile", _keep_key),
    ):
        for one in launches:
            found[one.name].add(one.kernel.warmup(*one.args, **find_keywords(one, target), grid=(1,)))
    return dict(found)


def count_variants(launches: Iterable[Launch], target: str = "sm_90") -> dict[str, int]:
    """Return how many kernels Triton compiles for recorded launches, by the name of their function."""
    return {name: len(keys) for name, keys in find_variants(launches, target).items()}


def record_lengths(
    algorithm: str, tensor: str, dtype: torch.dtype, heads: int, lengths: Iterable[int]
) -> dict[str, list[Launch]]:
    """Return the launches of a "forward" and a "backward" pass on one of TENSORS of each length that the algorithm
    takes. Density attention has parameters of features where it may, the others four Gaussians.
    """
    shape_of, axis, follows = TENSORS[tensor]
    follows, found = follows and ALGORITHMS[algorithm].features, {"forward": [], "backward": []}
    for n in lengths:
        if n < heads * (2 if ALGORITHMS[algorithm].unbiased else 1) or (algorithm == "density" and n % heads):
            continue
        shape = shape_of(n)
        columns = shape[-1] if follows else 1 if algorithm == "density" else 4
        x, p = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(heads, columns, device="meta")
        passes = record_passes(algorithm, x, p, None, axis, len(shape) - 1 if follows else None, full=False)
        for name, launches in passes.items():
            found[name] += launches
    return found


def rows(algorithm: str, dtypes: Iterable[str], heads: Iterable[int], longest: int) -> Iterator[str]:
    """Yield a line a tensor, dtype, number of heads and pass: kernels of all lengths up to the longest, in all and of
    each function.
    """
    lengths = range(1, longest + 1)
    for tensor in TENSORS:
        for dtype in dtypes:
            for n_heads in heads:
                for name, launches in record_lengths(algorithm, tensor, DTYPES[dtype], n_heads, lengths).items():
                    counts = count_variants(launches)
                    each = ", ".join(f"{kernel} {count}" for kernel, count in counts.items())
                    what = f"{algorithm}, {name}, {tensor}, {dtype}, heads: {n_heads}"
                    yield f"{what:69} {sum(counts.values()):4}  {each}"


def main() -> None:
    """Print how many kernels all lengths need."""
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--algorithm", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--longest", type=int, default=2000)
    args = parser.parse_args()
    for algorithm in args.algorithm:
        for row in rows(algorithm, args.dtypes, args.heads, args.longest):
            print(row, flush=True)


if __name__ == "__main__":
    main()
