"""What importing the package does, and what it needs."""

import shutil
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


@pytest.mark.parametrize("hindrance", ["finder", "sys.modules"])
def test_works_where_triton_cannot_be_imported(hindrance):
    python(f"HOW = {hindrance!r}\n" + BLOCKED)


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
        "import daam.kernels.operands, sys;"
        "assert 'kernels' not in sys.modules and 'daam.kernels.operands' in sys.modules"
    )


def checkout(path: Path, linked: bool) -> Path:
    """Return a folder with a copy of what is built. Its daam/kernels is the symbolic link, or the file that git makes
    of one on Windows.
    """
    for name in ("daam", "kernels"):
        shutil.copytree(ROOT / name, path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, path)
    if not linked:
        (path / "daam/kernels").unlink()
        (path / "daam/kernels").write_text("../kernels")
    return path


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


@pytest.mark.parametrize("linked", [True, False])
def test_wheel(linked, tmp_path):
    """Check that a wheel holds only `daam` at the top, kernels inside as files, and no dependency but torch; and so by
    way of an sdist.
    """
    pytest.importorskip("setuptools")
    source = checkout(tmp_path / "source", linked)
    if not linked:
        # as pip calls it, without the folder on the path: setuptools imports `kernels.locking` of Hugging Face's there
        code = "import sys; sys.path[:1] = []; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=source)
        (source,) = tmp_path.glob("*.tar.gz")
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {n.partition("/")[0] for n in names if ".dist-info" not in n} == {"daam"}
    kernels = {f"daam/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels == {n for n in names if n.startswith("daam/kernels/")}
    assert {"daam/recipes/digits.py", "daam/py.typed"} <= set(names)
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11"]


IN_PLACE_THEN_INSTALLED = """if True:
    import importlib.util, pathlib, sys
    import torch

    ours = [path for path in sys.path if path not in ("", ROOT)]
    sys.meta_path = [one for one in sys.meta_path if "Editable" not in str(one)]
    sys.path = [SOURCE, *ours]
    try:
        import daam
    except ImportError as error:
        assert "symbolic link" in str(error) and "pip install -e ." in str(error), error
    else:
        raise AssertionError("no error")

    for name in [name for name in sys.modules if name.partition(".")[0] == "daam"]:
        del sys.modules[name]
    sys.path = ours
    spec = importlib.util.spec_from_file_location("finder", FINDER)
    finder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(finder)
    finder.install()
    import daam, daam.kernels.operands, daam.ops
    assert pathlib.Path(daam.__file__) == pathlib.Path(SOURCE, "daam/__init__.py"), daam.__file__
    assert pathlib.Path(daam.kernels.operands.__file__) == pathlib.Path(SOURCE, "kernels/operands.py")
    assert {"density.py", "operands.py", "tile.py"} <= {path.name for path in daam.ops._SOURCES}
    daam.density_attention(torch.ones(2, 6, 4), torch.ones(2, 4), torch.ones(2, 4))
"""


def test_a_checkout_without_links(tmp_path):
    """Check that such a checkout says what to do in place, and, installed with -e, runs its own files, kernels among
    them.
    """
    pytest.importorskip("setuptools")
    source = checkout(tmp_path / "source", linked=False)
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", tmp_path / "prefix")
    pip("install", "-q", *options, "-e", source)
    (finder,) = tmp_path.glob("prefix/**/__editable__*finder.py")
    paths = f"ROOT, SOURCE, FINDER = {str(ROOT)!r}, {str(source)!r}, {str(finder)!r}\n"
    python(paths + IN_PLACE_THEN_INSTALLED)
