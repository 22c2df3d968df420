"""Reading checkpoints: everybody's, and nothing in them is run."""

import collections
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from gram_meta.engine.checkpoints import Record, check_finite, read_checkpoint, restore_schedule, schedule_state
from gram_meta.errors import GramError

BOTH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])


class Touch:
    """Unpickled in good faith, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("was run",)


class State:
    """Builds an object, then hands it a state to set."""

    def __init__(self, of, state):
        self.of, self.state = of, state

    def __reduce__(self):
        return self.of, (), self.state


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "was run").exists(), "code from a file was run"


def save(path, value, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def coop_checkpoint(**more):
    """What CoOp saves under a Dassl whose warm-up scheduler leaves its successor in the file as an object."""
    prompt = nn.Parameter(torch.arange(6.0).reshape(3, 2))
    optimizer = torch.optim.SGD([prompt], lr=0.002, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    prompt.grad = torch.ones(3, 2)
    optimizer.step()
    cosine.step()
    return {
        "state_dict": collections.OrderedDict(ctx=prompt.detach(), token_prefix=torch.zeros(1)),
        "epoch": 2,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": cosine, "warmup_epoch": 1, "last_epoch": 1},
        "val_result": None,
        **more,
    }


# --------------------------------------------------------------------------------------------------- what can be read


@BOTH_FORMATS
def test_a_checkpoint_with_a_scheduler_object_in_it(zipped):
    saved = coop_checkpoint()
    path = save("model.pth.tar-2", saved, zipped)
    with pytest.raises(pickle.UnpicklingError):  # what it is about
        torch.load(path, weights_only=True)
    state = read_checkpoint(path)
    assert type(state["state_dict"]) is collections.OrderedDict
    assert torch.equal(state["state_dict"]["ctx"], saved["state_dict"]["ctx"])
    buffer = state["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(buffer, torch.ones(3, 2))
    assert (state["epoch"], state["val_result"]) == (2, None)
    successor = state["scheduler"]["successor"]
    assert isinstance(successor, Record)
    assert successor.of == "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert (successor.state["T_max"], successor.state["last_epoch"]) == (50, 1)


@BOTH_FORMATS
def test_tensors_and_containers_beside_an_object_come_whole(zipped):
    """The second reading builds the same things as torch's own."""
    shared = torch.arange(4.0)
    plain = {
        "half": torch.ones(2, 2, dtype=torch.float16),
        "whole": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "view": shared[1:3],
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "parameter": nn.Parameter(torch.ones(2)),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "names": ["a", ("b", 1, 2.5, None, True)],
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "count": collections.Counter([3, 3, 5]),
        "accuracy": np.float64(81.25),
        "shots": np.int64(16),
    }
    path = save("checkpoint", {**plain, "object": Touch()}, zipped)
    state = read_checkpoint(path)
    assert isinstance(state.pop("object"), Record)
    for name, value in plain.items():
        found = state[name]
        if isinstance(value, torch.Tensor):
            assert type(found) is type(value) and found.dtype == value.dtype and torch.equal(found, value), name
        else:
            assert found == value, name
    assert state["turned"].stride() == (1, 3)
    assert type(state["accuracy"]) is float and type(state["shots"]) is int


def test_what_python_2_wrote():
    """Its strings are bytes in latin1; torch's reader and Dassl's own way round it both fail on them."""
    text = b"\x80\x02}U\x05caf\xe9sK\x01s."
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    with open("old", "wb") as file:
        file.write(b"".join(parts) + text + pickle.dumps([], 2))
    assert read_checkpoint("old") == {"caf\xe9s": 1}


# ---------------------------------------------------------------------------------------------------- what is refused


def no_version():
    """A zip archive whose version is no number."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Touch(), 2))
        archive.writestr("archive/version", b"\x80")
    return content.getvalue()


def test_what_is_no_checkpoint():
    for name, content in {
        "empty": b"",
        "text": b"not a checkpoint\n",
        "zip": b"PK\x03\x04 and no more",
        "pickle": pickle.dumps(Touch()),
        "plain pickle": pickle.dumps({"state_dict": {}}),
        "version": no_version(),
        "cut": open(save("whole", coop_checkpoint()), "rb").read()[:-40],
    }.items():
        with open(name, "wb") as file:
            file.write(content)
        with pytest.raises(GramError, match=f"{name}: expected a checkpoint of tensors and plain values, found"):
            read_checkpoint(name)
    with pytest.raises(GramError, match="nowhere: expected a checkpoint, found no such file"):
        read_checkpoint("nowhere")
    with pytest.raises(GramError, match="expected a checkpoint .*, found a Tensor"):
        read_checkpoint(save("tensor", torch.ones(2)))
    with pytest.raises(GramError, match="found torch.nn.modules.linear.Linear as an object"):
        read_checkpoint(save("model", nn.Linear(1, 1)))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (None, "expected tensors by name as state_dict, found a NoneType"),
        ({5: torch.ones(2)}, "expected tensors by name as state_dict, found a dict"),
        ({"ctx": "x"}, "expected a tensor as ctx in state_dict, found a str"),
        ({"ctx": torch.ones(2).to_sparse()}, "expected a dense tensor of real numbers as ctx, found torch.sparse_coo"),
        ({"ctx": torch.ones(2, device="meta")}, "expected a dense tensor of real numbers as ctx, found .* on meta"),
        ({"ctx": torch.ones(2, dtype=torch.complex64)}, "expected a dense tensor of real numbers as ctx, .*complex64"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_one_sentence(tensors, says):
    with pytest.raises(GramError, match=f"odd: {says}"):
        read_checkpoint(save("odd", {"state_dict": tensors}))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e38, 1e300, 70_000.0])
def test_numbers_that_a_tower_makes_infinite_are_refused(value):
    tensors = {"ctx": torch.tensor([[1.0, value]], dtype=torch.float64), "flags": torch.tensor([True])}
    with pytest.raises(GramError, match="a file: expected finite numbers in ctx, found 1 of 2 that are not, or are ab"):
        check_finite("a file", tensors)
    check_finite("a file", {"ctx": torch.tensor([65_504.0]), "number": torch.tensor(3)})


def test_other_archives():
    with zipfile.ZipFile("script", "w") as archive:  # torch.load would hand it to torch.jit.load
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(Touch(), 2))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(GramError, match="found TorchScript code"):
        read_checkpoint("script")
    with tarfile.open("tar", "w") as archive:  # torch.load would unpack it
        content = pickle.dumps(Touch(), 2)
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(GramError, match="found a tar archive"):
        read_checkpoint("tar")


@BOTH_FORMATS
def test_objects_among_the_tensors(zipped):
    path = save("bad", {"state_dict": {"ctx": Touch()}}, zipped)
    with pytest.raises(GramError, match="expected a tensor as ctx in state_dict, found .*mkdir as an object"):
        read_checkpoint(path)
    with pytest.raises(GramError, match="expected tensors by name as state_dict, found a list"):
        read_checkpoint(save("list", {"state_dict": [1], "x": Touch()}, zipped))


# ---------------------------------------------------------------------------------------------------- nothing is run


@BOTH_FORMATS
@pytest.mark.parametrize(
    "payload",
    [
        Touch(),
        [Touch()],
        {"key": (Touch(), Touch())},
        collections.OrderedDict(a=Touch()),
        State(collections.OrderedDict, {"a": Touch()}),
        State(collections.Counter, (None, {"__init__": os.mkdir})),
        collections.defaultdict(os.mkdir, {"a": 1}),
    ],
    ids=["call", "in a list", "in a dict", "in an ordered dict", "as a state", "set on a class", "factory"],
)
def test_nothing_in_a_file_is_run(payload, zipped):
    path = save("evil", {"state_dict": {}, "epoch": 1, "payload": payload}, zipped)
    before = collections.Counter.__init__
    assert read_checkpoint(path)["epoch"] == 1
    assert collections.Counter.__init__ is before


def test_a_function_that_may_be_called_cannot_be_changed():
    """BUILD sets attributes on whatever is on the stack: here on the function that rebuilds tensors."""
    program = b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__Ns\x86bs."
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    with open("evil", "wb") as file:
        file.write(b"".join(parts) + program + pickle.dumps([], 2))
    before = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(GramError):
        read_checkpoint("evil")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nmkdir\n(X\x07\x00\x00\x00was runtR.",  # GLOBAL, REDUCE
        b"(X\x07\x00\x00\x00was runios\nmkdir\n.",  # INST
        b"(cos\nmkdir\nX\x07\x00\x00\x00was runo.",  # OBJ
        b"cos\nmkdir\nX\x07\x00\x00\x00was run\x85\x81.",  # NEWOBJ
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(X\x02\x00\x00\x00ostRX\x05\x00\x00\x00mkdirtR"
        b"(X\x07\x00\x00\x00was runtR.",
        b"X\x02\x00\x00\x00osX\x05\x00\x00\x00mkdir\x93(X\x07\x00\x00\x00was runtR.",  # STACK_GLOBAL
    ],
)
def test_every_way_of_a_pickle_to_call_something(program):
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    with open("evil", "wb") as file:
        file.write(b"".join(parts) + b"\x80\x04" + program + pickle.dumps([], 2))
    with pytest.raises(GramError):
        read_checkpoint("evil")


@pytest.mark.slow
def test_the_payloads_here_do_run_where_nobody_looks(tmp_path):
    """The other tests would pass with a payload that does nothing."""
    path = save("evil", {"payload": Touch()})
    code = f"import torch; torch.load({str(tmp_path / path)!r}, weights_only=False)"
    (tmp_path / "elsewhere").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", check=True)
    assert (tmp_path / "elsewhere/was run").exists()


# ---------------------------------------------------------------------------------------------------------- schedules


def warmup_and_cosine(epochs=6):
    from gram_meta.engine.builtin.optim import WarmupScheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.002)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(epochs))
    return optimizer, WarmupScheduler(optimizer, cosine, 1, 1e-5)


def rates(optimizer, scheduler, epochs):
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("stop", range(1, 6))
@pytest.mark.parametrize("whose", ["ours", "Dassl's"])
def test_a_schedule_goes_on_from_a_file(stop, whose):
    optimizer, scheduler = warmup_and_cosine()
    rates(optimizer, scheduler, stop)
    # Dassl saves every attribute but the optimiser: the successor as an object, with a copy of the optimiser inside
    theirs = {key: value for key, value in vars(scheduler).items() if key != "optimizer"}
    saved = scheduler.state_dict() if whose == "ours" else {**theirs, "verbose": False}
    path = save("checkpoint", {"optimizer": optimizer.state_dict(), "scheduler": saved})
    expected = rates(*warmup_and_cosine(), 6)[stop:]

    state = read_checkpoint(path)
    optimizer, scheduler = warmup_and_cosine()
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    assert rates(optimizer, scheduler, 6 - stop) == expected  # bit by bit
    assert scheduler.successor.optimizer is optimizer
    assert not hasattr(scheduler, "verbose")


def test_a_schedule_is_saved_as_plain_values():
    optimizer, scheduler = warmup_and_cosine()
    state = schedule_state(scheduler)
    assert state["successor"]["T_max"] == 6 and state["warmup_epoch"] == 1
    path = save("state", state)
    assert torch.load(path, weights_only=True) == state
    plain = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    other = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    restore_schedule(other, schedule_state(plain))
    assert other.milestones == plain.milestones
