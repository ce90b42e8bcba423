"""Rules that a machine can hold: how docstrings begin, names and lengths in kernels/, imports without circles."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCSTRINGS = (
    *("kernels", "daam", "daam/reference", "daam/recipes", "bench", "bench/device", "bench/examples"),
    *("tests", "tests/bench", "tests/daam", "tests/emulator", "tests/kernels"),
    *("tests/hardening", "tests/laws", "tests/mutants"),
)
IMPORTS = ("daam", "daam/recipes", "daam/reference", "daam/kernels", "bench", "bench/device", "bench/examples")
VERBS = (  # that a docstring may begin with, in the imperative: others may be added, nouns may not
    "Access|Add|Answer|Append|Assert|Attend|Average|Build|Call|Check|Choose|Classify|Compare|Compile|Compute|Copy|Count|Cut|"
    "Decode|Define|Describe|Draw|Embed|Encode|End|Explain|Fail|Fill|Find|Freeze|Gate|Give|Hold|Import|Include|Keep|Launch|Leave|Let|List|"
    "Load|Make|Mark|Measure|Merge|Move|Note|Number|Open|Pack|Parse|Pass|Plan|Plot|Print|Profile|Put|Raise|Read|Record|Register|Replace|Report|"
    "Reset|Return|Run|Save|Say|Scale|Seed|Send|Set|Share|Show|Spare|Split|Stand|Store|Sum|Take|Tell|Time|Train|Turn|Weigh|Write|Yield"
)
FUNCTION_WORDS = "at|own|spot|apart|rest|share|there|less|only|added|under|away|of"  # no names of values
SEQUENCES = (  # read by number; the second line: lists of blocks in kernels
    "shape|sizes|strides|grid|args|operands|parts|groups|a|b|blocks|centred|factor|inv_c|products|totals"
)


def verbless_docstring(node):
    text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
    return [ascii(text[:60])] if text is not None and not re.match(rf"({VERBS})\b[, ]", text) else []


def empty_name(node):
    stored = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else ""
    name = node.arg if isinstance(node, ast.arg) else node.name if isinstance(node, ast.FunctionDef) else stored
    return [name] if re.fullmatch(rf"_*({FUNCTION_WORDS})_*", name) else []


def too_long(node):
    if isinstance(node, ast.Module):
        return [f"{n.end_lineno} lines" for n in node.body[-1:] if n.end_lineno > 350]
    decorators = " ".join(map(ast.unparse, getattr(node, "decorator_list", ())))
    if "triton.jit" not in decorators:
        return []
    words = f"{decorators} {node.name}"
    kernel = re.search("forward|backward|_(sums|scales|stats)$|repr=", words) or "tl.program_id(" in ast.unparse(node)
    sizes = [(node.end_lineno - node.lineno + 1, 45 if kernel else 25, "lines")]
    sizes += [(len(node.args.args), 16, "parameters")] if kernel else []
    return [f"{node.name} has {size} {what}, at most {most}" for size, most, what in sizes if size > most]


def record_by_number(node):
    index, value = getattr(node, "slice", None), getattr(node, "value", None)
    number = getattr(getattr(index, "operand", index), "value", None)
    name = getattr(getattr(value, "func", value), "attr", getattr(getattr(value, "func", value), "id", ""))
    return [ast.unparse(node)] if type(number) is int and not re.fullmatch(rf"_*({SEQUENCES})", name) else []


def nameless_number(node):
    inside = ast.walk(node) if isinstance(node, ast.FunctionDef) else ()
    numbers = {repr(n.value) for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, float)}
    return [n for n in sorted(numbers) if len(n.split("e")[0].replace(".", "").strip("0")) > 6]


def offenders(rule, sources):
    """Return path:line: what of everything in sources, texts by path, that a rule forbids."""
    nodes = [(path, node) for path, text in sources.items() for node in ast.walk(ast.parse(text))]
    return sorted(f"{path}:{getattr(node, 'lineno', 1)}: {what}" for path, node in nodes for what in rule(node))


def circles(sources):
    """Return path:line: modules of imports outside functions that are part of a circle; sources are texts by path."""
    modules, imports = {re.sub(r"(/__init__)?\.py$", "", path).replace("/", "."): path for path in sources}, []
    for module, path in modules.items():
        nodes, package = [ast.parse(sources[path])], module if "__init__" in path else module.rpartition(".")[0]
        while nodes:
            node = nodes.pop()
            nodes += [] if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)
            level, base = getattr(node, "level", 0), getattr(node, "module", None) or ""
            base = f"{package.rsplit('.', level - 1)[0]}.{base}" if level else base
            for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                target = f"{base}.{alias.name}".replace("..", ".").strip(".")
                while target and target not in modules:
                    target = target.rpartition(".")[0]
                imports += [(module, target, node.lineno)] if target else []
    reachable = {module: {module} for module in modules}
    for module, target, _ in imports * len(modules):
        reachable[module] |= reachable[target]
    return sorted(f"{modules[m]}:{line}: {m}, {t}" for m, t, line in imports if m in reachable[t])


def read(folders):
    return {str(path.relative_to(ROOT)): path.read_text() for name in folders for path in (ROOT / name).glob("*.py")}


KERNEL = "@triton.jit\ndef _{}({}):\n{}"
RULES = [  # and what each refuses, and lets pass
    (verbless_docstring, 'def f(): """The tile."""', 'def f(): """Return the tile."""'),
    (empty_name, "for at in x: pass", "def f(x): x.at = y.own"),
    (too_long, KERNEL.format("sum", "", " x\n" * 25), KERNEL.format("sum", "", " x\n" * 24)),
    (too_long, KERNEL.format("forward", "", " x\n" * 45), KERNEL.format("forward", "", " x\n" * 44)),
    (too_long, KERNEL.format("forward", ", ".join("abcdefghijklmnopq"), " x"), "\n" * 349 + "x"),
    (too_long, "\n" * 350 + "x", KERNEL.format("sum", ", ".join("abcdefghijklmnopq"), " x")),
    (record_by_number, "gaussians[k][1]", "x.shape[0] + gaussians[k] + args[-1]"),
    (nameless_number, "def f(): return 0.7213475 * x", "HALF_LOG2_E = 0.7213475\ndef f(): return 1e-12"),
]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _, _ in RULES))
def test_nothing_offends(rule):
    found = offenders(rule, read(DOCSTRINGS if rule is verbless_docstring else ("kernels",)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("rule", "refused", "passed"), RULES)
def test_rules_can_fail(rule, refused, passed):
    assert offenders(rule, {"": refused}) and not offenders(rule, {"": passed})


def test_imports_form_no_circle():
    sources = {"bench/a.py": "if x:\n from . import b", "bench/b.py": "from bench.a import c"}
    assert len(circles(sources)) == 2 and not circles(sources | {"bench/b.py": "def f():\n from .a import c"})
    assert not (found := circles(read(IMPORTS))), "\n".join(found)
