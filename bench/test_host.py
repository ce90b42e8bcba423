"""Time that a call takes on the host, without its launches and with them; with or without a GPU. The aim with launches
is 30 µs forward and 60 µs backward.

pytest bench/test_host.py --benchmark-only [--benchmark-json results.json]
"""

import pytest

from bench import core, host
from bench.providers import PROVIDERS
from bench.stub_driver import UnavailableError

CASES = [
    pytest.param(workload, pass_name, launcher, id=f"{workload}-{pass_name}{suffix}")
    for workload in host.WORKLOADS
    for pass_name in host.PASSES
    for launcher, suffix in (("nothing", ""), ("driver", "-driver"))
]
REPLAY = core.Replay()


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("workload", "pass_name", "launcher"), CASES)
def test_host(workload, pass_name, launcher, benchmark, write_case):
    """Time a call and the copy in turns. Nothing is right or wrong: what outputs hold nobody wrote."""
    pytest.importorskip("triton")
    try:
        with host.LAUNCHERS[launcher]():
            if reason := PROVIDERS["triton"].missing(core.DEVICE):
                pytest.skip(f"triton: {reason}")
    except UnavailableError as reason:
        pytest.skip(f"launches need a GPU or a stub of its driver: {reason}")
    if benchmark.disabled:
        return
    times, copy = host.samples(workload, pass_name, launcher)
    replayed = iter(times)
    benchmark.group = f"host-{pass_name}"
    benchmark.extra_info |= host.figures(workload, pass_name, launcher, times, copy)
    benchmark.pedantic(lambda: REPLAY.pass_by(next(replayed)), rounds=len(times))
    write_case(benchmark.extra_info)
