"""The command: `python -m bench.device first second --out FOLDER`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench.device import machine
from bench.device.plan import PLAN, format_plan, run_call
from bench.device.session import Session


def main() -> int:
    """Run calls, or go through them without a GPU; return 1 where anything is wrong, 2 where no call can run."""
    parser = argparse.ArgumentParser(prog="bench.device", description=__doc__)
    parser.add_argument("calls", nargs="+", choices=PLAN)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument(
        "--only",
        default="",
        help="a regular expression that names of what is timed and swept must match; --dry: of all cases",
    )
    parser.add_argument("--dry", action="store_true", help="compile its kernels and emulate some of it, without a GPU")
    args = parser.parse_args()
    if args.dry:
        from bench.device.prepare import dry

        return dry(args.calls, args.only)
    if lacking := machine.find_missing():
        print(f"bench.device: {lacking}", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(format_plan(args.calls), flush=True)
    machine.set_environment(os.cpu_count() or 1)
    print(machine.unpack(), flush=True)
    passed = [run_call(Session(call, out, only=args.only)) for call in args.calls]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
