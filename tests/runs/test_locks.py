"""One lock for each output folder: no second command writes to a folder that one is at work in."""

import errno
import json
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

import gram_meta as gram
from gram_meta import locks
from gram_meta.bench import runner
from gram_meta.bench.matrix import BenchSettings
from gram_meta.coop import launch
from gram_meta.demo import run as demo
from gram_meta.errors import GramError
from gram_meta.locks import only_writer
from gram_meta.runs.layout import LOG, RESULTS

BUSY = r"another run is writing to this folder \(process \d+ on .+, since \d{4}-.*\); wait until it has ended"


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.1)


@contextmanager
def held(folder):
    """The folder's lock is held elsewhere: the lock of another thread excludes this one as that of a process does."""
    taken, done = threading.Event(), threading.Event()

    def hold():
        with only_writer(folder):
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    yield done
    done.set()
    thread.join()


def test_the_lock_excludes_others_names_its_holder_and_leaves_nothing(tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    with held(folder):
        facts = json.loads((folder / locks.LOCK).read_text())
        assert set(facts) == {"pid", "host", "since", "command"}
        with pytest.raises(GramError, match=f"^{folder}: {BUSY}"), only_writer(folder):
            pass
        assert f"{folder}: another run is writing to it (process {facts['pid']}" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    folder.mkdir(parents=True)
    (folder / ".results.json.9qtdisnj.part").touch()  # of a process that was killed
    (folder / ".draft.part").touch()
    with only_writer(folder), only_writer(folder):  # a command that calls another
        (folder / "result").touch()
    assert sorted(path.name for path in folder.iterdir()) == [".draft.part", "result"]


def test_a_requeued_job_waits_for_the_former_process(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 30.0)
    with held(tmp_path) as done:
        threading.Timer(0.3, done.set).start()
        with only_writer(tmp_path):
            assert done.is_set()


def test_the_lock_of_a_killed_process_is_free_although_its_children_live(tmp_path):
    code = (
        "import os, sys, time\nfrom gram_meta.locks import only_writer\nwith only_writer(sys.argv[1]):\n"
        "    if os.fork() == 0:\n        time.sleep(60)\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(GramError, match=f"process {process.pid} on "), only_writer(tmp_path):
        pass
    process.kill()
    process.wait()
    with only_writer(tmp_path):
        pass


def test_a_file_system_without_flock_has_a_marker_that_the_message_names(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path):
        with pytest.raises(GramError, match=f"or remove {tmp_path / locks.MARKER} if that run"), only_writer(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/folder"):
        with pytest.raises(GramError, match=f"^{tmp_path / folder}: "), only_writer(tmp_path / folder):
            pass


# ----------------------------------------------------------------------------------------------------------- commands


def train_flags(tiny_data, tiny_options, out):
    config = ["--dataset-config-file", "emoji_food", "--config-file", "gram_small_c4_ep10_batch32_ctxv1"]
    flags = ["--root", str(tiny_data), "--seed", "1", "--trainer", "CoOp", *config, "--output-dir", str(out)]
    return [*flags, *tiny_options, "DATASET.NUM_SHOTS", "2", "DATALOADER.NUM_WORKERS", "0"]


def test_train_is_refused_while_another_is_at_work_and_evaluates_beside_checkpoints(tiny_data, tiny_options, tmp_path):
    flags = train_flags(tiny_data, tiny_options, tmp_path / "run")
    with held(tmp_path / "run"):
        with pytest.raises(GramError, match=BUSY):
            launch.train(flags)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [locks.LOCK]
    first = launch.train(flags)
    log = (tmp_path / "run" / LOG).read_bytes()
    with held(tmp_path / "run"):  # a finished run needs no lock
        assert launch.train(flags) == first
    assert (tmp_path / "run" / LOG).read_bytes() == log and not (tmp_path / "run" / locks.LOCK).exists()
    (tmp_path / "test").mkdir()  # as a script of CoOp's may have made it
    flags[flags.index(str(tmp_path / "run"))] = str(tmp_path / "test")
    tested = launch.train(["--eval-only", "--model-dir", str(tmp_path / "run"), *flags])
    assert tested["metrics"] == first["metrics"] and (tmp_path / "test" / RESULTS).is_file()


def test_embed_cluster_bench_and_demo_are_refused_too(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "0.png")
    (tmp_path / "pairs.tsv").write_text("image\tcaption\n" + "0.png\ta cat\n" * 4)
    store = gram.embed(
        tmp_path / "pairs.tsv", tmp_path / "store", backbone="random-tiny", sentence_model="hash:64", progress=False
    )
    monkeypatch.setattr(demo, "_check", lambda settings: None)
    bench = BenchSettings(("base2new",), (), "gram_small", ".", tmp_path / "out", {})
    calls = {
        "embed": lambda: gram.embed(tmp_path / "pairs.tsv", tmp_path / "out", backbone="random-tiny"),
        "cluster": lambda: gram.cluster(store, tmp_path / "out"),
        "bench": lambda: runner.run([], bench, [{}]),
        "demo": lambda: demo.run_demo(demo.Settings(tmp_path / "out", ("food",), (1,))),
    }
    for name, call in calls.items():
        with held(tmp_path / "out"):
            with pytest.raises(GramError, match=BUSY):
                call()
            assert [path.name for path in (tmp_path / "out").iterdir()] == [locks.LOCK], name


def test_pretrain_is_refused_too(pixel_corpus, tmp_path):
    from gram_meta.config import load_meta_config
    from gram_meta.method.meta_trainer import MetaTrainer

    store, hierarchy, _, _ = pixel_corpus
    settings = load_meta_config([], "BACKBONE.NAME random-tiny TASKS.WAYS 2 TASKS.HELD_OUT 0.4".split())
    trainer = MetaTrainer(store, hierarchy, tmp_path / "out", settings, progress=False)
    with held(tmp_path / "out"):
        with pytest.raises(GramError, match=BUSY):
            trainer.run()
        assert [path.name for path in (tmp_path / "out").iterdir()] == [locks.LOCK]
