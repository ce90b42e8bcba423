"""Result files: what pytest-benchmark wrote, the lines of --cases, or what the audit wrote, read into one form; and the
words that writers and readers share.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PASSES = ("forward", "backward", "forward+backward")
OWN, YARDSTICKS = ("triton", "eager", "compile"), ("layer_norm", "copy")  # providers; the others are foreign
LEAST = 0.05  # a change of a time that noise does not explain, relative to it


class UnusableError(ValueError):
    """Tell that a file is no result, or that results cannot be compared."""


@dataclass(frozen=True)
class Run:
    """Hold the figures of a run by the full names of its cases. kind: "speed" or "audit". device: what it ran on; of an
    audit, its targets. title: device, versions and commit.
    """

    kind: str
    device: str
    versions: dict[str, str]
    title: str
    rows: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """Describe how one figure of one case differs between two results.

    worse: by how much it became worse, relative to base unless that is 0; negative where it became better. limit: the
    most that worse may be. judged: whether it can fail. why: what makes the case unusable, in words.
    """

    name: str
    figure: str
    base: float
    new: float
    worse: float
    limit: float = 0.0
    judged: bool = True
    why: str = ""

    @property
    def failed(self) -> bool:
        """Tell whether it is judged and past its limit."""
        return self.judged and not self.worse <= self.limit  # as NaN fails, too

    @property
    def improved(self) -> bool:
        """Tell whether it became better by more than its limit; a time also by more than LEAST."""
        return -self.worse > max(self.limit, LEAST if self.figure == "time" else 0)


def read(path: Path) -> Run:
    """Return the run that a result file holds; raise an UnusableError where it is none, or holds no case."""
    try:
        text = path.read_text()
        data = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UnusableError(f"{path} cannot be read: {error}") from error
    if isinstance(data, dict) and "targets" in data:
        return _audit(data)
    cases = data.get("benchmarks") if isinstance(data, dict) else data
    if not cases or not all(isinstance(case, dict) and "of_copy" in case.get("extra_info", {}) for case in cases):
        raise UnusableError(f"{path} holds no cases of this suite")
    rows = {case["fullname"]: case["extra_info"] for case in cases}
    last = cases[-1]["extra_info"]
    versions = ", ".join(f"{name} {last['versions'][name]}" for name in ("torch", "triton") if name in last["versions"])
    title = f"{last['device']} · {versions} · commit {last['commit']}"
    return Run("speed", last["device"], last["versions"], title, rows)


def _audit(data: dict[str, Any]) -> Run:
    rows = {f"{target}/{name}": figures for target, found in data["targets"].items() for name, figures in found.items()}
    device = ", ".join(data["targets"])
    return Run("audit", device, {"triton": data["triton"]}, f"{device}, compiled by triton {data['triton']}", rows)


def short(name: str) -> str:
    """Return the full name of a case without the test that it is of."""
    return name.partition("[")[2].rstrip("]") or name


def slug(device: str) -> str:
    """Return the name of a device's folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def history(folder: Path, device: str) -> list[Path]:
    """Return the files of the dated runs of a device in a folder of histories, oldest first."""
    return sorted((folder / slug(device)).glob("*.json"))
