"""What importing the package does, and what it needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BLOCKED = """if True:
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    if HOW == "finder":
        sys.meta_path.insert(0, Block())
    else:
        sys.modules["triton"] = None
    import torch, daam
    x = torch.randn(2, 6, 4, requires_grad=True)
    layer = daam.MultiHeadDAAM(4, 3)
    y, weights = layer(x, return_weights=True)
    (y.sum() + weights.sum()).backward()
    assert x.grad.abs().sum() > 0 and layer.c.grad.abs().sum() > 0
    assert daam.backend_for(x)[0] == "eager"
    try:
        layer.backend = "triton"
        layer(x)
    except RuntimeError as error:
        assert "Triton is not installed" in str(error), error
    else:
        raise AssertionError("no error")
"""


def python(code: str, **options) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("how", ["finder", "sys.modules"])
def test_works_where_triton_cannot_be_imported(how):
    python(f"HOW = {how!r}\n" + BLOCKED)


def test_import_needs_torch_alone_and_leaves_triton_alone():
    python(
        """if True:
        import sys
        for name in ("matplotlib", "sklearn", "tqdm", "numpy.testing", "pytest"):
            sys.modules[name] = None
        import daam
        assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
        assert daam.__all__ == sorted(daam.__all__) and all(hasattr(daam, name) for name in daam.__all__)
        """
    )


def test_kernels_are_one_module_under_daam():
    python(
        "import daam.kernels.layout, sys; assert 'kernels' not in sys.modules and 'daam.kernels.layout' in sys.modules"
    )


def test_wheel(tmp_path):
    """Only `daam` at the top, kernels inside as files, no dependency but torch."""
    pytest.importorskip("setuptools")
    import shutil

    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "demo-output", "tests"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {n.partition("/")[0] for n in names if ".dist-info" not in n} == {"daam"}
    assert {"daam/kernels/density.py", "daam/recipes/digits.py", "daam/py.typed"} <= set(names)
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11"]
