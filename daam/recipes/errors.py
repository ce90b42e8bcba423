"""Ends of a command line: bad input in one line and with exit status 2, bugs with their traceback."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from daam.checks import lacks_memory


class UserError(ValueError):
    """Tell of something that the user can mend; the message names it, says what came and what was expected."""


@contextlib.contextmanager
def extra() -> Iterator[None]:
    """Say how to install what is imported in the block, where it is not installed."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}. The recipes need their extra: pip install 'daam-triton[recipes]'") from error


class Parser(argparse.ArgumentParser):
    """Parse arguments; errors are one line of standard error, and exit status 2. Help names the command as it is run:
    python -m and a module, or a script.
    """

    def __init__(self, **options: Any):
        # what python -m runs has a spec; scripts have none, or on Windows that of the file they are in
        module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "__main__")
        script = Path(sys.argv[0]).name
        prog = script if module == "__main__" else f"python -m {module.removesuffix('.__main__')}"
        super().__init__(**{"prog": prog, **options})

    def error(self, message: str) -> NoReturn:
        end(message)


def end(message: object) -> NoReturn:
    """Print a message as one line of standard error and exit with status 2."""
    print("error:", *str(message).split(), file=sys.stderr)
    raise SystemExit(2)


def guarded(main: Callable[[list[str] | None], None], *, several: bool = False) -> Callable[..., None]:
    """Return a command's main that ends what the user can mend in one line, with exit status 2.

    That is every `UserError`; files and folders that cannot be read or written; packages that are not installed;
    memory that does not suffice; several processes, which would write into one folder, unless the command shares its
    work among several. All other exceptions are bugs and pass through with their traceback.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        try:
            if not several:
                _check_one_process()
            main(argv)
        except (UserError, OSError, ImportError) as error:
            end(error)
        except KeyboardInterrupt:
            print("interrupted: run the same command again, where it says that it goes on", file=sys.stderr)
            raise SystemExit(130) from None
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            end(f"memory does not suffice ({error}): take a smaller --batch, shorter examples or another --device")

    return run


def _check_one_process() -> None:
    if (size := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise UserError(
            f"WORLD_SIZE is {size}, expected 1: this recipe runs in one process, and several would write into one "
            "folder; start it without torchrun"
        )
