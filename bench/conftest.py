"""Options of the benchmarks, and what they write."""

import json
from pathlib import Path

import pytest

from bench import core


def pytest_addoption(parser):
    group = parser.getgroup("daam-triton")
    group.addoption(
        "--cases", type=Path, help="append every case to this file, a line of JSON, as soon as it is measured"
    )


def pytest_configure(config):
    """Make the folders of what is written: a missing one would show only after everything has been measured."""
    for name in ("--benchmark-json", "--cases"):
        if path := config.getoption(name, None):
            Path(path).parent.mkdir(parents=True, exist_ok=True)


def pytest_benchmark_generate_machine_info(config):
    return core.about()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Cut summaries to six digits and leave single times out: a run is kept in the repository."""
    output_json["commit_info"] = {"id": core.about()["commit"]}
    for benchmark in output_json["benchmarks"]:
        del benchmark["params"], benchmark["options"]
        benchmark["stats"] = {
            key: core.rounded(value) if isinstance(value, float) else value
            for key, value in benchmark["stats"].items()
            if key != "data"
        }


@pytest.fixture
def names(request):
    """Return the providers of this case's workload among those selected, and the copy, which is the roof."""
    found = {"copy"}
    for item in request.session.items:
        params = getattr(item, "callspec", request.node.callspec).params
        if params.get("workload") == request.node.callspec.params["workload"]:
            found.add(params["provider"])
    return tuple(sorted(found))


@pytest.fixture
def write_case(request):
    """Return a function that appends what a case tells, a dict, to the file of --cases."""

    def write(extra_info: dict) -> None:
        if path := request.config.getoption("--cases"):
            with path.open("a") as file:
                print(json.dumps({"fullname": request.node.nodeid, "extra_info": extra_info}), file=file)

    return write
