"""Progress bars: a moving one on a terminal, plain lines in a log."""

import sys
from pathlib import Path

import pytest

from gram_meta.progress import progress_bar

ROOT = Path(__file__).resolve().parents[2]


def run(seconds_per_step, total, **options):
    """Count to `total` on a clock of its own."""
    now = [0.0]
    with progress_bar(total=total, desc="meta-training", unit=" tasks", **options) as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(total):
            now[0] += seconds_per_step
            bar.update()


@pytest.mark.parametrize(
    ("seconds_per_step", "total", "counts"),
    [
        (1, 100, [30, 60, 90, 100]),  # 30 seconds pass later than a tenth
        (1, 9591, [960, 1920, 2880, 3840, 4800, 5760, 6720, 7680, 8640, 9591]),  # a tenth passes later
        (0.001, 9591, []),  # over before there is anything to tell
        (60, 3, [1, 2, 3]),
    ],
)
def test_a_log_gets_a_plain_line_now_and_then(capsys, seconds_per_step, total, counts):
    run(seconds_per_step, total)
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert [f" {count}/{total} [" in line for count, line in zip(counts, lines, strict=True)] == [True] * len(counts)
    assert "\r" not in text and all(len(line) < 100 for line in lines)
    assert all(line.startswith("meta-training:") for line in lines)


def test_a_terminal_gets_a_moving_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(1, 100)
    assert capsys.readouterr().err.count("\r") > 5


def test_nothing_is_shown_where_nothing_was_asked_for(capsys, monkeypatch):
    run(60, 3, shown=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(60, 3, shown=False)
    assert capsys.readouterr().err == ""


def test_an_iterable_without_a_length_and_lines_between(capsys):
    with progress_bar(iter("abc"), unit="image") as bar:
        for letter in bar:
            bar.write(letter, file=sys.stderr)
    assert capsys.readouterr().err == "a\nb\nc\n"


def test_every_bar_goes_through_the_one_function():
    files = [path for folder in ("gram_meta", "trainers", "datasets") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if "import tqdm" in path.read_text()] == ["progress.py"]
