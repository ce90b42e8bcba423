"""What ends a command line in one line, and what shows its traceback."""

from functools import partial

import pytest
import torch

from daam.recipes.errors import Parser, UserError, guarded

ENDED = [
    (UserError("rows: none\n  at all"), "error: rows: none at all\n"),
    (
        FileNotFoundError(2, "No such file or directory", "a.csv"),
        "error: [Errno 2] No such file or directory: 'a.csv'\n",
    ),
    (ImportError("No module named 'peft'"), "error: No module named 'peft'\n"),
    (
        MemoryError("Unable to allocate 9 TiB"),
        "error: memory does not suffice (Unable to allocate 9 TiB): take a smaller",
    ),
    (torch.OutOfMemoryError("CUDA out of memory."), "error: memory does not suffice (CUDA out of memory.): take"),
]


def run(error):
    @guarded
    def main(argv=None):
        raise error

    main([])


@pytest.mark.parametrize(("error", "line"), ENDED, ids=lambda value: type(value).__name__)
def test_what_a_user_can_mend(error, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(error)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert printed.err.startswith(line) and printed.err.count("\n") == 1


def test_memory_that_the_cpu_does_not_have(capsys):
    @guarded
    def main(argv=None):
        torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.startswith("error: memory does not suffice (")


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("shapes"), KeyError("c"), IndexError("5")], ids=repr
)
def test_bugs_show_their_traceback(error):
    with pytest.raises(type(error)):
        run(error)


def test_several_processes(monkeypatch, capsys):
    @guarded
    def main(argv=None):
        print("ran")

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main([])
    assert "error: WORLD_SIZE is 2, expected 1: this recipe runs in one process" in capsys.readouterr().err
    partial(guarded, several=True)(main.__wrapped__)([])
    assert capsys.readouterr().out == "ran\n"
    monkeypatch.setenv("WORLD_SIZE", "1")
    main([])
    assert capsys.readouterr().out == "ran\n"


def test_options_that_are_none(capsys):
    parser = Parser(prog="daam")
    parser.add_argument("--rate", type=float)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--rate", "fast"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: argument --rate: invalid float value: 'fast'\n"
