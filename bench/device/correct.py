"""Every regime against float64, judged by the rule of the tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.device.cases import Case, Inputs, correct_cases, draw_inputs, helpers, representative
from bench.device.session import Job, Session

WRONG = 4  # times the tests' bound; what is past the bound itself is flagged, of one draw and not the worst of eight


def jobs(session: Session) -> list[Job]:
    """Return a job a case: all of them, or the representative ones where they are emulated."""
    chosen = representative() if session.device == "emulated" else correct_cases()
    return [Job(f"{case}-{str(dtype)[6:]}", partial(judge, session, case, dtype)) for case, dtype in chosen]


def judge(session: Session, case: Case, dtype: torch.dtype) -> Iterator[dict]:
    """Yield the errors of our results and of eager's, and the share of the bound that the worst of ours takes."""
    inputs = draw_inputs(case, dtype, session.tensors)
    with helpers.recorded_launches() as launches:
        ours = helpers.run(case, inputs, "triton")
    if session.compiling:
        yield {"launches": launches}
        return
    wanted, eager = compute_expected(case, inputs), helpers.run(case, inputs, "eager")
    errors = {name: (helpers.error(ours[name], one), helpers.error(eager[name], one)) for name, one in wanted.items()}
    shares = {name: own / helpers.bound(case, name, dtype, beside, draws=1) for name, (own, beside) in errors.items()}
    worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    yield {
        "ok": shares[worst] <= WRONG,
        "past the bound": not shares[worst] <= 1,
        "share": float(f"{shares[worst]:.3g}"),
        "worst": worst,
        "errors [ours, eager]": {name: [float(f"{one:.3g}") for one in pair] for name, pair in errors.items()},
        "launches": launches,
    }


def compute_expected(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return the oracle's results. It works where the tensors are: a dozen processes share the host's cores."""
    leaves = [t.detach().double().requires_grad_() for t in (inputs.x, *inputs.params)]
    mask = helpers.broadcast(inputs.mask, case)
    outputs = case.spec.reference.formula(
        *leaves, mask, case.positive_axis, *case.spec.settings(case), case.residual
    )  # fmt: skip
    outputs = dict(zip(("y", "weights"), outputs[: 1 + case.weights], strict=False))
    upstream = [g.double() for g in (inputs.grad_y, inputs.grad_weights)[: len(outputs)]]
    grads = torch.autograd.grad(list(outputs.values()), leaves, upstream)
    found = outputs | dict(zip(case.gradients, grads, strict=True))
    return {name: t.detach().cpu() for name, t in found.items()}
