"""Time that a call takes on the host, its launches doing nothing; with or without a GPU. The aim is 25 µs forward.

pytest bench/test_host.py --benchmark-only [--benchmark-json results.json]
"""

import pytest

from bench import core, host
from bench.providers import PROVIDERS

CASES = [
    pytest.param(workload, which, id=f"{workload}-{which}") for workload in host.WORKLOADS for which in host.PASSES
]
REPLAY = core.Replay()


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("workload", "which"), CASES)
def test_host(workload, which, benchmark, write_case):
    """A call and the copy take turns. Nothing is right or wrong: what outputs hold nobody wrote."""
    pytest.importorskip("triton")
    with host.launching_nothing():
        if why := PROVIDERS["triton"].missing(core.DEVICE):
            pytest.skip(f"triton: {why}")
    if benchmark.disabled:
        return
    times, copy = host.samples(workload, which)
    replayed = iter(times)
    benchmark.group = f"host-{which}"
    benchmark.extra_info |= host.figures(workload, which, times, copy)
    benchmark.pedantic(lambda: REPLAY.pass_by(next(replayed)), rounds=len(times))
    write_case(benchmark.extra_info)
