"""Summary of what a plan found, in a few lines: the files hold the rest."""

from __future__ import annotations

from collections import Counter

from bench.device.session import Session, read

SHOWN = 20  # wrong cases of a part, and reasons of those skipped


def summarize(session: Session, part: str, seconds: float, expected: int) -> str:
    """Return how many cases of a part there were and what is wrong with those that are."""
    rows = [row for row in rows_of(session) if row["part"] == part]
    counts = {
        "cases": len({row.get("case") for row in rows}),
        "wrong": sum(is_wrong(row) for row in rows),
        "past the bound": sum(row.get("past the bound", False) for row in rows),
        "skipped": sum("skipped" in row for row in rows),
        "kernels compiled": sum(row.get("compiled", 0) for row in rows),
        "kernels cached": sum(row.get("cached", 0) for row in rows),
    }
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name in ("cases", "wrong"))
    lines = [f"{session.call} {part}: {seconds:.0f} s{f' of {expected}' if expected else ''}: {said}"]
    wrong = [row for row in rows if is_wrong(row)]
    lines += [f"    WRONG {row.get('case')}: {find_reason(row)}" for row in wrong[:SHOWN]]
    skipped = Counter(row["skipped"] for row in rows if "skipped" in row)
    lines += [f"    skipped {count}: {reason[:300]}" for reason, count in skipped.most_common(SHOWN)]
    if part == "time":
        lines += map(format_times, (row for row in rows if "us" in row))
    return "\n".join(lines)


def rows_of(session: Session) -> list[dict]:
    """Return the rows that a call has written so far, without those of an earlier call of its name."""
    return [row for row in read(session.out) if (row["call"], row["began"]) == (session.call, round(session.began))]


def is_wrong(row: dict) -> bool:
    """Tell whether a row says that something is not as it should be; rows without a verdict do not."""
    return row.get("ok") is False


def find_reason(row: dict) -> str:
    """Return what is wrong with a case, in a line."""
    found = row.get("error") or {
        key: row[key] for key in ("differs", "worst", "share", "not timed", "status") if row.get(key)
    }
    return str(found).replace("\n", " ")[:300]


def format_times(row: dict) -> str:
    """Return the times of a pass of a workload, ours beside the share of the copy."""
    us = " ".join(f"{name} {value:g}" for name, value in row["us"].items())
    share = f"{row['percent_of_roof']:5.1f} % of copy" if "percent_of_roof" in row else ""
    return f"    {row['case'][:58]:58} {row['pass']:16} {share} | {us}"
