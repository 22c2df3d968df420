"""docs/results/emoji-world.md says what docs/results/emoji.json says."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def fill_results():
    spec = importlib.util.spec_from_file_location("fill_results", ROOT / "scripts/experiments/fill_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_tables_are_those_of_the_committed_results():
    module, page = fill_results(), (ROOT / "docs/results/emoji-world.md").read_text(encoding="utf-8")
    assert len(module.PLACE.findall(page)) >= 4
    assert module.filled(page, ROOT / "docs/results/emoji.json") == page


@pytest.mark.slow
def test_a_changed_number_would_be_seen():
    module, page = fill_results(), (ROOT / "docs/results/emoji-world.md").read_text(encoding="utf-8")
    place = module.PLACE.search(page)
    digits = place.start() + next(i for i, c in enumerate(place[0]) if c == "." and place[0][i + 1].isdigit()) + 1
    forged = page[:digits] + str((int(page[digits]) + 1) % 10) + page[digits + 1 :]
    assert module.filled(forged, ROOT / "docs/results/emoji.json") != forged
