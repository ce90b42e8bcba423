"""Every regime against float64, judged by the rule of the tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from bench.device.cases import Case, correct_cases, draw_inputs, helpers, representative
from bench.device.session import Job, Session

WRONG = 4  # times the tests' bound; what is past the bound itself is flagged, of one draw and not the worst of eight


def jobs(session: Session) -> list[Job]:
    """Return a job a case: all of them, or the representative ones where they are emulated."""
    chosen = representative() if session.device == "emulated" else correct_cases()
    return [Job(f"{case}-{str(dtype)[6:]}", partial(judge, session, case, dtype)) for case, dtype in chosen]


def judge(session: Session, case: Case, dtype: torch.dtype) -> Iterator[dict]:
    """Yield the errors of our results and of eager's, and the share of the bound that the worst of ours takes."""
    if session.device == "cuda":
        torch.cuda.empty_cache()  # what the case before held, for processes beside this one
    inputs = draw_inputs(case, dtype, session.tensors)
    with helpers.recorded_launches() as launches:
        ours = helpers.run(case, inputs, "triton")
    if session.compiling:
        yield {"launches": launches}
        return
    # where the tensors are: a dozen processes share the host's cores
    wanted, eager = helpers.oracle(case, inputs, session.tensors), helpers.run(case, inputs, "eager")
    errors, shares = {}, {}
    for name, expected in wanted.items():
        errors[name] = helpers.error(ours[name], expected), helpers.error(eager[name], expected)
        shares[name] = errors[name][0] / helpers.bound(case, name, dtype, errors[name][1], draws=1)
    worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    yield {
        "ok": shares[worst] <= WRONG,
        "past the bound": not shares[worst] <= 1,
        "share": float(f"{shares[worst]:.3g}"),
        "worst": worst,
        "errors [ours, eager]": {name: [float(f"{error:.3g}") for error in pair] for name, pair in errors.items()},
        "launches": launches,
    }
