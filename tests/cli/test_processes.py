"""A group of processes: what they exchange, and how they end when one of them fails."""

import os
import signal
import time

import pytest
import torch

from gram_meta import processes
from gram_meta.errors import GramError


def joined(work):
    """`work(job)` in a process that has joined the others; what the command line does with a bad input."""

    def in_process(rank):
        try:
            with processes.process_group() as job:
                return work(job)
        except GramError as error:
            print(f"sentence: {error}")
            return 2

    return in_process


@pytest.mark.slow
def test_what_is_exchanged(forked, tmp_path):
    def work(job):
        assert (job.rank, job.size, job.is_first) == (int(os.environ["RANK"]), 3, job.rank == 0)
        assert job.gather({"rank": job.rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert job.from_first(job.rank) == 0
        assert job.first(lambda: os.getpid()) == job.gather(os.getpid())[0]
        assert job.share(list(range(7))) == [[0, 3, 6], [1, 4], [2, 5]][job.rank]
        tensors = [torch.full((2, 3), float(job.rank)), torch.tensor([1.0])]
        job.add(tensors)
        assert torch.equal(tensors[0], torch.full((2, 3), 3.0)) and tensors[1].item() == 3
        job.count("n", job.rank + 1)
        job.wait()
        assert job.count("n") == 6 and job.count("other") == 0

    assert forked.run_job(3, joined(work), tmp_path) == ([0, 0, 0], ["", "", ""])


@pytest.mark.slow
def test_waiting_calls_back(forked, tmp_path):
    def work(job):
        calls = []
        if job.rank == 1:
            time.sleep(1.0)
        job.wait(lambda: calls.append(1))
        assert (len(calls) >= 3) == job.is_first

    assert forked.run_job(2, joined(work), tmp_path)[0] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("doing", ["count", "wait", "first"])
def test_one_sentence_ends_all(forked, tmp_path, failing, doing):
    """The others learn of it where they are: at work by themselves, waiting, or waiting for the first's result."""

    def work(job):
        job.wait()
        if job.rank == failing:
            time.sleep(0.3)
            raise GramError("the disk is full")
        if doing == "wait":
            job.wait(lambda: None)
        elif doing == "first" and not job.is_first:
            job.first(lambda: None)
        while True:
            job.count("pairs", 1)
            time.sleep(0.01)

    statuses, printed = forked.run_job(3, joined(work), tmp_path)
    assert statuses == [2, 2, 2]
    assert [text for text in printed if text] == ["sentence: the disk is full\n"]


@pytest.mark.slow
def test_a_killed_process_ends_the_others_at_their_next_exchange(forked, tmp_path):
    def work(job):
        job.wait()
        if job.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        job.gather(1)

    statuses, printed = forked.run_job(2, joined(work), tmp_path)
    assert statuses == [2, -signal.SIGKILL]
    assert "process 0 of 2: expected the others, found that one has ended" in printed[0]
    assert "run the same command again" in printed[0] and "Traceback" not in printed[0]


@pytest.mark.slow
def test_only_the_first_process_tells(forked, tmp_path):
    def work(job):
        import logging

        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        logging.info("news of %d", job.rank)
        logging.warning("warning of %d", job.rank)

    assert forked.run_job(2, joined(work), tmp_path)[1] == ["news of 0\nwarning of 0\n", "warning of 1\n"]


def test_alone_needs_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with processes.process_group() as job:
        assert (job.rank, job.size) == (0, 1)
        assert job.gather(3) == [3] and job.first(lambda: 4) == 4 and job.from_first(5) == 5
        assert job.count("alone", 2) == 2 and job.count("alone") == 2
        job.wait()
    assert not torch.distributed.is_initialized()


def test_devices(monkeypatch):
    second = processes.ProcessGroup(5, 8, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes.device_for(second) == processes.device_for(second, "cuda") == "cuda:1"
    assert processes.device_for(processes.ProcessGroup(5, 8, 5)) == "cuda:1"  # more processes than GPUs
    assert processes.device_for(second, "cpu") == "cpu" and processes.device_for(second, "cuda:3") == "cuda:3"
    assert processes.device_for(processes.ALONE) == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.device_for(second, "auto") == "cpu"
