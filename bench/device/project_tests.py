"""A plugin of pytest for the part `tests`: a line of JSON a test as it ends, and none begun past the deadline."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench.device.session import Session


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, help="folder to whose results.jsonl tests are added as they end")
    parser.addoption("--call", default="")
    parser.addoption("--began", type=float, default=0.0)
    parser.addoption("--until", type=float, default=float("inf"))


def pytest_configure(config: pytest.Config) -> None:
    ask = config.getoption
    session = Session(ask("--call"), ask("--out"), began=ask("--began"), until=ask("--until"))
    config.pluginmanager.register(Lines(session), "lines of results")


class Lines:
    """Write the outcome of every test, and skip those that would begin past the deadline."""

    def __init__(self, session: Session):
        self.session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if time.time() > self.session.until:
            pytest.skip("past the deadline")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write a file that cannot be imported: a package that its tests need may be absent."""
        if report.failed:
            self.session.write("tests", case=report.nodeid, ok=False, error=report.longreprtext[-1500:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row = {"case": report.nodeid, "seconds": round(report.duration, 2)}
        if report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            row |= {"skipped": reason.removeprefix("Skipped: ")}
        else:
            row |= {"ok": report.passed} | ({} if report.passed else {"error": report.longreprtext[-1500:]})
        self.session.write("tests", **row)
