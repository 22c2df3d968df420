"""The scripts of scripts/bench as modules."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench_script():
    """Import a script by its name; its neighbours are importable until the module of tests ends."""
    threads, before = torch.get_num_threads(), set(sys.modules)
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCH))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(BENCH)):
            del sys.modules[name]
