"""A disk that is really full: a small tmpfs, filled up to some free bytes."""

import json
import subprocess
import threading

import pytest
from helpers.meta_training import Store, trainer
from helpers.training import train_flags

from gram_meta.cli import main
from gram_meta.coop import launch
from gram_meta.errors import GramError

AGAIN = "; free some space and run the same command again"
PAGE = 4096  # tmpfs gives space in such pieces


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of 400 kB, which is gone after the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not allowed here: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def threads(monkeypatch):
    """Errors of threads, such as TensorBoard's writer, which would print a traceback."""
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    return errors


def leave(disk, pages):
    """Fill the disk up to some free pages."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            pass
        file.truncate(max(file.tell() // PAGE - pages, 0) * PAGE)


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "filler"}


RESULT = {"format": 1, "trainer": "CoOp", "dataset": "Pets", "subsample": "base", "shots": 16, "seed": 1}
RESULT |= {"backbone": "gram-small", "split": "test", "metrics": {"accuracy": 50.0}, "curve": [], "config": {}}
RESULT["curve"] = [{"step": step, "epoch": step, "base": 50.0, "new": 50.0} for step in (0, 1, 5)]


@pytest.mark.parametrize(("option", "pages"), [("--html", 0), ("--html", 2), ("--collect", 0), ("--figures", 2)])
def test_what_a_report_cannot_write_is_one_sentence(disk, tmp_path, capsys, option, pages):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.json").write_text(json.dumps(RESULT))
    name = {"--html": "page.html", "--collect": "all.json", "--figures": "figures"}[option]
    (disk / "figures").mkdir()
    (disk / "all.json").write_text("older")
    leave(disk, pages)
    before = files_of(disk)
    assert main(["report", str(tmp_path / "run"), option, str(disk / name)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    where, _, reason = last.partition(": cannot be written (No space left on device)")
    assert where.startswith(f"gram report: {disk / name}") and reason == AGAIN
    assert files_of(disk) == before and (disk / "all.json").read_text() == "older"


def test_a_meta_training_ends_in_one_sentence_wherever_the_disk_is_full(disk, backbone, threads):
    """run.json, TensorBoard, log.jsonl, meta-checkpoints, state.pt: more space each time, until it is enough."""
    store, failed = Store(backbone), set()
    for pages in range(0, 90, 2):
        leave(disk, pages)
        try:
            trainer(store, disk / "meta", "OUTER.STEPS", "4").run(resume=True)
            break
        except GramError as error:
            where, _, reason = str(error).partition(": cannot be written (No space left on device)")
            assert reason == AGAIN, error
            failed.add(where.removeprefix(str(disk / "meta")).split(".0")[0])
        assert not [name for name in files_of(disk) if name.endswith(".part")]
        if pages == 0:
            assert files_of(disk) == set()
    assert not threads and {"/best.safetensors", "/state.pt"} & failed and len(failed) > 3, failed
    assert {"meta/best.safetensors", "meta/state.pt", "meta/run.json", "meta/log.jsonl"} <= files_of(disk)


@pytest.mark.usefixtures("one_loading")
def test_a_training_ends_in_one_sentence_wherever_the_disk_is_full(disk, tiny_data, tiny_options, threads):
    """log.txt, TensorBoard, checkpoints, results.json, run.json: likewise."""
    options = ("DATASET.NUM_SHOTS", 2, "DATALOADER.NUM_WORKERS", 0, "TRAINER.COOP.PREC", "fp32", *tiny_options)
    flags, failed = train_flags(tiny_data, disk / "run", "CoOp", *options), set()
    for pages in range(0, 90):
        leave(disk, pages)
        try:
            launch.train(flags, quiet=True)
            break
        except GramError as error:
            where, _, reason = str(error).partition(": cannot be written (No space left on device)")
            assert reason == AGAIN, error
            failed.add(where.removeprefix(str(disk / "run")))
        assert not [name for name in files_of(disk) if name.endswith(".part")]
        if pages == 0:
            assert files_of(disk) == set()
    assert not threads and {"/log.txt", "/prompt_learner/model.pth.tar-1"} <= failed, failed
    assert json.loads((disk / "run/run.json").read_text())["finished"]
    assert json.loads((disk / "run/results.json").read_text())["metrics"]["total"] == 8
