"""The machine that a plan runs on: what it lacks, what is taken along to it, and how kernels run without a GPU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.device.session import ROOT

PREPARED = ROOT / ".gpu"  # what `python -m bench.device.prepare` makes, to be taken to the GPU's machine
CACHE, SITE, ABOUT = PREPARED / "cache.tar.xz", PREPARED / "site", PREPARED / "prepared.json"
UNPACKED = "unpacked"  # a file in Triton's folder that says which kernels were put there


def find_missing() -> str | None:
    """Return what a plan needs and the machine lacks, in a line; None where it can run."""
    absent = [name for name in ("torch", "triton", "numpy") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{sys.executable} has no {', '.join(absent)}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU; --dry goes through the plan without one"
    return None


def find_no_compiler() -> str | None:
    """Return why torch.compile cannot work here; None where it can. Our kernels' launchers may be taken along."""
    if os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang"))):
        return None
    return "torch.compile needs a C compiler for Triton's launchers: CC is not set, no gcc or clang found"


def set_environment(cores: int, cache: Path | None = None) -> None:
    """Set what processes of a plan find: caches, of kernels in a folder that may be given, threads, packages."""
    os.environ.pop("TRITON_INTERPRET", None)
    folder = Path(tempfile.gettempdir())
    if cache:
        os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / f"daam-triton-{fingerprint()}"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "daam-inductor"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    os.environ["OMP_NUM_THREADS"] = "1" if cores < 16 else "2"
    os.environ["PYTHONUNBUFFERED"] = "1"
    if is_prepared():
        os.environ.setdefault("DAAM_COMMIT", read_prepared()["commit"])  # a copy of the project may have no repository
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(SITE)]))


def unpack() -> str:
    """Put the kernels that were taken along where Triton looks for them; return what was done, in words.

    Triton takes those of its own version and of unchanged sources, and compiles the others.
    """
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    if not CACHE.exists():
        return "nothing was taken along: kernels are compiled here"
    marker, packed = folder / UNPACKED, hashlib.sha256(CACHE.read_bytes()).hexdigest()
    if marker.exists() and marker.read_text() == packed:
        return f"{CACHE.name} is unpacked already"
    with tarfile.open(CACHE) as archive:
        archive.extractall(folder, filter="data")
        groups = [folder / name for name in archive.getnames() if Path(name).name.startswith("__grp__")]
    for group in groups:
        regroup(group)
    marker.write_text(packed)
    return f"unpacked {len(groups)} kernels of {CACHE.name}, made by {read_prepared()}"


def regroup(group: Path) -> None:
    """Let the list of a kernel's files name those that stand beside it: Triton wrote it with the paths of another
    machine, and 3.9 compiles a kernel anew where one of them is absent.
    """
    names = json.loads(group.read_text())["child_paths"]
    found = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
    group.write_text(json.dumps({"child_paths": found}))


def read_prepared() -> dict:
    """Return the versions and the commit that kernels were taken along from."""
    return json.loads(ABOUT.read_text()) if ABOUT.exists() else {}


def is_prepared() -> bool:
    """Tell whether the kernels that were taken along are of these sources, this Triton and this Python."""
    return read_prepared().get("fingerprint") == fingerprint()


@functools.cache
def fingerprint() -> str:
    """Return what changes with the kernels' sources, Triton and Python: kernels of one are found by no other."""
    import triton

    sources = "".join(path.read_text() for path in sorted((ROOT / "kernels").glob("*.py")))
    text = f"{sources}{triton.__version__}{platform.python_version_tuple()[:2]}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def emulation(launching: bool) -> Iterator[None]:
    """Compile kernels for sm_90 and launch them without a GPU, on CPU tensors: emulated, or doing nothing."""
    sys.path.append(str(ROOT / "tests"))
    from emulator import driver

    from bench.host import taking_any_tensor

    with driver.emulation() as device, taking_any_tensor():
        if not launching:
            device.launching = lambda launch, tensors: None
        yield
