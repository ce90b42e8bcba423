"""Load: threads on one module, processes with one cache of kernels, thousands of calls, shapes that never repeat."""

import contextlib
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import ALGORITHMS, Case, attend, inputs
from torch._dynamo.testing import CompileCounter

import daam
from daam import block
from daam.backend import interpreting
from daam.kernels import algorithms, launch

N_THREADS, N_PROCESSES = 16, 4
MODULES = {
    "density": lambda **how: daam.MultiHeadDAAM(4, 2, **how),
    "mixture": lambda **how: daam.MultiHeadDensityAdaptiveAttention(1, 2, 3, **how),
    "stable": lambda **how: daam.StableMultiHeadDensityAttention(1, 2, 3, **how),
    "block": lambda **how: daam.DensityBlock([1, 1], [2, 2], [3, 4], 2, **how),
    "gate": lambda **how: daam.DensityGate(6, 3, **how),
    "decoder": lambda **how: daam.DATDecoder(6, 4, 3, num_heads=2, conv_channels=2, **how),
}
not_interpreted = pytest.mark.skipif(interpreting(), reason="the interpreter compiles nothing")


def draw(i, batch=2, device="cpu"):
    """Return the x of a thread, (batch, 6, 4)."""
    return torch.randn(batch, 6, 4, generator=torch.Generator().manual_seed(i)).to(device).requires_grad_()


def both_passes(module, x):
    """Return what a module gives for x, and the gradients of x and of all parameters."""
    found = module(x)
    found = found if isinstance(found, tuple) else (found,)
    return [*found, *torch.autograd.grad(sum(t.square().sum() for t in found), [x, *module.parameters()])]


def check_threads(modules, rounds, device="cpu"):
    """Check that threads which call modules at once, forward and backward, find the bits of one thread."""
    modules = [module.to(device).eval() for module in modules]
    expected = [[both_passes(module, draw(i, device=device)) for module in modules] for i in range(N_THREADS)]
    together = threading.Barrier(N_THREADS)

    def work(i):
        torch.set_num_threads(1)  # as the fixture did for the first thread, whose bits they are compared with
        together.wait(60)
        for _ in range(rounds):
            for k in range(len(modules)):
                place = (i + k) % len(modules)  # not all at the same module
                found = both_passes(modules[place], draw(i, device=device))
                assert all(map(torch.equal, found, expected[i][place])), (i, place)

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(work, range(N_THREADS)))


@pytest.mark.parametrize("rounds", [3, pytest.param(300, marks=pytest.mark.long)])
def test_threads_share_modules(rounds, one_thread):
    check_threads([make(backend="eager") for make in MODULES.values()], rounds)


@pytest.mark.kernel
@pytest.mark.not_emulated("the emulator runs one launch at a time")
@pytest.mark.parametrize(
    ("names", "rounds"), [(["mixture"], 1), pytest.param(list(MODULES), 5, marks=pytest.mark.long)], ids=["few", "all"]
)
def test_threads_share_kernels(names, rounds, device, one_thread):
    check_threads([MODULES[name](backend="triton") for name in names], rounds, device)


@not_interpreted
def test_threads_share_a_compiled_module(one_thread):
    """Check that a module compiled in one thread runs in all others, compiles no more there, and gives the bits of one.

    Threads that all make the first call each compile for themselves, in torch: past 8 that is an error under fullgraph.
    """
    module = MODULES["density"](backend="eager")
    expected = [both_passes(module, draw(i)) for i in range(N_THREADS)]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled, together = torch.compile(module, backend=counter, fullgraph=True), threading.Barrier(N_THREADS)
    both_passes(compiled, draw(0))

    def work(i):
        torch.set_num_threads(1)
        together.wait(60)
        return both_passes(compiled, draw(i))

    with ThreadPoolExecutor(N_THREADS) as pool:
        for found, wanted in zip(pool.map(work, range(N_THREADS)), expected, strict=True):
            assert all(map(torch.equal, found, wanted))
    assert counter.frame_count == 1


# --- Processes that compile into one cache --------------------------------------------------------
def compile_kernels(names, cache, together, results):
    """Compile the kernels of algorithms into a cache, and send the SHA-256 of each binary by the kernel's name."""
    from triton import knobs

    from bench.aot import compile_for
    from bench.modelled import record_passes

    knobs.cache.dir = str(cache)  # the variable would not tell where something set it before
    x, found = torch.empty(3, 12, 32, device="meta", dtype=torch.bfloat16), {}
    together.wait(60)
    for name in names:
        passes = record_passes(name, x, torch.empty(2, 1, device="meta"), None, 1, None, full=False)
        for one in [one for launches in passes.values() for one in launches][-1 if len(names) == 1 else 0 :]:
            one.kernel.device_caches.clear()  # of what was compiled before the fork
            found[name, one.name] = hashlib.sha256(compile_for("sm_90", one).cubin).hexdigest()
    results.put(found)


@not_interpreted
@pytest.mark.parametrize(
    "names", [["density"], pytest.param(list(ALGORITHMS), marks=pytest.mark.long)], ids=["one", "all"]
)
def test_processes_share_a_cache_of_kernels(names, tmp_path, one_thread):
    """Check that all succeed and find the same binaries, and that no file of the cache is broken or left over."""
    pytest.importorskip("triton")
    context = multiprocessing.get_context("fork")
    together, results = context.Barrier(N_PROCESSES), context.Queue()
    args = (names, tmp_path, together, results)
    processes = [context.Process(target=compile_kernels, args=args) for _ in range(N_PROCESSES)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * N_PROCESSES
    assert found[0] and found == found[:1] * N_PROCESSES
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.suffix == ".cubin"} == set(
        found[0].values()
    )
    for path in files:
        assert path.stat().st_size and "tmp." not in str(path.relative_to(tmp_path)), path
        if path.suffix == ".json":
            told = json.loads(path.read_text())
            assert all(Path(child).exists() for child in told.get("child_paths", {}).values()), path


# --- Memory ---------------------------------------------------------------------------------------
def resident():
    """Return the bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def alive():
    """Return how many objects, and tensors, are alive that the collector of garbage knows."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(one), torch.Tensor) for one in objects)


SPARE_BLOCKS = 0.5  # a call, beside a few hundred at first: what each call leaves takes one at least
SPARE_OBJECTS = 20  # of the test and of what Python keeps for later, whatever the number of calls
# That memory falls into other pages took 4 MB; of 10,000 calls that lose 1 KB each 10 MB are left.
SPARE_BYTES = 2**23


def check_memory(step, iterations):
    """Check that calls leave neither objects nor memory behind."""
    for _ in range(50):
        step()
    objects, tensors = alive()
    blocks, before = sys.getallocatedblocks(), resident()
    for _ in range(iterations):
        step()
    after, tensors_after = alive()
    # fewer: other tests' may go meanwhile
    assert tensors_after <= tensors and after - objects < SPARE_OBJECTS, (tensors_after - tensors, after - objects)
    more = sys.getallocatedblocks() - blocks  # what the collector does not know, too
    assert more < 500 + SPARE_BLOCKS * iterations, more
    lost = resident() - before
    assert lost < SPARE_BYTES, lost


ITERATIONS = [150, pytest.param(10_000, marks=pytest.mark.long)]


@pytest.mark.parametrize("iterations", ITERATIONS)
def test_memory_is_flat(iterations, one_thread):
    modules = itertools.cycle([make(backend="eager") for make in MODULES.values()])
    check_memory(lambda: both_passes(next(modules), draw(0)), iterations)


@contextlib.contextmanager
def stub(launched):
    """Launch into a driver that does nothing but note which kernels it was given; skip where there is none."""
    pytest.importorskip("triton")
    from bench import host
    from bench.stub_driver import UnavailableError, stub_driver

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(stub_driver(lambda function, *_: launched.append(function)))
        except UnavailableError as why:
            pytest.skip(f"no launches without a stub of the driver: {why}")
        stack.enter_context(host.taking_any_tensor())
        yield


def launch_both(case):
    """Launch both passes of a case."""
    given = inputs(case, torch.bfloat16)
    leaves = given.leaves()
    torch.autograd.grad(attend(case, *leaves, backend="triton"), leaves, given.grad_y)


LAUNCHED = Case((2, 12, 32), 1, heads=2, weights=False)


@not_interpreted
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_memory_of_launches_is_flat(iterations, one_thread):
    """Check calls of one shape, on the path that a GPU has, down to the driver."""
    launched = []
    with stub(launched):

        def step():
            launch_both(LAUNCHED)
            launched.clear()

        check_memory(step, iterations)
        assert len(launch.kept) == 3


# --- Shapes that change every step ----------------------------------------------------------------
@not_interpreted
@pytest.mark.parametrize(("steps", "most"), [(60, 50), pytest.param(10_000, launch.MOST_KEPT, marks=pytest.mark.long)])
def test_batches_of_any_size_share_kernels(steps, most, one_thread):
    """Check that a batch of another size in every step compiles nothing more, and that what is kept of launches is
    bounded.
    """
    launched, functions = [], set()
    with stub(launched), mock.patch.object(launch, "MOST_KEPT", most):
        for batch in range(2, 2 + steps):
            launch_both(LAUNCHED.but(shape=(batch, 12, 32)))
            functions |= set(launched)
            launched.clear()
            assert len(launch.kept) <= most
    assert len(functions) == 3


@pytest.mark.parametrize("steps", [1200, pytest.param(20_000, marks=pytest.mark.long)])
def test_plans_of_layers_are_bounded(steps):
    p = [torch.ones(1, 1)] * 2
    for length in range(2, 2 + steps):
        daam.fusion_for(torch.empty(1, length), p, p)
        assert len(block._plans) <= block.MOST_PLANS


@not_interpreted
@pytest.mark.parametrize("algorithm", algorithms.ALGORITHMS)
@pytest.mark.parametrize(("steps", "most"), [(15, 26), pytest.param(300, 90, marks=pytest.mark.long)])  # 24 and 84
def test_kernels_of_any_shape_are_few(steps, most, algorithm):
    """Check that batch, length, and features that change every step compile as many kernels as their divisibility by
    16 and the tiles of lengths tell apart, and no more.
    """
    pytest.importorskip("triton")
    from bench.modelled import record_passes
    from bench.variants import count_variants

    shapes, launches = random.Random(0), []
    for _ in range(steps):
        batch, length, features = (shapes.randrange(2, end) for end in (64, 1000, 1000))
        x, p = torch.empty(batch, length, features, device="meta"), torch.empty(1, 1, device="meta")
        passes = record_passes(algorithm, x, p, None, 1, None, full=False)
        launches += [one for found in passes.values() for one in found]
    counts = count_variants(launches)
    assert sum(counts.values()) <= most, counts


@not_interpreted
@pytest.mark.parametrize(
    "name", ["density", *(pytest.param(n, marks=pytest.mark.long) for n in MODULES if n != "density")]
)
def test_compiled_modules_recompile_once(name):
    """Check that torch.compile, left to find out which sizes change, compiles twice, and for no third batch again; but
    for one of 16 or more, where it takes torch's own convolutions otherwise.
    """
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(MODULES[name](backend="eager"), backend=counter, fullgraph=True)
    for batch in (3, 5, 7, 8, 11, 13, 17):
        both_passes(compiled, draw(0, batch))
    assert counter.frame_count == (3 if name in ("gate", "decoder") else 2)
