"""Golden files: `golden.text("help.txt", found)` compares with tests/pins/golden/help.txt.

How to compare, and how to write the files anew (then read `git diff tests/pins/golden`):

    python -m pytest tests/pins
    python -m pytest tests/pins --update-golden
"""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/pins/golden anew")


@pytest.fixture
def golden(request):
    return Golden(request.config.getoption("--update-golden", default=False))


class Golden:
    """Compare a value with a golden file, or write the file. A missing file is a failure, not a first run."""

    folder = GOLDEN

    def __init__(self, update: bool) -> None:
        self.update = update

    def text(self, name: str, found: str) -> None:
        if self.update:
            (GOLDEN / name).write_text(found, encoding="utf-8")
        assert found == (GOLDEN / name).read_text(encoding="utf-8")

    def json(self, name: str, found) -> None:
        """`found` equals the file's content; tuples count as lists."""
        found = json.loads(json.dumps(found))
        if self.update:
            _write_json(GOLDEN / name, found)
        assert found == json.loads((GOLDEN / name).read_text(encoding="utf-8"))

    def numbers(self, name: str, found, rel: float, absolute: float) -> None:
        """Nested dicts and lists of numbers: equal keys and lengths, and |found - pinned| <= max(rel |pinned|, absolute)."""
        found = json.loads(json.dumps(found))
        if self.update:
            _write_json(GOLDEN / name, found)
        pinned = dict(_leaves(json.loads((GOLDEN / name).read_text(encoding="utf-8"))))
        assert dict(_leaves(found)) == pytest.approx(pinned, rel=rel, abs=absolute)

    def pictures(self, name: str, found) -> None:
        """(N, H, W, C) uint8 next to each other in one PNG.

        Another processor may round another way, and a step (poster, halftone, contours) makes such a difference large in
        a single pixel. So the mean absolute difference of each picture may be 0.1 levels of 255, and 0.2 % of its bytes may
        differ by more than 2.
        """
        import numpy as np
        from PIL import Image

        if self.update:
            Image.fromarray(np.concatenate(found, axis=1)).save(GOLDEN / name, optimize=True)
        difference = np.abs(found.astype(int) - self.read_pictures(name))
        assert difference.mean(axis=(1, 2, 3)).max() <= 0.1
        assert (difference > 2).mean(axis=(1, 2, 3)).max() <= 0.002

    @staticmethod
    def read_pictures(name: str):
        import numpy as np
        from PIL import Image

        sheet = np.asarray(Image.open(GOLDEN / name))
        return np.stack(np.split(sheet, sheet.shape[1] // sheet.shape[0], axis=1))


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _leaves(value, path=""):
    if isinstance(value, dict | list):
        yield f"{path}#", len(value)
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{path}/{key}")
    else:
        yield path, value
