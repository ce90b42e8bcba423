"""A folder that one process at a time works in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from daam.recipes import processes
from daam.recipes.errors import UserError

NAME = ".lock"


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Keep a folder, made where there is none, to this process until the block ends or the process dies.

    The lock is a file `.lock` in the folder, which goes with the block; one that a killed process left locks nothing.
    Nothing is locked on Windows, and on file systems that cannot lock. Of processes that work together the first one
    locks for all; the others wait for it before they write (`processes.wait`). Raises a UserError where another process
    has the folder, or another block of this one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = _lock(folder) if processes.rank() == 0 else None
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):  # who deletes the folder deletes the lock
                (folder / NAME).unlink()  # while it is held: later, it could be another's
            file.close()


def _lock(folder: Path) -> IO[str] | None:
    """Return the locked file, to be kept open, or None where files cannot be locked."""
    while fcntl is not None:
        file = (folder / NAME).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"another process works in {folder}: wait for its end, or choose another folder") from None
        except OSError:
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / NAME).stat()):
                return file
        file.close()  # its holder has deleted it since it was opened: take the next one
    return None
