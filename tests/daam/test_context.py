"""The DAT trained on sequences in four processes, two by two: the losses of one process."""

import json
from functools import partial

import forked
import pytest
import torch

from daam.recipes import context

pytestmark = pytest.mark.usefixtures("one_thread")
ARGUMENTS = ["--positions", "102", "--heads", "3", "--steps", "8", "--rate", "0.01"]  # one head is in two


def test_four_processes_train_as_one(tmp_path):
    single, several = tmp_path / "single.json", tmp_path / "several.json"
    context.main([*ARGUMENTS, "--output", str(single)])
    target = partial(context.main, [*ARGUMENTS, "--context", "2", "--output", str(several)])
    outputs = [tmp_path / f"{rank}.txt" for rank in range(4)]
    status = forked.finish(forked.start([target] * 4, outputs))
    assert status == [0] * 4, "\n".join(path.read_text()[-3000:] for path in outputs)
    losses, expected = (torch.tensor(json.loads(path.read_text())) for path in (several, single))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert losses[-1] < 0.8 * losses[0], losses
    printed = [path.read_text().splitlines() for path in outputs]
    assert printed[0][0] == f"step 1: loss {losses[0]:.4f}" and not any(printed[1:])


def test_context_divides_the_processes(capsys):
    with pytest.raises(SystemExit):
        context.main(["--context", "2"])
    assert "--context is 2, expected a divisor of the 1 processes" in capsys.readouterr().err
