"""Time that a call takes on the host, without its launches and with them; with or without a GPU. The aim with launches
is 30 µs forward and 60 µs backward.

pytest bench/test_host.py --benchmark-only [--benchmark-json results.json]
"""

import pytest

from bench import core, host
from bench.providers import PROVIDERS
from bench.stub_driver import UnavailableError

CASES = [
    pytest.param(workload, which, launcher, id=f"{workload}-{which}" + ("-driver" if launcher == "driver" else ""))
    for workload in host.WORKLOADS
    for which in host.PASSES
    for launcher in host.LAUNCHERS
]
REPLAY = core.Replay()


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("workload", "which", "launcher"), CASES)
def test_host(workload, which, launcher, benchmark, write_case):
    """A call and the copy take turns. Nothing is right or wrong: what outputs hold nobody wrote."""
    pytest.importorskip("triton")
    try:
        with host.LAUNCHERS[launcher]():
            if why := PROVIDERS["triton"].missing(core.DEVICE):
                pytest.skip(f"triton: {why}")
    except UnavailableError as why:
        pytest.skip(f"launches need a GPU or a stub of its driver: {why}")
    if benchmark.disabled:
        return
    times, copy = host.samples(workload, which, launcher)
    replayed = iter(times)
    benchmark.group = f"host-{which}"
    benchmark.extra_info |= host.figures(workload, which, launcher, times, copy)
    benchmark.pedantic(lambda: REPLAY.pass_by(next(replayed)), rounds=len(times))
    write_case(benchmark.extra_info)
