"""The package for Hugging Face's kernel hub, and that their `kernels` loads it."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import daam
from daam import hub

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Return the folder of a package."""
    return hub.lay_out(tmp_path_factory.mktemp("hub") / "package")


def load(folder, name):
    """Return the package in a folder, imported under a name."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def twice(package):
    """Yield the package imported under two names, beside this one and a module that is called daam in vain."""
    ours, sys.modules["daam"] = sys.modules["daam"], None
    yield load(package / "build/torch-cpu", "_a_random_name"), load(package / "torch-ext/daam_triton", "another")
    sys.modules["daam"] = ours
    for name in [name for name in sys.modules if name.partition(".")[0] in ("_a_random_name", "another")]:
        del sys.modules[name]


def later_than_3_9(node):
    """Return what of a node Python 3.9 does not have: only what parses there by its grammar is left to look for."""
    names = ("pairwise", "slots", "strict", "kw_only", "bit_count", "ParamSpec", "TypeAlias", "assert_type")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        return [ast.unparse(node)] if isinstance(node.args[1], ast.BinOp) else []
    name = getattr(node, "attr", getattr(node, "arg", getattr(node, "name", "")))
    return [name] if name in names and not isinstance(node, ast.arg) else []


def foreign_import(node):
    """Return the module that an import asks for, where it is none of the package's, torch, Triton or Python's own."""
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    if isinstance(node, ast.ImportFrom):
        return [] if node.level or node.module.partition(".")[0] in allowed else [node.module]
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return [name for name in names if name.partition(".")[0] not in allowed]


def test_sources_are_python_3_9_and_import_relatively(package):
    sources = sorted((package / "torch-ext/daam_triton").rglob("*.py"))
    assert {"layers.py", "ops.py", "gated.py", "operands.py", "mixture.py"} <= {path.name for path in sources}
    found = []
    for path in sources:
        tree = ast.parse(path.read_text(), feature_version=(3, 9))
        tree.body = [node for node in tree.body if ast.unparse(getattr(node, "test", node)) != "TYPE_CHECKING"]
        for node in ast.walk(tree):
            what = [*later_than_3_9(node), *foreign_import(node)]
            found += [f"{path.name}:{node.lineno}: {one}" for one in what]
        assert "annotations" in path.read_text() or "|" not in path.read_text(), path.name
    assert not found, "\n".join(found)
    faults = "import numpy\nfrom daam import ops\nzip(a, b, strict=True)\nisinstance(a, int | float)"
    nodes = list(ast.walk(ast.parse(faults)))
    assert sorted(what for node in nodes for what in (*later_than_3_9(node), *foreign_import(node))) == [
        "daam", "isinstance(a, int | float)", "numpy", "strict",
    ]  # fmt: skip


def test_variants_are_the_sources_with_an_id_of_their_own(package):
    sources = {p.name: p.read_text() for p in (package / "torch-ext/daam_triton").glob("*.py")}
    ids = set()
    for backend in ("cpu", "cuda", "rocm", "xpu"):
        folder = package / f"build/torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert {p.name: p.read_text() for p in folder.glob("*.py")} == sources
        assert metadata["backend"] == {"type": backend} and metadata["id"].isidentifier()
        ids.add(metadata["id"])
    assert len(ids) == 4
    digest, first = {name.rpartition("_")[2] for name in ids}, (package / "build.toml").read_text()
    assert len(digest) == 1 and 'name = "daam-triton"' in first and "[torch-noarch]" in first
    (package / "build/torch-cpu/stale.py").touch()
    assert hub.lay_out(package) == package and not (package / "build/torch-cpu/stale.py").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds no build\.toml"):
        hub.lay_out(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_copies_have_operators_of_their_own(twice):
    x, p = torch.randn(2, 6, 4), torch.rand(3, 4) + 0.5
    expected = daam.density_attention(x, p, p)
    for copy, namespace in zip(twice, ("_a_random_name", "another"), strict=True):
        assert torch.equal(copy.density_attention(x, p, p), expected)
        compiled = torch.compile(copy.density_attention, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, p, p), expected)
        op = sys.modules[f"{namespace}.ops"].OPERATORS["density"].op
        assert op.namespace == namespace
        assert torch.equal(op(x, p, p, None, 1, 2, 1e-5, False, False, "eager", "")[0], expected)


@pytest.mark.kernel
def test_kernels_of_a_copy_run(twice, device):
    """Check both passes of a function and of the fused gate against this package's eager ones, in fp64."""
    copy = twice[0]
    x, p = (torch.randn(2, 6, 4, dtype=torch.float64, device=device) for _ in range(2))
    p = p[0, :3].abs() + 0.5
    gate = daam.DensityGate(6).to(x)
    for name in ("mean_offsets", "log_sigma"):
        getattr(gate.gaa, name).data.normal_()

    def run(attend, gated, backend):
        gate.backend, given = backend, [x.clone().requires_grad_(), p.clone().requires_grad_()]
        y, (z, _gate) = attend(given[0], given[1], p, backend=backend), gated(gate, given[0])
        return y, z, *torch.autograd.grad((y * y * z).sum(), [*given, *gate.parameters()])

    found = run(copy.density_attention, copy.layers.DensityGate.forward, "triton")
    for one, other in zip(found, run(daam.density_attention, daam.DensityGate.forward, "eager"), strict=True):
        assert (one - other).abs().max() <= 1e-11 * (1 + other.abs().max())


LOADED = """if True:
    import sys
    sys.modules["daam"] = None  # PyPI's, or none
    from pathlib import Path
    import torch
    from torch import nn
    import kernels
    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub
    assert Path(kernels.__file__).parents[1] != Path(ROOT), kernels.__file__
    package = kernels.get_local_kernel(Path(PACKAGE))
    del sys.modules["daam"]
    sys.path.insert(0, ROOT)
    import daam
    assert Path(daam.__file__) == Path(ROOT, "daam/__init__.py")

    def put(model, name):
        repository = LocalLayerRepository(Path(PACKAGE), layer_name=name)
        with kernels.use_kernel_mapping({name: {"cpu": repository}}, inherit_mapping=False):
            kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
        forward = next(m for m in model.modules() if hasattr(type(m), "kernel_layer_name")).forward
        builds = "_daam_triton_cpu_", "_daam_triton_cuda_"  # by what torch was built for
        assert forward.__module__.startswith(builds), forward.__module__

    def values(model, x, *args, **options):
        x = x.clone().requires_grad_()
        out = model(x, *args, **options)
        outputs = [out] if isinstance(out, torch.Tensor) else list(out)
        return outputs + list(torch.autograd.grad(outputs[0].square().sum(), [x, *model.parameters()]))

    torch.manual_seed(0)
    x, mask = torch.randn(2, 6, 8), torch.arange(6) < torch.tensor([[6], [4]])
    layers = {
        "MultiHeadDAAM": (daam.MultiHeadDAAM(8, 3, residual=True), [{"mask": mask}, {"return_weights": True}]),
        "DensityAdaptiveAttention": (daam.DensityAdaptiveAttention(-1, 1, 3, None), [{}]),
        "MultiHeadDensityAdaptiveAttention": (
            daam.MultiHeadDensityAdaptiveAttention(1, 2, 3), [{"mask": mask, "residual": True}]
        ),
        "StableMultiHeadDensityAttention": (
            daam.StableMultiHeadDensityAttention(1, 2, 3), [{"return_attention_details": True}]
        ),
        "DensityGate": (daam.DensityGate(6), [{}, {"mask": torch.arange(8).expand(2, 8) < 5}]),
    }
    for name, (layer, calls) in layers.items():
        for p in layer.parameters():
            p.data += 0.1 * torch.randn_like(p)
        expected = [values(layer, x, **options) for options in calls]
        replace_kernel_forward_from_hub(type(layer), name)
        put(layer, name)
        for options, numbers in zip(calls, expected):
            found = values(layer, x, **options)
            assert len(found) == len(numbers) and all(map(torch.equal, found, numbers)), (name, options)

    @kernels.use_kernel_forward_from_hub("MultiHeadDAAM")
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean_offset, self.c = nn.Parameter(torch.zeros(1, 8)), nn.Parameter(torch.ones(1, 8))
            self.norm_axis, self.eps, self.residual = 1, 1e-5, False

        def forward(self, x, mask=None, return_weights=False):
            raise NotImplementedError

    foreign = Foreign()
    put(foreign, "MultiHeadDAAM")
    expected = daam.density_attention(x, foreign.mean_offset, foreign.c)
    assert torch.equal(foreign(x), expected)
    assert torch.equal(package.density_attention(x, foreign.mean_offset, foreign.c), expected)
    assert sorted(package.__all__) == package.__all__ and all(hasattr(package, name) for name in package.__all__)
"""


def test_kernels_of_hugging_face_loads_it(package, tmp_path):
    """Check functions, every layer, and a class of someone else's, on a CPU. Elsewhere than in the root, whose folder
    `kernels` would be imported in place of theirs.
    """
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the extra: pip install 'daam-triton[hub]'")
    code = f"ROOT, PACKAGE = {str(ROOT)!r}, {str(package)!r}\n" + LOADED
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
