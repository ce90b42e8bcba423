"""The measure of closeness: what is judged, what is written, what is told of it."""

import json
import math

import margins
import pytest
import torch
from helpers import Case, bound, close, error, within

LINE = {"test": "tests/daam/test_x.py::test_x", "what": "y", "error": 1e-6, "bound": 1e-5}


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Keep errors that are made up here out of a run that measures."""
    monkeypatch.delenv("DAAM_MARGINS", raising=False)


def test_within_writes_a_line(tmp_path, monkeypatch, request):
    path = tmp_path / "found.jsonl"
    monkeypatch.setenv("DAAM_MARGINS", str(path))
    within(1e-6, 4e-6, "y")
    with pytest.raises(AssertionError, match="dx: error 2, expected below 1"):
        within(2.0, 1.0, "dx")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["what"], entry["share"]) for entry in lines] == [("y", 0.25), ("dx", 2.0)]
    assert {entry["test"] for entry in lines} == {request.node.nodeid}
    monkeypatch.delenv("DAAM_MARGINS")
    within(1e-6, 4e-6, "y")
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("found", "limit"),
    [(math.nan, 1.0), (math.inf, 1.0), (-1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.0, math.nan), (1.0, math.inf)],
)
def test_what_is_not_within(found, limit):
    with pytest.raises(AssertionError, match="y: error"):
        within(found, limit, "y")


def test_nan_in_a_tensor_is_seen():
    """Check that NaN in either tensor fails wherever it stands, and so does a shape that would broadcast."""
    good, bad = torch.ones(5), torch.tensor([1.0, 1.0, math.nan, 1.0, 1.0])
    for result, expected in ((good, bad), (bad, good), (bad, bad)):
        assert math.isnan(error(result, expected))
        with pytest.raises(AssertionError):
            close(result, expected, "y")
    for broadcast in (torch.ones(1), torch.ones(1, 5)):
        with pytest.raises(AssertionError):
            error(good, broadcast)
    with pytest.raises(AssertionError, match="y"):
        close(good, good.double(), "y")


def test_the_bound_of_a_kernel():
    """Check that a bound is twice eager's error and two roundings, that sums over more places have more room, and that
    gradients have the room of fp32.
    """
    case = Case((4, 6, 21), 1, heads=2)
    eps = 2**-24
    assert bound(case, "y", torch.float32, 0.0) == 4 * eps
    assert bound(case, "y", torch.float32, eps) == 6 * eps
    assert bound(case, "d_c", torch.float32, 0.0) == 4 * eps * math.log2(12) ** 0.5  # 4 examples, 3 positions a head
    assert bound(case, "d_c", torch.float32, 0.0) == bound(case, "d_c", torch.bfloat16, 0.0)
    assert bound(case, "dx", torch.float16, 0.0) == 4 * 2**-11
    assert math.isnan(bound(case, "y", torch.float32, math.nan))


def written(folder, **files):
    """Write a file of lines for each configuration, with the shares of a test's results, and return their paths."""
    paths = []
    for name, shares in files.items():
        paths.append(folder / f"{name}.jsonl")
        lines = [json.dumps({**LINE, "what": f"y{i}", "share": share}) for i, share in enumerate(shares)]
        paths[-1].write_text("".join(line + "\n" for line in lines))
    return paths


def test_the_ten_closest_are_told(tmp_path):
    """Check that each result is told once, for the configuration where it was worst."""
    shares = [i / 20 for i in range(12)]
    text, code = margins.report(written(tmp_path, avx2=shares, avx512=[0.7, *(share / 2 for share in shares[1:])]))
    lines = text.splitlines()
    assert code == 0 and len(lines) == 11
    assert lines[0].split() == ["0.700", "1.00e-06", "of", "1.00e-05", "avx512", "y0", LINE["test"]]
    assert [line.split()[5] for line in lines[:10]] == ["y0", *(f"y{i}" for i in range(11, 2, -1))]
    assert {line.split()[4] for line in lines[1:10]} == {"avx2"}
    assert lines[10] == "12 errors judged, 0 above 0.75 of their bounds"


@pytest.mark.parametrize("share", [0.76, 1.2, math.inf])
def test_a_close_call_fails(share, tmp_path):
    text, code = margins.report(written(tmp_path, default=[0.1, share, 0.75]))
    assert code == 1 and "3 errors judged, 1 above" in text


def test_a_failed_run_fails_and_so_does_one_that_judged_nothing(tmp_path):
    paths = written(tmp_path, default=[0.1])
    assert margins.report(paths)[1] == 0
    text, code = margins.report(paths, ["default: pytest ended with 2"])
    assert code == 1 and text.endswith("pytest ended with 2")
    assert margins.report([tmp_path / "absent.jsonl"])[1] == 1


@pytest.mark.slow
def test_a_configuration_runs_as_it_is_named(tmp_path):
    """Check that the process of the tests has the level and threads of its configuration, and that its lines and
    failures arrive.
    """
    test = tmp_path / "test_one.py"
    test.write_text(
        "import torch\nfrom helpers import within\n\n\ndef test_one():\n"
        "    assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT' and torch.get_num_threads() == 1\n"
        "    within(0.5, 1, 'y')\n\n\ndef test_two():\n    within(2, 1, 'dx')\n"
    )
    environment = margins.configurations()["default-1"]
    path = tmp_path / "default-1.jsonl"
    options = ["--rootdir", str(margins.ROOT), "-c", str(margins.ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    assert not margins.measure(environment, [*options, f"{test}::test_one"], path)
    text, code = margins.report([path])
    assert code == 0 and text.split()[:6] == ["0.500", "5.00e-01", "of", "1.00e+00", "default-1", "y"]
    (failed,) = margins.measure(environment, [*options, str(test)], path)
    assert "default-1: pytest ended with 1" in failed and margins.report([path], [failed])[1] == 1
