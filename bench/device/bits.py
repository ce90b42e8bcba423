"""Results that must be the same to the bit, and what only a device shows: streams, graphs, threads, waiting."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.device.cases import ALGORITHMS, BF16, Case, Inputs, bit_cases, case, draw_inputs, helpers
from bench.device.session import Job, Session

Check = Callable[[Case, Inputs], dict]  # returns what differs, by name: nothing where all is well


def jobs(session: Session) -> list[Job]:
    """Return a job a check and case; on a GPU first those of streams, graphs, synchronisation and threads."""
    checks: list[tuple] = []
    shapes = ((8, 24, 1024), (2, 2048, 512), (512, 1024), (8, 20000))
    on_device = [(case(name, shape, 1, 1), BF16) for name in ALGORITHMS for shape in shapes]
    shared = (case("density", (8, 24, 1024), 1, 8), BF16)
    if session.device == "cuda":
        checks += itertools.product((call_on_stream, replay_graph, call_without_waiting), on_device)
        checks += [(call_in_threads, shared)]
    elif session.compiling:
        checks += [(repeat, case) for case in (*on_device, shared)]
    # a check after another, so that processes beside each other do not compile the same kernels
    checks += itertools.product((repeat, compare_rows, compare_weights), bit_cases())
    long_rows = [(case(name, (4, 20000), 1, 1).but(params="one"), BF16) for name in ALGORITHMS]
    checks += itertools.product([compare_steps], long_rows)
    return [
        Job(f"{check.__name__}-{case}-{str(dtype)[6:]}", partial(run_check, session, check, case, dtype))
        for check, (case, dtype) in checks
    ]


def run_check(session: Session, check: Check, case: Case, dtype: torch.dtype) -> Iterator[dict]:
    """Yield whether a check finds nothing that differs, and by how much of the largest value what does."""
    differs = check(case, draw_inputs(case, dtype, session.tensors))
    yield {} if session.compiling else {"ok": not differs, "differs": differs}


def find_differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Return the errors of the results that are not the wanted ones to the bit."""
    return {n: helpers.error(t, wanted[n].cpu().double()) for n, t in found.items() if not torch.equal(t, wanted[n])}


def repeat(case: Case, inputs: Inputs) -> dict:
    """Compare two calls with the same inputs."""
    return find_differences(helpers.run(case, inputs, "triton"), helpers.run(case, inputs, "triton"))


def compare_rows(case: Case, inputs: Inputs) -> dict:
    """Compare a batch with each of its rows."""
    whole, differs = helpers.run(case, inputs, "triton"), {}
    for i in range(case.shape[0]):
        x, grad_y, grad_weights = (t[i : i + 1] for t in (inputs.x, inputs.grad_y, inputs.grad_weights))
        alone = Inputs(x, inputs.params, None, grad_y, grad_weights)
        row = helpers.run(case.but(shape=(1, *case.shape[1:])), alone, "triton")
        of_row = {name: whole[name][i : i + 1] for name in ("y", "weights", "dx")}
        found = find_differences({name: row[name] for name in of_row}, of_row)
        differs |= {f"{name} of row {i}": error for name, error in found.items()}
    return differs


def compare_weights(case: Case, inputs: Inputs) -> dict:
    """Compare y that is returned with the weights with y alone."""
    both, alone = helpers.run(case, inputs, "triton"), helpers.run(case.but(weights=False), inputs, "triton")
    return find_differences({"y": alone["y"]}, {"y": both["y"]})


def compare_steps(case: Case, inputs: Inputs) -> dict:
    """Compare rows whose steps one launch takes with those that take a launch a step."""
    apart = helpers.run(case, inputs, "triton")
    with helpers.taking_rows_whole():
        together = helpers.run(case, inputs, "triton")
    return find_differences(together, apart)


def call_on_stream(case: Case, inputs: Inputs) -> dict:
    """Compare a call on a stream of its own with one on the current stream."""
    wanted, side = helpers.run(case, inputs, "triton"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = helpers.run(case, inputs, "triton")
    torch.cuda.current_stream().wait_stream(side)
    return find_differences(found, wanted)


def replay_graph(case: Case, inputs: Inputs) -> dict:
    """Compare what a captured call writes when it is replayed, over results that are wiped before."""
    wanted = helpers.run(case, inputs, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = helpers.run(case, inputs, "triton")
    for result in captured.values():
        result.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return find_differences(captured, wanted)


def call_without_waiting(case: Case, inputs: Inputs) -> dict:
    """Fail where a call waits for the device."""
    helpers.run(case, inputs, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        helpers.run(case, inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def call_in_threads(case: Case, inputs: Inputs) -> dict:
    """Compare the results of four threads at once; a thread that fails leaves none."""
    wanted, found = helpers.run(case, inputs, "triton"), {}

    def work(k: int) -> None:
        found[k] = find_differences(helpers.run(case, inputs, "triton"), wanted)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    absent = {f"thread {k}": "no result" for k in range(4) if k not in found}
    return absent | dict(itertools.chain.from_iterable(differences.items() for differences in found.values()))
