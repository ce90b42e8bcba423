"""One process of the plan: `python -m bench.device.part correct --out FOLDER --shard 0/1 …`. plan.py starts them."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from pathlib import Path

from bench.device import machine
from bench.device.session import Job, Session, run_jobs

# the module of each part, and the function there that lists its jobs: a process imports no more than it needs
PARTS = {
    "info": ("info", "jobs"),
    "correct": ("correct", "jobs"),
    "bits": ("bits", "jobs"),
    "warm": ("times", "warm_jobs"),
    "time": ("times", "jobs"),
    "host": ("calls", "jobs"),
    "counters": ("counters", "jobs"),
    "profile": ("counters", "profile_jobs"),
    "sweep": ("sweep", "jobs"),
    "streams": ("streams", "jobs"),
    "sanitizer": ("sanitizer", "jobs"),
    "sanitized": ("sanitizer", "sanitized_jobs"),
}


def jobs(part: str, session: Session) -> list[Job]:
    """Return the jobs of a part."""
    module, name = PARTS[part]
    return getattr(importlib.import_module(f"bench.device.{module}"), name)(session)


def main() -> None:
    """Run the command line: do one process's share of a part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--call", default="first")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "emulated", "none"))
    parser.add_argument("--began", type=float, default=0.0)
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--only", default="")
    parser.add_argument("--progress", type=Path)
    args = parser.parse_args()
    k, n = map(int, args.shard.split("/"))
    session = Session(args.call, args.out, args.device, args.began, args.until, (k, n), args.only, args.progress)
    without_gpu = session.device != "cuda"
    with machine.emulation(session.device == "emulated") if without_gpu else contextlib.nullcontext():
        run_jobs(session, args.part, jobs(args.part, session))


if __name__ == "__main__":
    main()
