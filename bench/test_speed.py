"""Time and memory of every algorithm, pass, shape, dtype and provider.

pytest bench --benchmark-only [-k "sweep and forward"] [--benchmark-json results.json]
"""

import pytest

from bench import core
from bench.modules import modules
from bench.providers import PROVIDERS
from bench.results import OWN, PASSES
from bench.workloads import workloads

CASES = [
    pytest.param(workload, pass_name, name, id=f"{workload}-{pass_name}-{name}")
    for workload in (*workloads(core.DEVICE), *modules(core.DEVICE))
    for pass_name in PASSES
    for name, provider in PROVIDERS.items()
    if provider.serves(workload)
]
REPLAY = core.Replay()


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("workload", "pass_name", "provider"), CASES)
def test_speed(workload, pass_name, provider, benchmark, names, write_case):
    """Compare with the reference, then time: providers of a workload take turns, whichever test comes first."""
    if reason := PROVIDERS[provider].missing(core.DEVICE):
        pytest.skip(f"{provider}: {reason}")
    names = tuple(name for name in names if not PROVIDERS[name].missing(core.DEVICE))
    candidate = core.candidates(workload, names)[provider]
    if isinstance(candidate, Exception):
        if provider in OWN:
            raise candidate
        pytest.skip(f"{provider} is not timed: {candidate}")
    if benchmark.disabled:
        return
    times = core.samples(workload, pass_name, names)[provider]
    replayed = iter(times)
    benchmark.group = f"{workload}-{pass_name}"
    benchmark.extra_info |= core.figures(workload, pass_name, provider, names)
    benchmark.pedantic(lambda: REPLAY.pass_by(next(replayed)), rounds=len(times))
    write_case(benchmark.extra_info)
