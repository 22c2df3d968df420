"""The notebook runs from top to bottom anywhere, and its stored outputs come from its code.

`python tests/demo/test_notebook.py` runs it and stores the outputs.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "gram_in_five_minutes.ipynb"
PLOTS = 6


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook):
    """Return a hash of the code; the stored notebook names that of the code that made its outputs."""
    return hashlib.sha256(json.dumps([cell.source for cell in code_of(notebook)]).encode()).hexdigest()


def without_outputs(notebook):
    for cell in code_of(notebook):
        cell.outputs, cell.execution_count, cell.metadata = [], None, {}
    return notebook


def run(notebook, folder):
    """Run it in `folder`, with an own folder for temporary files beside; return the run notebook."""
    (folder / "here").mkdir()
    (folder / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "temporary")}
    client = nbclient.NotebookClient(notebook, timeout=550, kernel_name="python3")
    with client.setup_kernel(cwd=str(folder / "here"), env=environment):
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)  # raises for a cell that fails
    return notebook


def kinds(notebook):
    """Return for each code cell its kinds of outputs: texts by stream, pictures and values by type."""
    return [
        [
            output.get("name") or next(iter(sorted(output.data)))
            for output in cell.outputs
            if "data" in output or "name" in output
        ]
        for cell in code_of(notebook)
    ]


def check_finished(notebook):
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert sum(kind == "image/png" for cell in kinds(notebook) for kind in cell) == PLOTS
    assert "image/png" in kinds(notebook)[-1]


def test_the_stored_outputs_are_of_a_whole_run_of_this_code():
    notebook = read()
    check_finished(notebook)
    assert notebook.metadata["outputs_of"] == digest(notebook), "the code has changed: run this file as a program"
    assert NOTEBOOK.stat().st_size < 700_000
    assert "stderr" not in [kind for cell in kinds(notebook) for kind in cell]
    nbformat.validate(notebook)


def test_it_uses_the_public_api_alone():
    source = "\n".join(cell.source for cell in code_of(read()))
    imports = [line for line in source.splitlines() if "gram_meta" in line and "import" in line]
    assert imports == ["import gram_meta as gram", "from gram_meta.demo.world import write_world"]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    stored = read()
    ran = run(without_outputs(read()), tmp_path)
    check_finished(ran)
    assert digest(ran) == digest(stored) == stored.metadata["outputs_of"]
    assert kinds(ran) == kinds(stored)
    left = sorted(path.name for path in (tmp_path / "here").iterdir() if not path.name.startswith("."))
    assert left == []  # it writes to a temporary folder alone


if __name__ == "__main__":
    import tempfile

    begun, before = time.monotonic(), getrusage(RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        ran = run(without_outputs(read()), Path(folder))
    check_finished(ran)
    ran.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "outputs_of": digest(ran),
    }
    nbformat.write(ran, NOTEBOOK)
    after = getrusage(RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{time.monotonic() - begun:.0f} s, {processor:.0f} s of processor time, {NOTEBOOK.stat().st_size:,} bytes")
    sys.exit(0)
