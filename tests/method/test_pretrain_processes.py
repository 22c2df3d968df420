"""Meta-training shared among processes, in parts of a batch, and one graph at a time: the same numbers as all at
once."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gram_meta.cli import main
from gram_meta.config import load_meta_config
from gram_meta.errors import GramError
from gram_meta.method import meta_trainer as module
from gram_meta.method import outer
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.meta_run import Stopped
from gram_meta.method.meta_trainer import MetaTrainer
from gram_meta.processes import ProcessGroup

PRECISION = "fp64"  # of the fixture `backbone`

pytestmark = pytest.mark.slow

STEPS = 3
FORMS = {
    "text": (),
    "visual": ("PROMPT.VISUAL_TOKENS", "2", "PROMPT.TEXT_TOKENS", "0"),
    "joint": ("PROMPT.VISUAL_TOKENS", "2"),
    "conditional": ("PROMPT.CONDITIONAL", "True"),
    "two inner steps": ("PROMPT.VISUAL_TOKENS", "2", "INNER.STEPS", "2"),
    "plain pre-training": ("PROMPT.VISUAL_TOKENS", "2", "OUTER.META", "False"),
    "no regulator": ("REGULATOR.ENABLED", "False"),
}


def settings(*opts):
    return load_meta_config(
        [],
        [
            *("BACKBONE.NAME", "random-tiny", "BACKBONE.PRECISION", "fp64", "TASKS.WAYS", "2", "TASKS.HELD_OUT", "0.4"),
            *("TASKS.SUPPORT_SHOTS", "2", "TASKS.QUERY_SHOTS", "3", "OUTER.STEPS", str(STEPS), "OUTER.BATCH", "4"),
            *("EVAL.EVERY", "2", "EVAL.TASKS", "5", "CHECKPOINT.EVERY", "2", "PROMPT.TEXT_TOKENS", "2"),
            *("PROMPT.WORDS", "a photo", "LOADER.WORKERS", "0", "OUTER.LR_REGULATOR", "1e-2", *opts),
        ],
    )


@pytest.fixture(autouse=True)
def one_backbone(request, monkeypatch):
    """All runs in this process share one, as building it takes longer than training on it."""
    if "on_disk" not in request.fixturenames:
        monkeypatch.setattr(module, "load_backbone", lambda *_: request.getfixturevalue("backbone"))


class Threads:
    """Stand-ins for processes: threads that run one at a time and change places where processes exchange something."""

    def __init__(self, size):
        self.size, self.turn = size, threading.Lock()
        self.meeting, self.brought = threading.Barrier(size, timeout=120), [None] * size

    def run(self, work):
        """work(job) for each; what they return, or the exception that ended them."""
        results = [None] * self.size

        def one(rank):
            self.turn.acquire()
            try:
                results[rank] = work(OneOf(self, rank))
            except BaseException as error:
                results[rank] = error
            finally:
                self.turn.release()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class OneOf(ProcessGroup):
    def __init__(self, threads, rank):
        super().__init__(rank, threads.size, rank)
        object.__setattr__(self, "threads", threads)

    def gather(self, value):
        threads = self.threads
        threads.brought[self.rank] = value
        threads.turn.release()
        threads.meeting.wait()
        values = list(threads.brought)
        threads.meeting.wait()
        threads.turn.acquire()
        return values

    def from_first(self, value):
        return self.gather(value)[0]

    def add(self, tensors):
        everybody = self.gather([tensor.clone() for tensor in tensors])
        for tensor, parts in zip(tensors, zip(*everybody, strict=True), strict=True):
            tensor.copy_(sum(parts[1:], parts[0]))


def trained(pixel_corpus, out, *opts, job=None, resume=False):
    """theta and phi at the end, and the last line of the log."""
    store, hierarchy, _, _ = pixel_corpus
    run = MetaTrainer(store, hierarchy, out, settings(*opts), progress=False, **({"group": job} if job else {}))
    run.run(resume)
    values = {name: value.detach() for name, value in run.theta.items()}
    if run.regulator is not None:
        values |= {f"phi.{name}": value for name, value in run.regulator.state_dict().items()}
    norms = torch.cat(run.state.norms) if run.state.norms else torch.empty(0)
    return values | {"norms": norms.double()}


def alone(pixel_corpus, tmp_path_factory, form, kept={}):  # noqa: B006, kept from test to test on purpose
    if form not in kept:
        out = tmp_path_factory.mktemp("alone")
        kept[form] = trained(pixel_corpus, out, *FORMS[form]), log_of(out)
    return kept[form]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def check_same(found, expected, norms=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=norms if name == "norms" else 1e-12, msg=name)


@pytest.mark.parametrize(("form", "size"), [*((form, 3) for form in FORMS), ("joint", 2)])
def test_processes_that_share_the_tasks_end_where_one_does(pixel_corpus, tmp_path_factory, tmp_path, form, size):
    """With 3, one has two tasks of the batch and the others one each; of the 5 held-out tasks 2, 2 and 1."""
    expected, log = alone(pixel_corpus, tmp_path_factory, form)
    found = Threads(size).run(lambda job: trained(pixel_corpus, tmp_path, *FORMS[form], job=job))
    for one in found:
        if isinstance(one, BaseException):
            raise one
        check_same(one, expected)
        assert all(torch.equal(one[name], found[0][name]) for name in one)
    for ours, theirs in zip(log_of(tmp_path), log, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    assert not list(tmp_path.glob(".*")), "only whole files"


LEAN = ("MEMORY.SECOND_ORDER", "lean")
LESS = [
    *(("joint", memory) for memory in (("MEMORY.TASKS", "3"), LEAN, ("MEMORY.CHECKPOINTING", "True"))),
    *((form, (*LEAN, "MEMORY.TASKS", "1", "MEMORY.IMAGES", "4")) for form in FORMS if form != "plain pre-training"),
    ("plain pre-training", ("MEMORY.TASKS", "3", "MEMORY.IMAGES", "4")),
]


@pytest.mark.parametrize(("form", "memory"), LESS, ids=[f"{form} {memory[-2]}" for form, memory in LESS])
def test_less_memory_gives_the_same(pixel_corpus, tmp_path_factory, tmp_path, form, memory):
    expected, log = alone(pixel_corpus, tmp_path_factory, form)
    check_same(trained(pixel_corpus, tmp_path, *FORMS[form], *memory), expected)
    assert log_of(tmp_path)[-1] == pytest.approx(log[-1], rel=1e-6, abs=1e-9)


def test_a_run_goes_on_with_another_number_of_processes(pixel_corpus, tmp_path_factory, tmp_path):
    expected, _ = alone(pixel_corpus, tmp_path_factory, "joint")

    def interrupted(job):
        store, hierarchy, _, _ = pixel_corpus
        run = MetaTrainer(store, hierarchy, tmp_path, settings(*FORMS["joint"]), progress=False, group=job)
        step = run.step
        run.step = lambda number, episode: step(number, episode) if number < 3 else 1 / 0
        run.run()

    assert all(isinstance(error, ZeroDivisionError) for error in Threads(3).run(interrupted))
    check_same(trained(pixel_corpus, tmp_path, *FORMS["joint"], resume=True), expected)


def test_sigterm_in_one_process_stops_all_behind_the_same_step(pixel_corpus, tmp_path_factory, tmp_path):
    expected, _ = alone(pixel_corpus, tmp_path_factory, "joint")
    store, hierarchy, _, _ = pixel_corpus
    for moment in ("in a step", "before images come"):
        out = tmp_path / moment

        def stopped(job, moment=moment, out=out):
            run = MetaTrainer(store, hierarchy, out, settings(*FORMS["joint"]), progress=False, group=job)
            step = run.step

            def asked(number, episode):
                if job.rank == 1 and number == 2:
                    run.sigterm.received = True
                    episode = episode if moment == "in a step" else None
                return step(number, episode)

            run.step = asked
            run.run()

        errors = Threads(2).run(stopped)
        after = 2 if moment == "in a step" else 1
        assert all(isinstance(e, Stopped) and f"after step {after} of 3; --resume" in str(e) for e in errors), errors
        check_same(trained(pixel_corpus, out, *FORMS["joint"], resume=True), expected)


def test_a_loss_that_is_not_finite_anywhere_is_reported_once(pixel_corpus, tmp_path, monkeypatch):
    plain = outer.meta_losses

    def poisoned(*args):
        result = plain(*args)
        factor = float("nan") if threading.current_thread() is unlucky else 1.0
        return result._replace(losses=result.losses * factor)

    monkeypatch.setattr(outer, "meta_losses", poisoned)

    def work(job):
        nonlocal unlucky
        if job.rank == 1:
            unlucky = threading.current_thread()
        trained(pixel_corpus, tmp_path, job=job)

    unlucky = None
    first, second = Threads(2).run(work)
    assert isinstance(first, GramError) and "found nan at step 1 in task 2 " in str(first)
    assert isinstance(second, SystemExit) and second.code == 2


def test_what_one_process_finds_wrong_ends_all(pixel_corpus, tmp_path):
    def make(job):
        if job.rank:
            raise GramError(f"store of process {job.rank}: found none")
        return 1

    first, second, third = Threads(3).run(lambda job: job.make_on_all_ranks(lambda: make(job)))
    assert isinstance(second, GramError) and isinstance(first, SystemExit) and isinstance(third, SystemExit)
    few = Threads(3).run(
        lambda job: job.make_on_all_ranks(
            lambda: MetaTrainer(*pixel_corpus[:2], tmp_path, settings("OUTER.BATCH", "2"), progress=False, group=job)
        )
    )
    assert "expected at least one task a step for each of 3 processes, found 2" in str(few[0])


def test_shares_are_even_and_whole():
    for size, count in ((1, 4), (3, 4), (3, 8), (4, 2)):
        shares = [ProcessGroup(rank, size).share_range(count) for rank in range(size)]
        assert [number for share in shares for number in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- commands, on files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Arguments of `gram pretrain` for a store and a hierarchy that the other commands made."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    rows = []
    for i in range(120):
        pixels = random.integers(0, 256, (36, 36, 3), dtype=np.uint8) // 2 + 30 * (i // 8 % 4)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"{i}.png\t{['cat', 'dog', 'house', 'tree', 'boat', 'lamp'][i % 6]}")
    (folder / "pairs.tsv").write_text("image\tcaption\n" + "\n".join(rows) + "\n")
    store, hierarchy = str(folder / "store"), str(folder / "hierarchy")
    argv = ["embed", str(folder / "pairs.tsv"), "-o", store, "--backbone", "random-tiny", "--workers", "0"]
    if main([*argv, "--sentence-model", "hash:16"]):
        pytest.skip("gram embed: no sentence model here")
    tasks = ["CHC.LABELLED", "True", "TASKS.WAYS", "2", "TASKS.SUPPORT_SHOTS", "2", "TASKS.QUERY_SHOTS", "3"]
    assert main(["cluster", store, "-o", hierarchy, "CHC.FILTER.KEEP", "1.0", "CHC.DOMAINS.K", "2", *tasks]) == 0
    argv = ["--store", store, "--hierarchy", hierarchy, "--device", "cpu", "BACKBONE.NAME", "random-tiny"]
    return [*argv, *tasks, "EVAL.TASKS", "3"]


def torchrun(size, *argv):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(size), "--master_port", str(port)]
    return subprocess.run(
        [*command, "-m", "gram_meta", *argv], capture_output=True, text=True, env=ENV, timeout=500, check=False
    )


ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def test_torchrun_end_to_end(on_disk, tmp_path):
    opts = [*on_disk, "OUTER.STEPS", "3", "PROMPT.VISUAL_TOKENS", "2", "LOADER.WORKERS", "1"]
    assert main(["pretrain", "-o", str(tmp_path / "one"), *opts]) == 0
    done = torchrun(2, "pretrain", "-o", str(tmp_path / "two"), *opts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("meta-checkpoint:") == 1 and done.stderr.count("towers waited") == 1
    one, two = (load_meta_checkpoint(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for kind in ("text", "visual"):
        torch.testing.assert_close(one.prompts[kind], two.prompts[kind], rtol=1e-3, atol=1e-5)
    bad = torchrun(2, "pretrain", "-o", str(tmp_path / "three"), *opts, "OUTER.BATCH", "1")
    assert bad.returncode and bad.stderr.count("gram pretrain: OUTER.BATCH: expected at least one task") == 1
    assert "exitcode  : 2" in bad.stderr and "pretrain.py" not in bad.stderr


def test_sigterm_leaves_a_state_to_go_on_from(on_disk, tmp_path, one_thread):
    opts = [*on_disk, "OUTER.STEPS", "60", "EVAL.EVERY", "10", "CHECKPOINT.EVERY", "1000"]
    assert main(["pretrain", "-o", str(tmp_path / "whole"), *opts]) == 0
    out = tmp_path / "stopped"
    with subprocess.Popen(
        [sys.executable, "-m", "gram_meta", "pretrain", "-o", str(out), *opts],
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    ) as running:
        for _ in range(3000):
            time.sleep(0.02)
            if (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) >= 2:
                break
        running.send_signal(signal.SIGTERM)
        printed = running.communicate(timeout=120)[1]
    assert running.returncode == 143 and f"gram pretrain: {out}: stopped by SIGTERM after step" in printed
    assert "Traceback" not in printed
    assert main(["pretrain", "-o", str(out), "--resume", *opts]) == 0
    for name in ("best.safetensors", "last.safetensors", "log.jsonl", "run.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_profile_says_where_the_time_goes(on_disk, tmp_path, capsys):
    opts = [*on_disk, "PROMPT.VISUAL_TOKENS", "2", "LOADER.WORKERS", "0"]
    assert main(["pretrain", "-o", str(tmp_path), "--profile", "2", *opts]) == 0
    assert "| image tower |" in capsys.readouterr().out
    facts = json.loads((tmp_path / "profile.json").read_text())
    assert {"image tower", "text tower", "regulator", "optimiser", "waiting for images"} <= set(facts["seconds"])
    assert facts["steps"] == 2 and 0 < facts["share_outside_towers"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


# --- killed between two operations on files ---------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["mkstemp", "fsync", "replace"])
def test_killed_at_any_moment_of_writing_it_goes_on_and_ends_the_same(pixel_corpus, tmp_path, monkeypatch, operation):
    """As SIGKILL does it: nothing is tidied up. At the k-th such operation of a run, for every k."""
    opts = ("OUTER.STEPS", "2", "EVAL.EVERY", "1", "CHECKPOINT.EVERY", "1", "EVAL.TASKS", "2", "OUTER.BATCH", "1")
    trained(pixel_corpus, tmp_path / "whole", *opts)
    names = ("best.safetensors", "last.safetensors", "log.jsonl", "run.json")
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in names}

    class Killed(BaseException):
        pass

    owner = tempfile if operation == "mkstemp" else os
    plain, unlink = getattr(owner, operation), Path.unlink
    for k in range(1, 100):
        out, count = tmp_path / str(k), 0

        def counted(*args, k=k, **kwargs):
            nonlocal count
            count += 1
            if count == k:
                raise Killed
            return plain(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, operation, counted)
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
            try:
                trained(pixel_corpus, out, *opts)
            except Killed:
                pass
            else:
                break
        assert Path.unlink is unlink
        trained(pixel_corpus, out, *opts, resume=True)
        for name in names:
            assert (out / name).read_bytes() == whole[name], f"{name}, killed at {operation} {k}"
        assert not list(out.glob(".*")), f"left behind, killed at {operation} {k}"
    assert k > 7, "run.json, log.jsonl, a state twice, last and best at least"


@pytest.mark.parametrize("line", ['{"step": 3, "loss_bef', '{"step": []}', '{"step": -1}', "3"])
def test_a_line_that_was_not_written_to_its_end_is_written_again(pixel_corpus, tmp_path, line):
    """Nor is a line that was edited kept."""
    trained(pixel_corpus, tmp_path / "whole")
    trained(pixel_corpus, tmp_path / "torn")
    with open(tmp_path / "torn" / "log.jsonl", "a") as file:
        file.write(line)
    trained(pixel_corpus, tmp_path / "torn", resume=True)
    assert log_of(tmp_path / "torn") == log_of(tmp_path / "whole")
