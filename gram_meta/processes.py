"""Several processes that share one job, as `torchrun` starts them; without it, a job of one process.

    torchrun --nproc_per_node 4 -m gram_meta embed ...

`job()` joins the others and says who is who. Results travel through gloo on CPUs and nccl between GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# Only a process that is stuck waits this long: torchrun ends all of them when one dies, and the first process may join a
# large store for an hour while the others wait for it.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Job:
    """Who this process is among those of its job.

    Attributes:
        rank: its number, 0 to size - 1. size: processes in all.
        local_rank: its number on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """Every size-th item, from the rank-th on: what of a list is this process's."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            self.gather(None)  # a barrier of nccl would occupy a GPU that the towers do not use yet

    def gather(self, value: T) -> list[T]:
        """What each process brings, in the order of ranks; small picklable things, all on the CPU."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=_on_cpu())
        return values

    def from_first(self, value: T) -> T:
        """What the first process brings, in all of them."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=_on_cpu())
        return box[0]

    def add(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one exchange; same shapes everywhere."""
        if self.size == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(together)
        parts = together.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Job()


def ranks() -> Job:
    """Who this process is, by the environment that `torchrun` sets; joins nobody yet."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return ALONE
    rank = int(os.environ["RANK"])
    return Job(rank, size, int(os.environ.get("LOCAL_RANK", rank)))


def device_for(job: Job, name: str = "") -> str:
    """The device a process works on: `name` where it is given, else the GPU of its local rank, else the CPU.

    With several processes on a machine, `cuda` is the GPU of the local rank as well.
    """
    import torch

    if name in ("", "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and job.size > 1:
        return f"cuda:{job.local_rank % max(torch.cuda.device_count(), 1)}"
    return name


@contextmanager
def job(device: str | torch.device = "cpu") -> Iterator[Job]:
    """Join the processes that `torchrun` started with this one, and leave them at the end.

    Args:
        device: where this process's tensors live; a GPU is bound to nccl.
    """
    here = ranks()
    if here.size == 1:
        yield here
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield here
    finally:
        dist.destroy_process_group()


def _on_cpu() -> Any:
    """The group for objects, over gloo also where tensors go over nccl."""
    import torch.distributed as dist

    global _gloo
    if dist.get_backend() == "gloo":
        return None
    if _gloo is None:
        _gloo = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _gloo


_gloo: Any = None
