"""A small part of the soak, which needs no more than `gram embed`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the soak forks and mounts")]


def test_one_trial_of_each_kind(tmp_path):
    names = [
        "kill embed",
        "kill pretrain",
        "writers embed",
        "disk embed",
        "edit plan.json of an embedding",
        "edit demo.json",
    ]
    argv = [sys.executable, str(Path(__file__).parent), "--trials", *[f"{name} 0" for name in names]]
    done = subprocess.run([*argv, "-o", str(tmp_path / "soak.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = json.loads((tmp_path / "soak.json").read_text())["counts"]
    assert sum(count["tried"] for kind in counts.values() for count in kind.values()) in (len(names) - 1, len(names))
    assert all(count["lost"] == 0 for kind in counts.values() for count in kind.values())
    assert (tmp_path / "soak.md").read_text().startswith("| kind | on | tried | disturbed | survived | lost |")
