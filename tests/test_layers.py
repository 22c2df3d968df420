"""The layers: a module imports only from rows below its own, also inside functions, and the picture shows the same rows."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "scripts/draw_architecture.py")
picture = importlib.util.module_from_spec(spec)
spec.loader.exec_module(picture)

ROWS = [set(layer) for layer in picture.LAYERS]


def contract():
    tomllib = pytest.importorskip("tomllib")
    (found,) = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    return found


def exceptions():
    return [tuple(line.split(" -> ")) for line in contract().get("ignore_imports", ())]


def test_there_are_at_most_three_exceptions():
    assert len(exceptions()) <= 3


def test_the_picture_has_the_rows_of_the_contract():
    *rows, ground = [set(re.findall(r"\w+", row)) for row in contract()["layers"]]
    assert [*rows, {"ground"}] == ROWS
    assert ground == picture.GROUND
    assert set(contract()["exhaustive_ignores"]) == picture.SHIMS - {"__init__"}


@pytest.mark.parametrize("package", sorted(picture.sources()))
def test_imports_come_from_rows_below(package):
    """Also of trainers/ and datasets/, which import-linter does not see, as they stand outside gram_meta/."""
    row = next(number for number, names in enumerate(ROWS) if package in names)
    allowed = {package}.union(*ROWS[row + 1 :])
    for importer, imported in exceptions():
        if importer.split(".")[1] == package:
            allowed.add(imported.split(".")[1])
    files = picture.sources()
    wrong = {str(path): picture.imported(path) & set(files) - allowed for path in files[package]}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_only_the_registration_names_the_trainers():
    """The registration in coop/register.py imports trainers/ by name; datasets/ is imported by tools and commands too."""
    files = picture.sources()
    importers = {name for name in files for path in files[name] if "trainers" in picture.imported(path)} - {"trainers"}
    assert importers == set()
    datasets = {name for name in files for path in files[name] if "datasets" in picture.imported(path)} - {"datasets"}
    assert datasets <= {"tools", "commands"}


def test_import_linter_keeps_the_contract():
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command as main; main()"
    command = [sys.executable, "-c", code, "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
