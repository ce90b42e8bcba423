"""Preparation without a GPU: every kernel of the plan is compiled for sm_90, to be taken along.

    python -m bench.device.prepare      # with the Python, torch and Triton that the GPU's machine has

It leaves .gpu/ in the project's root, which git ignores: the compiled kernels, packed, and the published package.
Sources must then stay as they are: the lines that a kernel stands on are part of what Triton finds it by.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

from bench import core
from bench.device import machine, summary
from bench.device.cases import correct_cases, representative
from bench.device.plan import Part, format_plan, run_part
from bench.device.session import RESULTS, ROOT, Session, read

# parts that launch kernels of ours
COMPILED = ("correct", "bits", "time", "host", "counters", "sweep", "streams", "sanitizer")
PROCESSES = 2
HOURS = 12 * 3600
PEER = "gaussian_adaptive_attention"
BUILD = ROOT / "build" / "gpu"


def run(name: str, call: str, device: str, only: str = "") -> bool:
    """Run a part here, in as many processes as there are and for as long as it takes; return whether all is well."""
    session = Session(call, BUILD, device, time.time(), only=only)
    run_part(session, Part(name, 0, HOURS, HOURS, PROCESSES))
    return not any(map(summary.is_wrong, summary.rows_of(session)))


def start() -> None:
    """Make the folders, one of kernels for each state of the sources, and set what processes find."""
    machine.set_environment(PROCESSES, BUILD / f"triton-{machine.fingerprint()}")
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, "log.txt"):
        (BUILD / name).unlink(missing_ok=True)


def dry(calls: list[str], only: str) -> int:
    """Print the plan, compile what its own parts launch, emulate cases of every regime; return 1 where one fails."""
    print(format_plan(calls), flush=True)
    start()
    passed = [run(part, "compiled", "none", only) for part in COMPILED]
    print(f"emulated are {len(representative())} of {len(correct_cases())} cases", flush=True)
    passed.append(run("correct", "emulated", "emulated", only))
    if only and not read(BUILD):
        print(f"no case matches {only}")
        return 1
    return int(not all(passed))


def main() -> int:
    """Compile all, run the kernel tests as compiled code, and pack; return 1 where a kernel does not compile."""
    start()
    passed = [run(part, "compiled", "none") for part in COMPILED]
    run("tests", "emulated", "emulated")  # what fails there fails on a GPU too, and is said
    machine.PREPARED.mkdir(exist_ok=True)
    pack(Path(os.environ["TRITON_CACHE_DIR"]))
    peer = importlib.util.find_spec(PEER)
    if peer:
        shutil.copytree(Path(peer.origin).parent, machine.SITE / PEER, dirs_exist_ok=True)
    about = {**core.about(), "fingerprint": machine.fingerprint(), "published package": bool(peer)}
    machine.ABOUT.write_text(json.dumps(about) + "\n")
    print(*(f"{path} {path.stat().st_size / 2**20:.1f} MiB" for path in (machine.CACHE, machine.ABOUT)), sep="\n")
    return int(not all(passed))


def pack(folder: Path) -> None:
    """Pack what Triton needs to launch a kernel: machine code, what it says of it, and the launchers."""
    with tarfile.open(machine.CACHE, "w:xz", preset=3) as archive:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".cubin", ".json", ".so"):
                archive.add(path, path.relative_to(folder))


if __name__ == "__main__":
    sys.exit(main())
