"""Tell whether the default tests notice plausible slips in kernels, reference and host code: the mutants of mutants/.

    python tests/mutation.py                                  # all of them, some forty minutes of one core
    python tests/mutation.py --only density-sign-of-dx --only gate-eps --jobs 2
    python tests/mutation.py --held-out mine.py               # those of another file instead

A file of mutants holds MUTANTS, a list of (name, file, old text, new text, look); the old text stands in the file once.
A look says where to look first: compiled, interpreted or emulated, as the parts of `make test` run, and what pytest is
told. Each mutant is made in a copy of the working tree, with caches of its own. One that its look lets pass meets all
parts of `make test` but tests of style and of this script. Code 1: one passed these, too, or could not be tried.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MUTANTS = ROOT / "tests" / "mutants"
# of a look without a mutant, and so many times that with one: what takes longer hangs, and is killed
LONGEST, TIMES_SLOWER, SECONDS_MORE = 600, 5, 60
LONGEST_PART = 3600  # of one part of `make test`
# Two see that a text changed, not what it does; the third builds wheels, which the path of a copy disturbs.
UNRELATED = ("tests/test_mutation.py", "tests/test_style.py", "tests/daam/test_import.py")


class Mutant(NamedTuple):
    """Hold a slip: in a file, old text that becomes new text, and where to look first, a mode and pytest's options."""

    name: str
    file: str
    old: str
    new: str
    look: str


class Outcome(NamedTuple):
    """Hold what came of a run of tests: killed, survived or an error, by which test or why, and seconds."""

    verdict: str
    reason: str
    seconds: float = 0.0


# --- Mutants --------------------------------------------------------------------------------------
def load(path: Path) -> list[Mutant]:
    """Return the mutants of a file."""
    spec = importlib.util.spec_from_file_location(f"mutants_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [Mutant(*row) for row in module.MUTANTS]


def load_all() -> list[Mutant]:
    """Return the mutants of this repository."""
    return [mutant for path in sorted(MUTANTS.glob("*.py")) for mutant in load(path)]


def mutate(text: str, mutant: Mutant) -> str:
    """Return a file's text with the slip; raise ValueError where its old text does not stand there once."""
    if (count := text.count(mutant.old)) != 1 or mutant.old == mutant.new:
        raise ValueError(f"{mutant.name}: its old text stands {count} times in {mutant.file}, expected once, and other")
    return text.replace(mutant.old, mutant.new)


@contextlib.contextmanager
def applied(mutant: Mutant, folder: Path) -> Iterator[None]:
    """Put a mutant into a copy of the tree until the block ends."""
    path = folder / mutant.file
    text = path.read_text()
    path.write_text(mutate(text, mutant))
    try:
        yield
    finally:
        path.write_text(text)


# --- Runs -----------------------------------------------------------------------------------------
@functools.cache
def options_of_modes() -> dict[str, list[str]]:
    """Return pytest's options of each mode, with the markers that Makefile has."""
    markers = dict(re.findall(r"^(\w+) := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return {
        "compiled": ["-m", markers["COMPILED"]],
        "interpreted": ["-m", markers["INTERPRETED"]],
        "emulated": ["-m", markers["EMULATED"], "--device", "emulated"],
    }


PARTS = ("interpreted", "emulated", "compiled tests/daam", "compiled --ignore=tests/daam")  # of `make test`
UNWANTED = ("TRITON_INTERPRET", "DAAM_BACKEND", "DAAM_MARGINS")


def environment_of(folder: Path, caches: Path) -> dict[str, str]:
    """Return what a run in a copy of the tree adds to the environment."""
    return {
        "PYTHONPATH": str(folder),
        # bytecode is known by its source's second and size, which a mutant may share with the file
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }


def judge(code: int | None, output: str) -> tuple[str, str]:
    """Return the verdict on a run of pytest and its reason; code: None where it took too long."""
    if code == -signal.SIGKILL:
        return "error", "SIGKILL, as of a machine without memory"
    if code is None or code < 0:
        return "killed", "took too long" if code is None else signal.Signals(-code).name
    failed = re.search(r"^FAILED (.+?)(?: - |$)", output, re.MULTILINE)
    if code == 1 and failed:
        return "killed", failed[1]
    if code == 0 and re.search(r"\b\d+ passed", output):
        return "survived", ""
    last = [line for line in output.splitlines() if line.strip()][-3:]
    return "error", f"pytest ended with {code}: {' | '.join(last)}"


# Importing these takes longer than most looks
IMPORTED = ("torch", "torch._dynamo", "torch.func", "torch.fx.experimental.proxy_tensor", "triton.language", "pytest")


class Runner:
    """Hold a process that has imported what tests need of others, and forks one for every run of pytest."""

    def __init__(self, interpreting: bool, imported: Sequence[str] = IMPORTED):
        environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
        environment |= {"OMP_WAIT_POLICY": "passive"} | ({"TRITON_INTERPRET": "1"} if interpreting else {})
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *imported], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, folder: Path, environment: dict[str, str], arguments: Sequence[str], longest: float) -> tuple:
        """Return the code and output of pytest in a folder; as code None where it took longer than so many seconds."""
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            print(json.dumps([str(folder), environment, arguments, output.name]), file=self.process.stdin, flush=True)
            child = int(self.process.stdout.readline())
            timer = threading.Timer(longest, os.killpg, (child, signal.SIGKILL))  # with processes that tests started
            timer.start()
            code = int(self.process.stdout.readline())
            late = timer.finished.is_set()
            timer.cancel()
            return None if late else code, output.read()

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(imported: Sequence[str]) -> None:
    """Import modules, then fork for each line of the standard input, tell the child's number, and how it ended."""
    for name in imported:
        importlib.import_module(name)
    for line in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            run_pytest(*json.loads(line))


def run_pytest(folder: str, environment: dict[str, str], arguments: Sequence[str], output: str) -> None:
    """Run pytest in a copy of the tree and end with its code, or with 99 where that did not import the copy."""
    os.setsid()
    for path, flags, number in ((os.devnull, os.O_RDONLY, 0), (output, os.O_WRONLY, 1), (output, os.O_APPEND, 2)):
        os.dup2(os.open(path, flags | os.O_WRONLY if number else flags), number)
    os.chdir(folder)
    os.environ.update(environment)
    sys.dont_write_bytecode = True
    sys.path[:] = [folder, *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent)]
    import pytest

    code = int(pytest.main(list(arguments)))
    found = getattr(sys.modules.get("daam"), "__file__", f"{folder}/daam")
    if not found.startswith(f"{folder}/daam"):
        code = 99
        print(f"tests imported {found}")
    sys.stdout.flush()
    os._exit(code)


def copy_tree(folder: Path) -> None:
    """Copy what git would commit into a folder."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(ROOT / name):
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)  # daam/kernels is a link


class Worker:
    """Hold a copy of the tree, and what runs tests in it."""

    def __init__(self, folder: Path, imported: Sequence[str] = IMPORTED):
        self.folder, self.imported = folder, imported
        self.runners: dict[bool, Runner] = {}

    def run_tests(self, look: str, longest: float, *more: str) -> Outcome:
        """Return the outcome of a look, in at most so many seconds; more: options of pytest."""
        mode, *arguments = shlex.split(look)
        interpreting = mode == "interpreted"
        if interpreting not in self.runners:
            self.runners[interpreting] = Runner(interpreting, self.imported)
        arguments = ["-x", "-q", "-p", "no:cacheprovider", *options_of_modes()[mode], *arguments, *more]
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="daam-caches-", ignore_cleanup_errors=True) as caches:
            environment = environment_of(self.folder, Path(caches))
            found = self.runners[interpreting].run(self.folder, environment, arguments, longest)
        return Outcome(*judge(*found), time.monotonic() - began)

    def stop(self) -> None:
        """End the processes that run tests."""
        for runner in self.runners.values():
            runner.stop()


class Trial:
    """Hold workers that are free, and what looks came to without a mutant."""

    def __init__(self, workers: Sequence[Worker]):
        self.free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            self.free.put(worker)
        self.clean: dict[str, Outcome] = {}

    @contextlib.contextmanager
    def lent(self) -> Iterator[Worker]:
        """Yield a worker until the block ends."""
        worker = self.free.get()
        try:
            yield worker
        finally:
            self.free.put(worker)

    def check(self, look: str) -> None:
        """Run a look without a mutant, to know that it passes, and how long it takes."""
        with self.lent() as worker:
            self.clean[look] = outcome = worker.run_tests(look, LONGEST)
        words = "passes" if outcome.verdict == "survived" else f"{outcome.verdict} without a mutant: {outcome.reason}"
        print(f"{outcome.seconds:6.1f} s  {look}  {words}", flush=True)

    def try_mutant(self, mutant: Mutant) -> Outcome:
        """Return what comes of a mutant: of its look, and where that lets it pass, of all parts of `make test`."""
        clean = self.clean[mutant.look]
        if clean.verdict != "survived":
            return Outcome("error", f"without a mutant its look is {clean.verdict}: {clean.reason}")
        with self.lent() as worker:
            try:
                with applied(mutant, worker.folder):
                    outcome = worker.run_tests(mutant.look, SECONDS_MORE + TIMES_SLOWER * clean.seconds)
            except ValueError as error:  # its old text does not stand in the file once
                return Outcome("error", str(error))
            if outcome.verdict == "survived":
                outcome = self.try_parts(mutant, worker)
        return outcome

    def try_parts(self, mutant: Mutant, worker: Worker) -> Outcome:
        """Return what comes of a mutant in all parts of `make test`: a test that fails must pass without it."""
        seconds, ignored = 0.0, [f"--ignore={name}" for name in UNRELATED]
        for part in sorted(PARTS, key=lambda part: part.split()[0] != mutant.look.split()[0]):
            with applied(mutant, worker.folder):
                outcome = worker.run_tests(part, LONGEST_PART, *ignored)
            seconds += outcome.seconds
            if outcome.verdict == "survived":
                continue
            if outcome.verdict == "killed" and "::" in outcome.reason:
                clean = worker.run_tests(f"{part.split()[0]} {shlex.quote(outcome.reason)}", LONGEST)
                if clean.verdict != "survived":
                    return Outcome("error", f"{outcome.reason} fails without a mutant, too", seconds)
            return outcome._replace(reason=f"{outcome.reason}, not by its look", seconds=seconds)
        return Outcome("survived", "all of make test", seconds)


def run_all(mutants: Sequence[Mutant], jobs: int) -> dict[str, Outcome]:
    """Return the outcome of every mutant by name, and tell each as it comes."""

    def tell(mutant: Mutant) -> Outcome:
        outcome = trial.try_mutant(mutant)
        print(f"{outcome.verdict:8}  {outcome.seconds:6.1f} s  {mutant.name}  {outcome.reason}", flush=True)
        return outcome

    with tempfile.TemporaryDirectory(prefix="daam-mutants-") as root, ThreadPoolExecutor(jobs) as pool:
        workers = [Worker(Path(root).resolve() / str(i)) for i in range(jobs)]
        try:
            for worker in workers:
                copy_tree(worker.folder)
            trial = Trial(workers)
            list(pool.map(trial.check, dict.fromkeys(mutant.look for mutant in mutants)))
            return dict(zip((mutant.name for mutant in mutants), pool.map(tell, mutants), strict=True))
        finally:
            for worker in workers:
                worker.stop()


def report(outcomes: dict[str, Outcome]) -> tuple[str, int]:
    """Return the score, with the names of mutants that were not killed, and the code to end with."""
    left = [f"{one.verdict}: {name}  {one.reason}" for name, one in outcomes.items() if one.verdict != "killed"]
    seconds, killed = sum(one.seconds for one in outcomes.values()), len(outcomes) - len(left)
    score = f"{killed} of {len(outcomes)} mutants killed, in {seconds / 60:.1f} minutes of tests"
    return "\n".join([*left, score]), int(bool(left or not outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="a mutant; may be repeated")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="a file of mutants, in place of the repository's")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="name the mutants, and run nothing")
    parser.add_argument("--serve", nargs="*", metavar="MODULE", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutation.json", help="outcomes, as JSON")
    options = parser.parse_args(arguments)
    if options.serve is not None:
        serve(options.serve)
        return 0
    mutants = load_all() if options.held_out is None else load(options.held_out)
    if unknown := set(options.only or ()) - {mutant.name for mutant in mutants}:
        parser.error(f"no mutant has the name {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in mutants if options.only is None or mutant.name in options.only]
    if options.list:
        print("\n".join(f"{mutant.name}  {mutant.file}  {mutant.look}" for mutant in mutants))
        return 0
    outcomes = run_all(mutants, options.jobs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({name: one._asdict() for name, one in outcomes.items()}, indent=1) + "\n")
    text, code = report(outcomes)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
