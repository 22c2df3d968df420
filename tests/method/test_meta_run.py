"""The folder of a meta-training: damaged and unwritable files."""

import errno

import pytest
import torch
from helpers.meta_training import Store, trainer

from gram_meta import files
from gram_meta.config import load_meta_config
from gram_meta.errors import GramError
from gram_meta.method.meta_run import MetaRun


def test_a_damaged_state_is_one_sentence(tmp_path):
    """A truncated state.pt, one with other contents, and one with NaN; the file stays as it is."""
    run = MetaRun(tmp_path, load_meta_config(), {"version": "0"})
    run.begin()
    state = {
        "step": 3,
        "theta": {"text": torch.zeros(2, 3)},
        "regulator": {},
        "optimiser": {},
        "norms": torch.zeros(0, 1),
    }
    run.save_state({**state, "best": {}})
    assert run.resume()["step"] == 3
    whole, path = (tmp_path / "state.pt").read_bytes(), tmp_path / "state.pt"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GramError, match=f"^{path}: expected a checkpoint of tensors and plain values, found"):
        run.resume()
    assert path.read_bytes() == whole[: len(whole) // 2]
    run.save_state(state)
    with pytest.raises(GramError, match=f"^{path}: expected the key best, found none"):
        run.resume()
    run.save_state({**state, "best": {}, "theta": {"text": torch.full((2, 3), torch.nan)}})
    with pytest.raises(GramError, match=f"^{path}: expected finite numbers in text, found 6 of 6 that are not"):
        run.resume()


def test_another_version_goes_on_with_a_run(tmp_path, caplog):
    """A note names both versions, run.json stays as it is, and other facts still make another run."""
    run = MetaRun(tmp_path, load_meta_config(), {"version": "0.1.0", "store": "s"})
    run.begin()
    facts = (tmp_path / "run.json").read_bytes()
    state = {"theta": {"text": torch.zeros(2, 3)}, "regulator": {}, "optimiser": {}, "norms": torch.zeros(0, 1)}
    run.save_state({"step": 3, **state, "best": {}})
    with caplog.at_level("INFO", logger="gram"):
        assert MetaRun(tmp_path, load_meta_config(), {"version": "0.2.0", "store": "s"}).resume()["step"] == 3
    assert caplog.messages == [f"{tmp_path}: begun by gram-meta 0.1.0, goes on with 0.2.0"]
    assert (tmp_path / "run.json").read_bytes() == facts
    with pytest.raises(GramError, match="expected the same store"):
        MetaRun(tmp_path, load_meta_config(), {"version": "0.2.0", "store": "t"}).resume()


@pytest.mark.parametrize(("part", "value"), [("theta", {}), ("optimiser", {}), ("norms", 5), ("regulator", {})])
def test_a_state_with_a_broken_part_is_one_sentence(tmp_path, backbone, part, value):
    run = trainer(Store(backbone), tmp_path, "OUTER.STEPS", "1", "EVAL.EVERY", "1", "EVAL.TASKS", "1")
    run.run()
    path = tmp_path / "state.pt"
    torch.save({**torch.load(path, weights_only=True), part: value}, path)
    with pytest.raises(GramError, match=f"^{path}: expected a whole state that training can go on from, found another"):
        trainer(Store(backbone), tmp_path, "OUTER.STEPS", "1", "EVAL.EVERY", "1", "EVAL.TASKS", "1").begin(True)


def test_a_full_disk_is_one_sentence_and_the_last_state_stays(tmp_path, monkeypatch):
    run = MetaRun(tmp_path, load_meta_config(), {"version": "0"})
    run.begin()
    run.save_state({"step": 1})
    before = (tmp_path / "state.pt").read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    says = r"(state.pt|run.json): cannot be written \(No space left on device\); free some space and run"
    for write in (
        lambda: run.save_state({"step": 2}),
        lambda: MetaRun(tmp_path / "new", load_meta_config(), {}).begin(),
    ):
        with pytest.raises(GramError, match=says):
            write()
    assert (tmp_path / "state.pt").read_bytes() == before and not list(tmp_path.glob(".*.part"))
