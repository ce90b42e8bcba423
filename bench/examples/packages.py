"""Packages of Debian and of PyPI, unpacked in a folder: none is installed, so none of it needs root."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PATIENCE = 600  # seconds for a package


class MissingError(Exception):
    """Tell that a package cannot be had; the message names it and says why."""


def unpack_debian(name: str, packages: Path) -> tuple[Path, str]:
    """Return the folder that a package of Debian is unpacked in, and the package's name with its version."""

    def unpack(folder: Path) -> None:
        _call(name, ["apt-get", "download", name], folder)
        _call(name, ["dpkg-deb", "-x", next(folder.glob("*.deb")).name, "content"], folder)

    return _unpack_once(name, "*.deb", packages, unpack)


def unpack_wheel(name: str, version: str, packages: Path) -> tuple[Path, str]:
    """Return the folder that a package of PyPI is unpacked in, and the package's name with its version."""

    def unpack(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        _call(name, [*pip, "--only-binary=:all:", f"{name}=={version}"], folder)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as file:
            file.extractall(folder / "content")

    return _unpack_once(name, "*.whl", packages, unpack)


def _unpack_once(name: str, kind: str, packages: Path, unpack: Callable[[Path], None]) -> tuple[Path, str]:
    """Let unpack fill a folder that gets its name when it is complete; return its content and the package's name."""
    folder = packages / name
    if not folder.exists():
        packages.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=packages) as temporary:
            part = Path(temporary) / name
            part.mkdir()
            unpack(part)
            part.rename(folder)
    return folder / "content", next(folder.glob(kind)).stem


def _call(package: str, command: list[str], folder: Path) -> None:
    """Run a command in a folder, without what it prints; raise a MissingError with its last line where it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"{package}: {error}") from None
    if done.returncode:
        last = (done.stderr.split("\n\n")[0].strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise MissingError(f"{package}: {Path(command[0]).name}: {last}")
