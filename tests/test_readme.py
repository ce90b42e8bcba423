"""The documents: what they tell a reader to run does run, what they link to is there, and they stay short."""

import json
import re
import warnings
from pathlib import Path

import matrix
import mutation
import pytest
import torch

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCUMENTS = sorted(
    {README, CONTRIBUTING, ROOT / "bench/history/README.md", *ROOT.glob("daam/*.md"), *ROOT.glob("kernels/*.md")}
)
# Blocks that cannot run alone, by how they begin, and who runs them.
ELSEWHERE = {"from torch.distributed": "needs two processes and a mesh: tests/daam/test_distributed.py runs it"}

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(document: Path) -> list[str]:
    """Return the Python blocks of a document, in order."""
    return re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def runnable(document: Path) -> list[str]:
    """Return those that must run on a CPU as they stand: all but those of ELSEWHERE."""
    return [block for block in blocks(document) if not block.startswith(tuple(ELSEWHERE))]


def run(code: str) -> dict:
    """Run a block in a namespace of its own and return that; a warning is an error."""
    names = {"__name__": "block"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, "a block of the documents", "exec"), names)
    return names


def missing_links(document: Path) -> list[str]:
    """Return the relative links and pictures of a document that point to no file."""
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S))
    paths = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    return [path for path in paths if path and not (document.parent / path).exists()]


def unknown_commands(document: Path) -> list[str]:
    """Return the targets of make, and the modules of this project, that a document names and nobody has."""
    text = document.read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    unknown = {
        f"make {name}" for name in re.findall(r"(?:`|^    )make ([a-z][\w-]*)", text, re.M) if name not in targets
    }
    for module in re.findall(r"python -m ((?:bench|daam)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            unknown.add(f"python -m {module}")
    return sorted(unknown)


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=f"{path.name}-{i}") for path in DOCUMENTS for i, code in enumerate(runnable(path))]
)
def test_a_block_runs_as_it_stands(code, monkeypatch):
    monkeypatch.delenv("DAAM_BACKEND", raising=False)
    with torch.random.fork_rng(devices=[]):
        run(code)


def test_the_quickstart_is_among_them_and_others_run_elsewhere():
    (quickstart,) = runnable(README)
    for call in ("density_attention(", "MultiHeadDAAM(", "mask=", "load_state_dict(", "backend"):
        assert call in quickstart
    assert "cuda" not in quickstart
    for start, why in ELSEWHERE.items():
        assert sum(block.startswith(start) for path in DOCUMENTS for block in blocks(path)) == 1, f"{start}: {why}"


@documents
def test_links_point_to_files(document):
    assert not missing_links(document)


@documents
def test_commands_exist(document):
    assert not unknown_commands(document)


@pytest.mark.parametrize(("document", "most"), [(README, 120), (CONTRIBUTING, 140)], ids=["README", "CONTRIBUTING"])
def test_it_is_short(document, most):
    lines = document.read_text().splitlines()
    assert len(lines) <= most
    assert not [f"line {i}: {len(line)} characters" for i, line in enumerate(lines, 1) if len(line) > 120]


def test_slips_are_counted():
    assert f"each of {len(mutation.load_all())} plausible slips" in README.read_text()


def test_versions_are_those_of_the_last_run():
    assert matrix.write_table(json.loads(matrix.KEPT.read_text())) in README.read_text()


def test_faults_are_found(tmp_path):
    """Check that the checks above can fail: an undefined name, a warning, a dead link, a command that is not there."""
    with pytest.raises(NameError):
        run("import daam\ndaam.density_attention(nowhere)")
    with pytest.raises(UserWarning):
        run("import warnings\nwarnings.warn('old')")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](https://example.org) [c](gone.md#here)\n\n    make nonsense\n\n`python -m daam.none`\n"
    )
    (tmp_path / "there.md").touch()
    assert missing_links(page) == ["gone.md"]
    assert unknown_commands(page) == ["make nonsense", "python -m daam.none"]
