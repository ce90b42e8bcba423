"""A plugin of pytest for the part `tests`: a line of JSON a test as it ends, and none begun past the deadline.

Where a process dies of a test, the tests' own --shard chooses those after it: of every n, from the number of the next.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.device.session import Session, end_where_lost


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that a process of the plan is given."""
    parser.addoption("--out", type=Path, help="folder to whose results.jsonl tests are added as they end")
    parser.addoption("--call", default="")
    parser.addoption("--began", type=float, default=0.0)
    parser.addoption("--until", type=float, default=float("inf"))
    parser.addoption("--progress", type=Path, help="file of the tests that are left")


def pytest_configure(config: pytest.Config) -> None:
    """Register what writes the results, by the options of the process."""
    k, n = config.getoption("--shard", "0/1").split("/")
    session = Session(
        call=config.getoption("--call"),
        out=config.getoption("--out"),
        device=config.getoption("--device", "cpu"),
        began=config.getoption("--began"),
        until=config.getoption("--until"),
        shard=(int(k), int(n)),
        progress=config.getoption("--progress"),
    )
    config.pluginmanager.register(Lines(session), "lines of results")


class Lines:
    """Write the outcome of every test, and skip those that would begin past the deadline."""

    def __init__(self, session: Session):
        self.session = session
        self.left: list[tuple[int, str]] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Number the tests of this process as they are numbered among those of all."""
        first, step = self.session.shard
        self.left = [(first + step * k, item.nodeid) for k, item in enumerate(session.items)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Note the tests that are left, from this one on, and skip it past the deadline."""
        while self.left[0][1] != item.nodeid:
            self.left.pop(0)
        self.session.note(self.left)
        if self.session.late:
            pytest.skip("past the deadline")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write a file that cannot be imported: a package that its tests need may be absent."""
        if report.failed:
            self.session.write("tests", case=report.nodeid, ok=False, error=report.longreprtext[-1500:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the outcome of a test, or what failed before or after it."""
        if report.when != "call" and report.passed:
            return
        row = {"case": report.nodeid, "seconds": round(report.duration, 2)}
        if report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            row |= {"skipped": reason.removeprefix("Skipped: ")}
        else:
            row |= {"ok": report.passed} | ({} if report.passed else {"error": report.longreprtext[-1500:]})
        self.session.write("tests", **row)
        if report.failed:
            end_where_lost(self.session)

    def pytest_sessionfinish(self) -> None:
        """Note that no test is left."""
        self.session.note([])
