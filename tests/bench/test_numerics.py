"""The numerics study: what the committed file claims, what it is made of, and that a claim can fail."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch

from bench import numerics, numerics_claims
from bench.numerics_points import DTYPES, Point, points

HISTORY = Path(numerics.__file__).parent / "history"
RECORDS = {
    replace(numerics_claims.point_of(record), draws=1): record
    for record in numerics_claims.read(HISTORY / "numerics.json")
}
HARD = [
    {"factor": "mean", "mean": 1e4},
    {"factor": "mean x spread", "mean": 1e6, "spread": 1e-2},
    {"factor": "spread", "spread": 1e-6},
    {"factor": "c", "c": 1e-3},
    {"factor": "length", "length": 2},
    {"factor": "c x length", "c": 1e3, "length": 16_385},
]


def base(algorithm, dtype="float32"):
    return Point(algorithm, dtype, gaussians=1 if helpers.ALGORITHMS[algorithm].features else 4)


def test_every_claim_holds_of_the_committed_file_but_those_known():
    failing = {point: record for point, record in RECORDS.items() if numerics_claims.find_faults([record], known={})}
    assert not numerics_claims.find_faults(failing.values())
    assert {(point.algorithm, point.c) for point in failing} == numerics_claims.KNOWN.keys()


def test_the_file_has_every_point_provider_and_result():
    assert list(RECORDS) == points()
    for point, record in RECORDS.items():
        served = {name for name, provider in numerics.PROVIDERS.items() if provider.serves(point)}
        assert record["errors"].keys() == (set() if "skipped" in record else served), point
        assert len({tuple(record["errors"][name]) for name in served - {"published"} if record["errors"]}) <= 1, point
        if "skipped" in record:
            assert point.dtype == "float16" and max(point.mean, point.spread) > 1e4, point


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", helpers.ALGORITHMS)
def test_eager_is_as_near_to_float64_as_the_file_says(algorithm, dtype):
    """Measure a few points again: the same results are judged, and errors are within the rule of those in the file."""
    for changes in HARD:
        record = RECORDS[replace(base(algorithm, dtype), **changes)]
        point = numerics_claims.point_of(record)
        found = numerics.measure("eager", point)
        if isinstance(found, str):
            assert found == record["skipped"]
            continue
        assert found.keys() == record["errors"]["eager"].keys(), point
        for name, error in found.items():
            bound = helpers.bound(point.case, name, DTYPES[dtype], record["errors"]["eager"][name], point.draws)
            helpers.within(math.nan if error is None else error, bound, f"{name} of {point}")


def test_what_is_published_is_what_is_compared():
    """Check the density attention that stands here against a published case, and where it loses what ours keeps."""
    data, meta = helpers.golden("paper_layers24_heads1")
    x, mean_offset, c = (data[name] for name in ("x", "mean_offset", "c"))
    y, weights = numerics.published_density(x, mean_offset, c, meta["norm_axis"], meta["eps"])
    helpers.within(helpers.error(y, data["y"]), 1e-12, "y")
    helpers.within(helpers.error(weights, data["weights"]), 1e-12, "weights")
    point = replace(base("density"), factor="mean", mean=1e4)
    assert numerics.measure("published", point)["y"] > 0.5 > 1e-6 > numerics.measure("eager", point)["y"]


def test_differences_are_of_what_the_dtype_can_hold():
    exact = torch.tensor([1e5, -4e4, 2.0], dtype=torch.float64)  # the first past fp16's largest
    assert numerics.compare(torch.tensor([torch.inf, -4e4, 2.0]).half(), exact) == (0, 4e4)
    assert numerics.compare(torch.tensor([torch.inf, -4e4, 402.0]).half(), exact) == (400, 4e4)
    for bad in (torch.inf, torch.nan):
        assert numerics.compare(torch.tensor([1.0, -4e4, bad]).half(), exact) is None


def test_gradients_of_parameters_are_relative_to_the_largest_of_all_draws():
    pairs = [(1.0, 10.0), (1.0, 100.0)]
    assert (numerics.worst("dx", pairs), numerics.worst("d_c", pairs)) == (0.1, 0.01)
    assert numerics.worst("y", [*pairs, None]) is None


def test_what_float64_rounds_away_is_left_out():
    """Check that the gradients that a constant chunk gives a mixture are not judged: they are 0 in the mathematics."""
    point = replace(base("mixture"), factor="mean x spread", mean=1e6, spread=1e-6)
    given = point.inputs()
    assert (given.x == given.x[:, :1]).all()
    assert numerics.find_resolved(point, given, helpers.oracle(point.case, given)) == {"y", "weights", "dx"}
    tiny = replace(base("mixture"), factor="c", c=1e-2)  # whose weights are 1e-41
    given = tiny.inputs()
    assert not numerics.find_resolved(tiny, given, helpers.oracle(tiny.case, given))


@pytest.mark.parametrize(
    ("provider", "value", "faults"),
    [("interpreted", 1e-2, 1), ("emulated", None, 1), ("eager", None, 1), ("compile", None, 1), ("published", None, 0)],
)
def test_a_claim_can_fail(provider, value, faults):
    """Check that an error past the bound, and a result that is not finite, are faults of ours, not of others."""
    record = copy.deepcopy(RECORDS[replace(base("density"), factor="mean", mean=1e4)])
    assert not numerics_claims.find_faults([record])
    record["errors"][provider]["y"] = value
    assert len(numerics_claims.find_faults([record])) == faults


def test_the_page_has_the_tables():
    page = (HISTORY / "README.md").read_text()
    for table in numerics_claims.tables(list(RECORDS.values())).split("\n\n"):
        assert table in page


def test_the_picture_has_every_provider(monkeypatch):
    monkeypatch.setattr(numerics_claims, "FACTORS", ("mean",))
    figure = numerics_claims.plot([r for r in RECORDS.values() if r["algorithm"] == "density"])
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(numerics.PROVIDERS)
