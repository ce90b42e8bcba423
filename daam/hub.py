"""Lay out a kernel package for Hugging Face's hub: `python -m daam.hub [folder]`, or `make hub`.

The folder holds what `kernel-builder` takes, build.toml and torch-ext/, and what it makes of that, build/, which
`kernels` loads: from a disk with `get_local_kernel` and `LocalLayerRepository`. The package is part of this one, with
functions and stateless layers (`layers.py`), and needs nothing but torch and Triton. It has no name to be imported by,
so it runs beside another `daam`, and beside other versions of itself: imports are made relative, and operators are
named after the package (`ops.NAMESPACE`). What the hub asks for is syntax of Python 3.9.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

NAME, VERSION, LICENSE = "daam-triton", 1, "Apache-2.0"  # VERSION: of the hub's branch v1, until an interface breaks
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
PACKAGE = Path(__file__).parent
ENTRIES = ("backend", "block", "functional", "layers")  # what users call, and whatever these import

INIT = '''"""Density adaptive attention (DAAM, arXiv 2401.11143) on Triton kernels, with an eager fallback."""

from . import layers
from .backend import backend_for, use_backend
from .block import density_block, fusion_for
from .functional import density_attention, density_gate, mixture_attention, stable_mixture_attention

__all__ = [
    "backend_for",
    "density_attention",
    "density_block",
    "density_gate",
    "fusion_for",
    "layers",
    "mixture_attention",
    "stable_mixture_attention",
    "use_backend",
]
'''
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""
CARD = f"""---
library_name: kernels
license: {LICENSE.lower()}
---
# Density adaptive attention

Functions and layers of daam-triton, laid out by its `python -m daam.hub`: pure Triton, with an eager fallback.

    import daam
    from pathlib import Path
    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    replace_kernel_forward_from_hub(daam.MultiHeadDAAM, "MultiHeadDAAM")  # of classes of yours: the decorator
    layer = LocalLayerRepository(Path("here"), layer_name="MultiHeadDAAM")
    with use_kernel_mapping({{"MultiHeadDAAM": {{"cuda": layer}}}}):
        model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cuda")
"""


def lay_out(folder: str | Path) -> Path:
    """Write the package into a folder, in place of one that is there, and return its path.

    Raises:
        FileExistsError: the folder has something else in it.
    """
    folder = Path(folder)
    build = folder / "build.toml"
    if folder.exists() and any(folder.iterdir()) and not (build.exists() and f'"{NAME}"' in build.read_text()):
        raise FileExistsError(f"{folder} holds no build.toml of {NAME}, expected its package, an empty folder or none")
    files = {"__init__.py": INIT} | {name: port(text, name) for name, text in _collect().items()}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:7]
    module = NAME.replace("-", "_")
    written = {f"torch-ext/{module}/{name}": text for name, text in files.items()}
    for backend in BACKENDS:
        metadata = {
            "id": f"_{module}_{backend}_{digest}", "name": NAME, "version": VERSION, "license": LICENSE,
            "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        variant = files | {"metadata.json": json.dumps(metadata, indent=2) + "\n"}
        written |= {f"build/torch-{backend}/{name}": text for name, text in variant.items()}
    for part in ("torch-ext", "build"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for name, text in (written | {"build.toml": BUILD, "README.md": CARD}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _collect() -> dict[str, str]:
    """Return the sources of the package by their paths in it: the entries, all of daam that they import, and whole
    folders of what is imported by name when it is called.
    """
    files = {
        f"{folder}/{path.name}": path.read_text(encoding="utf-8")
        for folder in ("kernels", "reference")
        for path in sorted((PACKAGE / folder).glob("*.py"))
    }
    wanted = list(ENTRIES)
    while wanted:
        name = f"{wanted.pop()}.py"
        if name in files or not (PACKAGE / name).exists():  # or no module, but a folder, or a name in one
            continue
        files[name] = text = (PACKAGE / name).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "daam":
                wanted += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("daam."):
                wanted.append(node.module.split(".")[1])
    return files


def port(source: str, path: str) -> str:
    """Return a module's source, of its path in the package, with relative imports and without keywords of Python 3.10,
    none of which changes what a right call does.
    """
    dots = "." * (1 + path.count("/"))
    source = re.sub(r"^( *from )daam(?:\.([\w.]+))?(?= import )", rf"\1{dots}\2", source, flags=re.MULTILINE)
    return re.sub(r", strict=(True|False)(?=\))|slots=True, ", "", source)


if __name__ == "__main__":
    print(lay_out(*sys.argv[1:2] or ["build/hub"]))
