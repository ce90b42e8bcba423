"""The mutation check: its mutants can be made, their looks have tests, and what is killed is told from what is not."""

import re
import shlex
import subprocess
import sys
from collections import Counter

import mutation
import pytest
from helpers import ALGORITHMS
from mutation import ROOT, Mutant, Outcome, Trial, Worker, judge, report

ALL = mutation.load_all()
LOOKS = sorted({mutant.look for mutant in ALL})


def test_every_mutant_is_one_change_of_a_file():
    assert not [name for name, count in Counter(mutant.name for mutant in ALL).items() if count > 1]
    made = {}
    for mutant in ALL:
        text = mutation.mutate((ROOT / mutant.file).read_text(), mutant)
        assert made.setdefault((mutant.file, text), mutant.name) == mutant.name, "two names of one slip"


def test_mutants_are_of_all_algorithms_and_regimes():
    """Check that each file that holds kernels, or a function of the reference, has a mutant."""
    assert len(ALL) >= 60
    files = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text()}
    files |= {f"daam/reference/{path.name}" for path in (ROOT / "daam" / "reference").glob("[a-z]*.py")}
    assert files >= {f"{folder}/{name}.py" for folder in ("kernels", "daam/reference") for name in ALGORITHMS}
    assert not files - {mutant.file for mutant in ALL}


@pytest.mark.parametrize(("old", "new"), [("a", "b"), ("c = 3", "c = 4"), ("b = 2", "b = 2")])
def test_a_text_that_is_not_there_once_is_no_mutant(old, new):
    with pytest.raises(ValueError, match="one: its old text stands"):
        mutation.mutate("a = 1\nb = 2\na = 3", Mutant("one", "file.py", old, new, ""))


def files_of(look):
    return [word for word in shlex.split(look) if word.endswith(".py")]


def test_every_look_names_tests():
    """Check that files are there and hold the tests that are named; `make test-long` collects them."""
    assert {look.split()[0] for look in LOOKS} == set(mutation.options_of_modes())
    for look in LOOKS:
        sources = "".join((ROOT / file).read_text() for file in files_of(look))
        assert all(f"def {name}" in sources for name in re.findall(r"\btest_\w+(?!\w*\.py)\b", look.partition("-k")[2]))


@pytest.mark.long
def test_every_look_has_tests():
    """Check that pytest collects tests for each, with one run for each mode."""
    for mode, (_m, marker, *_) in mutation.options_of_modes().items():
        looks = [look for look in LOOKS if look.startswith(mode)]
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", marker]
        files = sorted({file for look in looks for file in files_of(look)})
        ids = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        for look in looks:
            assert any(one.startswith(tuple(files_of(look))) and has_words(one, look) for one in ids), look


def has_words(test, look):
    """Tell whether pytest's -k would choose a test, by its id."""

    def ask(match):
        return match[0] if match[0] in ("and", "or", "not") else str(match[0] in test)

    words = shlex.split(look)
    return "-k" not in words or eval(re.sub(r"[\w-]+", ask, words[words.index("-k") + 1]))


# --- A folder with a file and tests of it ---------------------------------------------------------
VALUE = "def double(x):\n    return 2 * x\n\n\ndef halve(x):\n    return x / 2\n"
TESTS = """from value import double, halve

def test_double():
    assert double(3) == 6

def test_halve():
    assert halve(6) == 3

def test_nothing():
    pass
"""
DOUBLE, HALVE = "compiled test_value.py -k double", "compiled test_value.py -k 'double or nothing'"
OF_VALUE = {
    "seen": ("2 * x", "3 * x", DOUBLE),
    "seen elsewhere": ("x / 2", "x // 3", HALVE),
    "not seen": ("def halve(x):\n", "def halve(x):\n    print(x)\n", DOUBLE),
    "no import": ("def double", "de double", DOUBLE),
    "hangs": ("return 2 * x", "import time\n    time.sleep(99)", DOUBLE),
    "dies": ("return 2 * x", "import os\n    os.abort()", DOUBLE),
    "no tests": ("2 * x", "3 * x", "compiled test_value.py -k treble"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return what comes of all mutants of a folder, and what is left of its file."""
    folder, patch = tmp_path_factory.mktemp("value"), pytest.MonkeyPatch()
    (folder / "value.py").write_text(VALUE)
    (folder / "test_value.py").write_text(TESTS)
    patch.setattr(mutation, "PARTS", ("compiled test_value.py",))
    patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    worker = Worker(folder, imported=("pytest",))
    trial, found = Trial([worker]), {}
    for look in {look for *_, look in OF_VALUE.values()}:
        trial.check(look)
    for name, row in OF_VALUE.items():
        patch.setattr(mutation, "SECONDS_MORE", 0 if name == "hangs" else 60)
        found[name] = trial.try_mutant(Mutant(name, "value.py", *row))
    worker.stop()
    patch.undo()
    return found, (folder / "value.py").read_text()


@pytest.mark.parametrize(
    ("name", "verdict", "reason"),
    [
        ("seen", "killed", "test_value.py::test_double"),
        ("seen elsewhere", "killed", "test_value.py::test_halve, not by its look"),
        ("not seen", "survived", "all of make test"),
        ("no import", "error", "pytest ended with 2"),
        ("hangs", "killed", "took too long"),
        ("dies", "killed", "SIGABRT"),
        ("no tests", "error", "without a mutant its look is error: pytest ended with 5"),
    ],
)
def test_what_comes_of_a_mutant(name, verdict, reason, outcomes):
    found, left = outcomes
    assert found[name].verdict == verdict and found[name].reason.startswith(reason), found[name]
    assert left == VALUE


@pytest.mark.parametrize(
    ("code", "output", "verdict", "reason"),
    [
        (1, "FAILED tests/a.py::test_a[x - y] - assert 0\nFAILED b - c", "killed", "tests/a.py::test_a[x"),
        (1, "FAILED tests/a.py::test_a\n1 failed", "killed", "tests/a.py::test_a"),
        (1, "ERROR tests/a.py::test_a - no fixture", "error", "pytest ended with 1: ERROR tests/a.py::test_a"),
        (0, "3 passed in 2 s", "survived", ""),
        (0, "3 skipped in 2 s", "error", "pytest ended with 0: 3 skipped in 2 s"),
        (4, "usage", "error", "pytest ended with 4: usage"),
        (99, "tests imported x", "error", "pytest ended with 99: tests imported x"),
        (-11, "", "killed", "SIGSEGV"),
        (None, "", "killed", "took too long"),
    ],
)
def test_a_verdict(code, output, verdict, reason):
    found = judge(code, output)
    assert found[0] == verdict and found[1].startswith(reason)


def test_the_score():
    killed, survived = Outcome("killed", "a test", 30.0), Outcome("survived", "all of make test", 90.0)
    assert report({"a": killed, "b": killed}) == ("2 of 2 mutants killed, in 1.0 minutes of tests", 0)
    text, code = report({"a": killed, "b": survived, "c": Outcome("error", "why")})
    assert code == 1 and text.splitlines() == [
        "survived: b  all of make test", "error: c  why", "1 of 3 mutants killed, in 2.0 minutes of tests"
    ]  # fmt: skip
    assert report({})[1] == 1
