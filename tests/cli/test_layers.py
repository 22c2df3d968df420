"""The order of the packages: who may import whom, imports inside functions included.

`lint-imports` checks the layers of `gram_meta` (pyproject.toml). It does not see `trainers/` and `datasets/`, which are
mapped into the package on installation, nor circles of modules inside a package. This file checks both.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED = {"trainers": "report", "datasets": "clustering"}  # folder -> the layer that it stands beside
NO_LAYER = ("gram_meta", "gram_meta.api")  # the public API: imported by users alone
REGISTERS_THEM = {"gram_meta.coop.register"}


def layers():
    """Return the names of layers from high to low, each with its height, from the contract in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = re.search(r"^layers = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    groups = [re.findall(r"\w+", group) for group in re.findall(r'^ *"(.*)",', lines, re.MULTILINE)]
    heights = {name: -i for i, group in enumerate(groups) for name in group}
    return heights | {folder: heights[beside] for folder, beside in MAPPED.items()}


def modules():
    """Return path and package flag of every module by its installed name."""
    found = {}
    for folder in ("gram_meta", *MAPPED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "gram_meta" else ("gram_meta", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, known):
    """Yield the modules of this project that a file imports anywhere, but under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def test_the_modules_import_downwards(graph):
    heights, wrong = layers(), []
    for name, targets in graph.items():
        if name in NO_LAYER:
            continue
        own = name.split(".")[1]
        for target in targets - {"gram_meta"}:
            assert target not in NO_LAYER or own == "commands", f"{name} imports {target}, which is for users"
            other = target.split(".")[1] if target not in NO_LAYER else own
            if other != own and heights[other] > heights[own]:
                wrong.append(f"{name} -> {target}")
    assert wrong == []


def test_only_the_registration_imports_trainers_and_datasets(graph):
    """Commands and tools may look into `datasets`; everything else gets classes from Dassl's registries."""
    for name, targets in graph.items():
        own, used = name.split(".")[1:2], {".".join(target.split(".")[:2]) for target in targets}
        if own not in (["trainers"], ["datasets"]) and name not in REGISTERS_THEM:
            assert "gram_meta.trainers" not in used, name
            assert "gram_meta.datasets" not in used or own in (["tools"], ["commands"]), name


def test_no_module_is_part_of_a_circle(graph):
    assert [sorted(circle) for circle in circles({k: v - {"gram_meta"} for k, v in graph.items()})] == []


def circles(graph):
    """Return the strongly connected components of more than one module (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(component)

    for name in graph:
        if name not in index:
            visit(name)
    return found


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="import-linter is in the extra `dev`")
def test_the_contract_of_import_linter_holds():
    # in a process of its own: import-linter disables the loggers of other packages, and adds ROOT to sys.path
    code = "from importlinter import cli; raise SystemExit(cli.lint_imports(cache_dir=None))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_picture_is_drawn_from_the_imports_of_today():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/draw_architecture.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_places_that_architecture_md_names_are_there():
    rows = re.findall(r"^\| .* \| (.*) \|$", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.MULTILINE)
    places = [place for row in rows for place in re.findall(r"`([\w.]+)`(?: and `(\w+)`)? in `([\w/]+\.py)`", row)]
    assert len(places) >= 18
    for *names, file in places:
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in filter(None, ".".join(names).split(".")):
            assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b.* = ", code, re.MULTILINE), f"{name} in {file}"
