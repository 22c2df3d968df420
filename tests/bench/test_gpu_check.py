"""scripts/gpu: the check of a GPU, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu" / "check.sh"


def check(out, *words):
    """Run the script; return its process, and the rows of check.json."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    argv = ["bash", SCRIPT, "--device", "cpu", "-o", out, "--minutes", "30", *words]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    return done, json.loads((out / "check.json").read_text())["checks"]


def test_a_selection_on_the_cpu(tmp_path):
    """What a check needs runs before it; a comparison prints its errors; the table has every check."""
    done, rows = check(tmp_path, "--limit", "900", "--only", "step CoOpGRAM", "test batch of 1,000")
    assert done.returncode == 0, done.stdout
    timed = "time CoOp test batch of 1,000 classes"
    checks = ["embed", "cluster", "pretrain text fp32", "compare step CoOpGRAM", timed]
    assert list(rows) == [*checks, "repeat step CoOpGRAM"]
    assert all(row["state"] == "passed" and row["seconds"] > 0 for row in rows.values())
    last = rows["compare step CoOpGRAM"]["last line"]
    errors = dict(pair.split() for pair in last.removeprefix("relative errors ")[:-1].split(", "))
    assert float(errors["fp32"]) == 0 < float(errors["fp16"]) < 0.05 and 0 < float(errors["bf16"]) < 0.3
    log = (tmp_path / "logs" / "compare step CoOpGRAM.txt").read_text()
    (line,) = (line for line in log.splitlines() if line.startswith("bf16: "))
    change = float(line.partition("change of prompt_learner.ctx ")[2])
    assert 0 < change <= float(errors["bf16"])  # of the prompt by the step
    table = (tmp_path / "check.md").read_text()
    assert "| compare step CoOpGRAM " in table and f"## {timed}" in table
    assert (tmp_path / f"{timed.replace(' ', '_')}.json").is_file() and table in done.stdout


def test_a_failure_is_named_and_what_needs_it_does_not_run(tmp_path):
    """A check that is stopped has failed; the exit status is 1."""
    done, rows = check(tmp_path, "--limit", "0.01", "--only", "cluster", "check-data")
    assert done.returncode == 1
    assert rows["embed"]["state"] == "failed" and rows["embed"]["last line"] == "killed after 0.01 s"
    assert rows["cluster"] == {"state": "not run", "seconds": None, "last line": "needs embed"}
    assert rows["check-data"]["state"] == "failed" and "2 failed" in done.stdout


CHECKOUTS = os.environ.get("GRAM_CHECKOUTS", "")


def test_checkouts_are_timed_where_they_are_given(tmp_path):
    """--checkouts adds a check for each; a folder without them fails with a sentence."""
    done, rows = check(tmp_path, "--limit", "900", "--only", "against", "--checkouts", CHECKOUTS or tmp_path)
    assert list(rows) == [f"time {name} against its checkout" for name in ("CoOp", "CoCoOp", "ProMetaR")]
    if CHECKOUTS:
        assert done.returncode == 0, done.stdout
        assert all(text in done.stdout for text in ("| CoOp, its checkout ", "| ProMetaR, its checkout "))
    else:
        last = [row["last line"] for row in rows.values()]
        assert all("expected a checkout with a train.py, found none" in line for line in last), last
        assert done.returncode == 1
