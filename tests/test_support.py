"""The table of what works where: every row names tests, and they are there."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "daam/SUPPORT.md"


def rows(text):
    """Return the rows of all tables, each a list of cells."""
    lines = [line.strip("|\n ").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [row for row in cells if not set("".join(row)) <= {"-"} and row[-1] != "tests"]


def faults(text):
    """Return what is wrong with rows: that they have no test, or name one that is not there."""
    found = []
    for name, *_how_far, tests in rows(text):
        named = re.findall(r"`(\w+)::(\w+)`", tests)
        found += [] if named else [f"{name}: no test"]
        for file, test in named:
            found += [] if test in find_tests(file) else [f"{name}: {file}::{test} is not there"]
    return found


@functools.cache
def find_tests(file):
    """Return the functions of files of tests of a name."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob(f"{file}.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_are_there():
    assert not (found := faults(SUPPORT.read_text())), "\n".join(found)
    assert len(rows(SUPPORT.read_text())) > 50


def test_faults_are_found():
    text = "| with | how far | tests |\n|---|---|---|\n| a | far | `test_support::test_faults_are_found` |\n"
    assert faults(text) == []
    assert faults(text + "| b | far | soon |\n| c | | `test_support::test_none` `test_no_file::test_none` |") == [
        "b: no test", "c: test_support::test_none is not there", "c: test_no_file::test_none is not there",
    ]  # fmt: skip
