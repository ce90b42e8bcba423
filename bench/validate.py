"""Hold the performance model (`bench/model.py`) against clocks, without a GPU: modelled and measured microseconds.

    python -m bench.validate [--tiles] [--output bench/history/model.json]
    python -m bench.validate --fit

- streams: kernels that only move memory, on an H200; from them, and from nothing else, come the constants of its
  memory: --fit prints how well others would do, best first. Of those that are best in the mean, all but equal, the
  worst stream is least wrong by the ones chosen.
- liger: norms of liger-kernel, which this project measured on an H200.
- published: norms and softmax that others measured on an H100 and a B200 (`PUBLISHED`).
- ours, with --tiles: this project's kernels in tiles that were tried on an H200: of every workload and pass the fastest
  and the slowest that spills nothing, and what was shipped. Kernels were what they were in commit 8f22c6c: for
  a fair test put its folder kernels/ in place of that of commit 0522a37, whose bench/ is the last to read its launches.

Of what spills the model knows nothing: such rows are shown, but no median counts them. The same compiler gives the same
figures. What ran on the H200 was compiled by Triton 3.6.0, and the fair test is a Python that has it; sums of several
warps are compiled to less by 3.9.0.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unittest import mock

import torch
import triton

from bench import aot, model, norms
from bench.device import streams
from bench.device.streams import Stream
from bench.gpus import GPUS, Gpu
from bench.modelled import count_unrolled, estimate, record_passes, take
from bench.workloads import Workload
from daam.kernels import host, tiles

MEASURED = Path(__file__).parent / "history" / "nvidia-h200"
DAY = "2026-11-27-3"
WORST = 6  # rows that a table shows of many
OTHERS = ("streams", "liger forward", "liger backward", "published forward", "published backward")
OURS = ("ours, one warp", "ours, several warps")


@dataclass(frozen=True)
class Row:
    """Hold what a case took, and what it is modelled to take, in microseconds; spills: the kernels' stack in bytes."""

    group: str
    case: str
    gpu: str
    us: float
    modelled: float
    spills: int = 0

    @property
    def error(self) -> float:
        """Return by how much the model is above the clock, relative to it."""
        return self.modelled / self.us - 1


def rows(with_tiles: bool) -> Iterator[Row]:
    """Yield all rows, group by group; those of this project's kernels in tiles where they are asked for."""
    others = stream_rows(GPUS["h200"]), liger_rows(), published_rows()
    return itertools.chain(*others, tile_rows() if with_tiles else ())


def read(what: str) -> list[dict]:
    """Return the lines of a file of what was measured on an H200."""
    return [json.loads(line) for line in (MEASURED / f"{DAY}-{what}.jsonl").read_text().splitlines()]


# --- Streams --------------------------------------------------------------------------------------
def stream_rows(gpu: Gpu, cases: Iterable[dict] | None = None) -> Iterator[Row]:
    """Yield the rows of the streams that were measured, or of some of them."""
    for case in read("streams") if cases is None else cases:
        one = Stream(**{field.name: case[field.name] for field in fields(Stream) if field.name in case})
        seconds = model.estimate(launch_stream(one), gpu).seconds
        yield Row("streams", case["case"], "h200", case["us"], 1e6 * model.add_launches([seconds], gpu))


def launch_stream(one: Stream) -> model.Launched:
    """Return a stream as the model takes it."""
    launch, n_tiles = compile_stream(replace(one, warps=32 * one.num_warps))
    programs = GPUS["h200"].multiprocessors * one.warps // one.num_warps
    turns = launch.turns * n_tiles / programs
    return replace(launch, programs=programs, turns=turns)


@functools.cache
def compile_stream(one: Stream) -> tuple[model.Launched, int]:
    """Return a stream as the model takes it, one tile a program, and its tiles: one for all numbers of programs."""
    matrices = (torch.empty(1, dtype=torch.float16, device="meta") for _ in range(3))
    with aot.recording_triton() as made:
        streams.launch(one, *matrices, torch.empty(1, device="meta"), streams.MULTIPROCESSORS)
    (recorded,) = made
    compiled = aot.compile_for(GPUS["h200"].target, recorded)
    code, nbytes = compiled.instructions, one.mib << 20
    unrolled = count_unrolled(code, one.reads * 32 * one.num_warps * one.thread, one.num_warps)
    launch = take(recorded, compiled, code, 1 / unrolled, one.reads * nbytes, one.writes * nbytes, run=one.run)
    return launch, nbytes // (32 * one.num_warps * one.thread)


def print_fits() -> None:
    """Print the mean, median and worst error of all streams for constants around those of the H200, best first."""
    found = []
    for latency, sharpness, l1 in itertools.product((380, 400, 420, 440, 460), (1.75, 2.0, 2.5, 3.0), (8, 16, 24, 32)):
        gpu = replace(GPUS["h200"], latency=latency, sharpness=sharpness, l1=l1)
        errors = [abs(row.error) for row in stream_rows(gpu)]
        found.append((statistics.mean(errors), statistics.median(errors), max(errors), latency, sharpness, l1))
    print(" mean median  worst latency sharpness l1")
    for mean, median, worst, latency, sharpness, l1 in sorted(found):
        print(f"{mean:5.1%} {median:6.1%} {worst:6.1%} {latency:7} {sharpness:9} {l1:2}")


# --- Norms ----------------------------------------------------------------------------------------
def liger_rows(cases: Iterable[dict] | None = None) -> Iterator[Row]:
    """Yield the rows of liger-kernel's norms that were measured, or of some of them."""
    found = read("norms") if cases is None else cases
    for which, case in itertools.product(("forward", "backward"), found):
        name = f"{case['kind']} norm, {case['m']} x {case['n']}, {which}"
        steps = norms.liger(case["kind"], case["m"], case["n"], GPUS["h200"])[which]
        yield _norm_row(f"liger {which}", name, "h200", case[which], steps)


def _norm_row(group: str, name: str, gpu: str, us: float, steps: list[norms.Step]) -> Row:
    """Return the row of a pass of a norm."""
    spills = norms.count_spills(steps, GPUS[gpu])
    return Row(group, name, gpu, us, norms.estimate(steps, GPUS[gpu]), spills)


# GPU, kernel, rows and columns in bf16, microseconds, source. Where GB/s were published they count each tensor once; of
# TileGym's the number of rows is not said, of quack's neither rows nor columns, but that these are more than 4096:
# taken here for 2048, and for 16384 x 8192. TileGym's and quack's kernels are not in Triton, Fast-LLM's are others than
# those here.
_NARROW = ((32768, 1024, 309), (16384, 2048, 619), (8192, 4096, 253), (4096, 8192, 286), (2048, 16384, 371))
_QUACK = 2 * norms.ITEM * 16384 * 8192 / 3.0e6
PUBLISHED = [
    *(("h100", "rms forward", m, 4096, us, "Liger-Kernel #1462") for m, us in ((8192, 51.97), (2048, 18.9), (1, 6.1))),
    ("b200", "rms forward", 8192, 4096, 29.0, "Liger-Kernel #1462"),
    *(
        ("b200", "rms forward", 2048, 1024 << k, us, "tritonbench #1130")
        for k, us in enumerate((4.8, 8.2, 13.2, 23.2, 58.3, 91.9))
    ),
    ("h100", "rms forward", 16384, 8192, _QUACK, "quack"),
    ("h100", "softmax forward", 16384, 8192, _QUACK, "quack"),
    *(
        ("b200", "rms backward", 2048, 1024 << k, 3 * norms.ITEM * 2048 * (1024 << k) / speed / 1e3, "TileGym #29")
        for k, speed in enumerate((1537, 2280, 2813, 3641, 3917))
    ),
    *(("h100", "layer both", m, n, us, "Fast-LLM #499") for m, n, us in _NARROW),
]


def published_rows() -> Iterator[Row]:
    """Yield the rows of what others measured; forward passes, which read once, apart from the others."""
    for name, kernel, m, n, us, source in PUBLISHED:
        kind, which = kernel.split()
        if kind == "rms":
            steps = norms.liger(kind, m, n, GPUS[name])[which]
        else:
            steps = (norms.softmax if kind == "softmax" else norms.layer_norm)(m, n, GPUS[name])
        group = "published forward" if which == "forward" else "published backward"
        word = {"rms": "rms norm", "layer": "layer norm", "softmax": "softmax"}[kind]
        passes = "forward and backward" if which == "both" else which
        yield _norm_row(group, f"{word}, {m} x {n}, {passes} ({source})", name, us, steps)


# --- This project's kernels -----------------------------------------------------------------------
_TILE = re.compile(
    r"(\w+)-(\w+)-([\dx]+)-axis(\d)-heads(\d+)-gaussians(\d+)-(\w+)-(forward|backward)-"
    r"(\d+)x(\d+)x(\d+), (\d+) warps(-shipped)?"
)


def tile_rows() -> Iterator[Row]:
    """Yield the rows of tiles: of every workload and pass the fastest and the slowest that spills nothing, and what was
    shipped.
    """
    passes: dict[str, list[dict]] = {}
    for case in read("tiles"):
        passes.setdefault(re.sub(r"ward-.*", "ward", case["case"]), []).append(case)
    for cases in passes.values():
        cases.sort(key=lambda case: case["us"])
        found = functools.cache(lambda i, cases=cases: tile_row(**cases[i]))
        chosen = {next((i for i in places if not found(i).spills), None) for places in _from_both_ends(len(cases))}
        chosen |= {i for i, case in enumerate(cases) if case["case"].endswith("shipped")}
        yield from (found(i) for i in sorted(chosen - {None}))


def _from_both_ends(n: int) -> tuple[range, range]:
    """Return the places of a list of n, from its first on and from its last."""
    return range(n), range(n - 1, -1, -1)


def tile_row(case: str, us: float, **_) -> Row:
    """Return the row of a pass in a tile, by the name that it was measured under."""
    family, algorithm, shape, axis, heads, gaussians, dtype, which, *numbers, _shipped = _TILE.fullmatch(case).groups()
    workload = Workload(
        family, algorithm, tuple(map(int, shape.split("x"))), int(axis), int(heads), int(gaussians), dtype
    )
    rows_, n_blocks, columns, num_warps = map(int, numbers)
    p = torch.empty(workload.params_shape, device="meta")
    with planning(tiles.Tile(rows_, columns, num_warps, n_blocks)):
        made = record_passes(algorithm, workload.x, p, None, workload.axis, workload.feature_axis, full=False)[which]
    gpu = GPUS["h200"]
    spills = max(aot.compile_for(gpu.target, one).stack for one in made)
    group = OURS[0] if num_warps == 1 else OURS[1]
    seconds = [one.seconds for _, one in estimate(made, gpu)]
    return Row(group, case, "h200", us, 1e6 * model.add_launches(seconds, gpu), spills)


@contextlib.contextmanager
def planning(tile: tiles.Tile) -> Iterator[None]:
    """Plan passes in a tile until the block ends, streamed where it does not hold a chunk, whatever budgets say."""

    def is_streamed(budget, x: torch.Tensor, axis: int, heads: int, feature_axis: int | None, masked: bool) -> bool:
        return tile.length < x.shape[axis] // heads

    host.plan.cache_clear()
    with mock.patch.object(tiles, "find_tile", lambda *_, **__: tile), mock.patch.object(tiles, "streams", is_streamed):
        yield
    host.plan.cache_clear()


# --- What is written ------------------------------------------------------------------------------
def summarise(found: list[Row]) -> dict[str, float]:
    """Return the number of rows, and the median and the worst error of those that spill nothing."""
    errors = [abs(row.error) for row in found if not row.spills]
    return {"rows": len(found), "median": round(statistics.median(errors), 3), "worst": round(max(errors), 3)}


def write(found: dict[str, list[Row]], path: Path) -> None:
    """Write all rows as JSON, one a line."""
    lines = [f'"triton": "{triton.__version__}"']
    for group, members in found.items():
        texts = [json.dumps(describe(row)) for row in members]
        summary = json.dumps(summarise(members))[1:-1]
        lines.append(f'"{group}": {{{summary}, "cases": [\n' + ",\n".join(texts) + "\n]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + ",\n".join(lines) + "}\n")


def describe(row: Row) -> dict[str, str | float]:
    """Return what a file keeps of a row."""
    figures = {"us": round(row.us, 2), "modelled": round(row.modelled, 2), "error": round(row.error, 3)}
    return {"case": row.case, "gpu": row.gpu, **figures} | ({"spills": row.spills} if row.spills else {})


def print_tables(found: dict[str, list[Row]]) -> None:
    """Print a table a group in Markdown: all of its rows, or the worst of many."""
    for group, members in found.items():
        summary = summarise(members)
        shown = members
        if len(members) > 4 * WORST:
            shown = sorted((row for row in members if not row.spills), key=lambda row: -abs(row.error))[:WORST]
        print(f"\n{group}: {summary['rows']} rows, median {summary['median']:.0%}, worst {summary['worst']:.0%}\n")
        print("| case | GPU | us | modelled | error |\n|---|---|---|---|---|")
        for row in shown:
            spilled = f", spills {row.spills} bytes" if row.spills else ""
            figures = (f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in (row.us, row.modelled))
            print(f"| {row.case}{spilled}", GPUS[row.gpu].name, *figures, f"{row.error:+.0%} |", sep=" | ")


def main() -> None:
    """Run the command line: print tables, and write all rows where --output says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write all rows as JSON")
    parser.add_argument("--tiles", action="store_true", help="with this project's kernels in tiles that were tried")
    parser.add_argument("--fit", action="store_true", help="print what streams make of other constants, and no table")
    args = parser.parse_args()
    if args.fit:
        print_fits()
        return
    found: dict[str, list[Row]] = {group: [] for group in (*OTHERS, *(OURS if args.tiles else ()))}
    for row in rows(args.tiles):
        found[row.group].append(row)
    print_tables(found)
    if args.output:
        write(found, args.output)


if __name__ == "__main__":
    main()
