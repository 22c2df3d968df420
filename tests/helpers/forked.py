"""Jobs of several processes as `torchrun` would start them, forked from this one: its imports need not be made
again."""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


class Job:
    """`size` processes that call `work(rank)`; an integer that it returns is the exit status.

    As under torchrun the store is not held by one of them, so it outlives them.
    """

    def __init__(self, size, work, folder):
        assert torch.get_num_threads() == 1, "threads do not survive a fork"
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=60), wait_for_workers=False)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes = [
            multiprocessing.get_context("fork").Process(target=self._run, args=(rank, size, work))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def _run(self, rank, size, work):
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.store.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )
        gc.freeze()  # what was this process's before the fork is not to be ended here, as stores that wait for threads
        out = open(self.folder / f"{rank}.txt", "w", buffering=1)
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
        sys.stdout = sys.stderr = out
        logging.root.handlers.clear()  # pytest's
        status = 1
        try:
            status = work(rank) or 0
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            out.flush()
            os._exit(status)

    def send(self, number, ranks=None):
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].exitcode is None:
                os.kill(self.processes[rank].pid, number)

    def wait(self, seconds=120):
        """Exit statuses in the order of ranks; minus the signal of a process that died of one."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        assert not late, f"processes {late} did not end: {self.printed()}"
        return [process.exitcode for process in self.processes]

    def printed(self):
        """What each process has written to its outputs."""
        files = [self.folder / f"{rank}.txt" for rank in range(len(self.processes))]
        return [file.read_text() if file.exists() else "" for file in files]


def run_job(size, work, folder):
    """Exit statuses and outputs of a job, when it has ended."""
    job = Job(size, work, folder)
    statuses = job.wait()
    return statuses, job.printed()
