"""CUDA graphs are made and replayed on the GPU of their inputs; stand-ins take the place of CUDA's parts."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gram_meta import processes
from gram_meta.backbone.graphs import Recorded, Replay


class Machine:
    """Two GPUs whose current device is a number; everything notes it: (what happened, current device)."""

    def __init__(self):
        self.current, self.noted = 0, []

    @contextmanager
    def device(self, device):
        before, self.current = (
            self.current,
            torch.device("cuda", device).index if isinstance(device, int) else device.index,
        )
        yield
        self.current = before

    def note(self, what):
        self.noted.append((what, self.current))

    def made(self, what):
        def make(*_, **__):
            self.note(what)
            return self

        return make

    def graph(self, *_, **__):
        self.note("capture")
        return nullcontext()

    def make_graphed_callables(self, function, samples, num_warmup_iters):
        self.note("capture")

        def replay(*inputs):
            self.note("replay")
            return function(*inputs)

        return replay

    def wait_stream(self, other):
        assert other is self

    def replay(self):
        self.note("replay")


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    for name in ("device", "graph", "make_graphed_callables"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, found.made(name))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return found


@pytest.mark.parametrize(
    "made", [Replay, lambda function, inputs: Recorded(function, *inputs)], ids=["Replay", "Recorded"]
)
def test_a_graph_is_made_and_replayed_on_the_gpu_of_its_inputs(machine, made):
    """A graph that is made on another GPU is empty, and its replays return old numbers."""
    with FakeTensorMode():
        inputs = [torch.ones(3, device="cuda:1")]
        made(lambda x: x + 1, inputs)(*inputs)
    assert {"capture", "replay"} <= {what for what, _ in machine.noted}
    assert {current for _, current in machine.noted} == {1} and machine.current == 0


def test_one_process_has_the_gpu_that_is_named_as_its_current_device(machine):
    for name, expected in (("cuda:1", 1), ("cuda", 0), ("cpu", 0), ("auto", 0), ("cuda:7", 0), ("cuda:x", 0)):
        with processes.process_group(name):
            assert machine.current == expected, name
        assert machine.current == 0
