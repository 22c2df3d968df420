"""Trackers: TensorBoard and stand-ins of W&B and MLflow receive the same numbers of one few-shot run."""

import sys
import time
from types import SimpleNamespace

import pytest
from helpers.training import meta_of, train_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gram_meta.backbone.clip import load_backbone
from gram_meta.coop import launch
from gram_meta.errors import GramError
from gram_meta.files import read_json
from gram_meta.method.checkpoint import save_meta_checkpoint
from gram_meta.trackers import Trackers
from gram_meta.trainers.base import PromptTrainer


class WandB:
    """Stands in for wandb, and for the run that `wandb.init` returns: without `reinit`, the one that has begun."""

    def __init__(self):
        self.rows, self.facts, self.ended, self.status = [], {}, 0, None

    def init(self, reinit="return_previous", **facts):
        run = WandB() if self.facts and reinit == "create_new" else self
        self.last, run.facts = run, facts
        return run

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.ended, self.status = self.ended + 1, exit_code


class MLflow:
    """Stands in for mlflow, whose runs are on a stack."""

    def __init__(self):
        self.rows, self.settings, self.runs, self.ended = [], {}, [], []

    def start_run(self, run_name, nested=False):
        assert nested or not self.runs, "Run is already active"
        self.runs.append(run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_name))

    def log_params(self, settings):
        assert len(settings) <= 100 and all(len(value) <= 500 for value in settings.values())
        self.settings |= settings

    def log_metrics(self, metrics, step, run_id):
        self.rows += [(name, step, value) for name, value in metrics.items()]
        self.last = run_id

    def end_run(self, status):
        self.ended.append((self.runs.pop(), status))


class Own:
    made = []

    def __init__(self, folder, settings):
        self.folder, self.settings, self.rows, self.closed = folder, settings, [], False
        Own.made.append(self)

    def log(self, step, metrics):
        self.rows += [(name, step, value) for name, value in metrics.items()]

    def close(self):
        self.closed = True


@pytest.fixture
def stand_ins(monkeypatch):
    modules = {"wandb": WandB(), "mlflow": MLflow(), "my_trackers": SimpleNamespace(Own=Own)}
    for name, stand_in in modules.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(Own, "made", [])
    monkeypatch.setenv("GRAM_TRACKERS", "wandb, mlflow,my_trackers:Own")
    return modules


def test_all_trackers_get_every_number_of_a_run(tiny_data, tiny_options, tmp_path, stand_ins):
    save_meta_checkpoint(tmp_path / "meta.safetensors", meta_of(load_backbone("random-tiny", "cpu")))
    options = ("DATASET.NUM_SHOTS", 2, "DATALOADER.NUM_WORKERS", 0, "TEST.PER_EPOCH", "True", *tiny_options)
    options += ("TRAINER.GRAM.CHECKPOINT", tmp_path / "meta.safetensors")
    config = "gram_small_c4_ep10_batch32_ctxv1"
    launch.train(train_flags(tiny_data, tmp_path / "run", "CoOpGRAM", *options, config=config), quiet=True)
    (own,) = Own.made
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    written = {(tag, it.step, it.value) for tag in events.Tags()["scalars"] for it in events.Scalars(tag)}
    values = {(name, step): value for name, step, value in own.rows}
    assert len(written) == len(own.rows) == len(values) and own.closed
    assert all(values[tag, step] == pytest.approx(value, rel=1e-6) for tag, step, value in written)
    names = {name for name, _ in values}
    assert {"train/loss", "train/lr", "test/accuracy", "curve/base", "curve/new"} <= names
    assert {f"regulator/text_{name}" for name in ("gamma", "beta", "ratio", "gradient_norm")} <= names
    assert stand_ins["mlflow"].rows == own.rows and stand_ins["mlflow"].ended == [(str(tmp_path / "run"), "FINISHED")]
    assert [(*(set(row.items()) - {("step", row["step"])}), row["step"]) for row in stand_ins["wandb"].rows] == [
        ((name, value), step) for name, step, value in own.rows
    ]
    assert (stand_ins["wandb"].ended, stand_ins["wandb"].status) == (1, 0)
    for settings in (own.settings, stand_ins["wandb"].facts["config"]):
        assert settings["TRAINER.NAME"] == "CoOpGRAM" and settings["DATASET.NUM_SHOTS"] == 2
    assert stand_ins["mlflow"].settings["DATASET.NUM_SHOTS"] == "2"


@pytest.mark.parametrize("often", [1, 10])
def test_a_resumed_run_has_each_training_step_once(tiny_data, tiny_options, tmp_path, monkeypatch, often):
    """It stops in its second epoch; with `often` 10 it has no checkpoint by then, and begins anew."""
    options = ("DATASET.NUM_SHOTS", 2, "DATALOADER.NUM_WORKERS", 0, "DATALOADER.TRAIN_X.BATCH_SIZE", 2, *tiny_options)
    options += ("OPTIM.MAX_EPOCH", 2, "TRAIN.CHECKPOINT_FREQ", often, "TRAIN.PRINT_FREQ", 1)
    options += ("TEST.AT_STEPS", "[0,1,4,5]", "TRAINER.GRAM.CHECKPOINT", tmp_path / "meta.safetensors")
    save_meta_checkpoint(tmp_path / "meta.safetensors", meta_of(load_backbone("random-tiny", "cpu")))
    argv = train_flags(tiny_data, tmp_path / "run", "CoOpGRAM", *options, config="gram_small_c4_ep10_batch32_ctxv1")
    step = PromptTrainer.forward_backward

    def stopping(self, batch):
        if (self.epoch, self.batch_idx) == (1, 2):
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PromptTrainer, "forward_backward", stopping)
        launch.train(argv, quiet=True)
    time.sleep(1.1)  # TensorBoard orders its files by their seconds
    launch.train(argv, quiet=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    expected = {"train/loss": [*range(8)], "curve/new": [0, 1, 4, 5], "regulator/text_gamma": [4, 8]}
    assert {tag: [it.step for it in events.Scalars(tag)] for tag in expected} == expected


def test_a_tracker_that_fails_costs_its_own_numbers_only(tmp_path, stand_ins, monkeypatch, capsys):
    def no_network(row):
        raise ConnectionError("no network")

    monkeypatch.setattr(stand_ins["wandb"], "log", no_network)
    with Trackers(tmp_path, {}) as trackers:
        for step in (1, 2):
            trackers.log(step, {"train/loss": 0.5})
    assert capsys.readouterr().out == "Note: WandB receives no more numbers of this run (no network)\n"
    assert Own.made[0].rows == [("train/loss", 1, 0.5), ("train/loss", 2, 0.5)] == stand_ins["mlflow"].rows


def test_runs_of_several_seeds_at_once_do_not_mix(tmp_path, stand_ins):
    with Trackers(tmp_path / "a", {"SEED": 1}) as one, Trackers(tmp_path / "b", {"SEED": 2}) as two:
        two.log(1, {"train/loss": 0.2})
        second = stand_ins["wandb"].last
        one.log(1, {"train/loss": 0.1})
        assert stand_ins["mlflow"].last == str(tmp_path / "a")
    assert [run.rows[0]["train/loss"] for run in (stand_ins["wandb"], second)] == [0.1, 0.2]
    assert [name for name, _ in stand_ins["mlflow"].ended] == [str(tmp_path / "b"), str(tmp_path / "a")]


def test_a_finished_run_survives_a_tracker_that_cannot_end(tiny_data, tiny_options, tmp_path, stand_ins, monkeypatch):
    """The run counts as finished; all trackers are closed, also one that got no more numbers."""

    def no_network(*values, **more):
        raise ConnectionError("no network")

    monkeypatch.setattr(stand_ins["wandb"], "finish", no_network, raising=False)
    monkeypatch.setattr(Own, "log", no_network)
    options = ("DATASET.NUM_SHOTS", 1, "DATALOADER.NUM_WORKERS", 0, *tiny_options)
    launch.train(train_flags(tiny_data, tmp_path / "run", "CoOp", *options), quiet=True)
    assert read_json(tmp_path / "run/run.json")["finished"] and (tmp_path / "run/results.json").exists()
    notes = (tmp_path / "run/log.txt").read_text()
    assert [notes.count(f"{name} receives no more numbers of this run (no network)") for name in ("Own", "WandB")] == [
        1,
        1,
    ]
    assert Own.made[0].closed and stand_ins["mlflow"].ended


def test_a_run_that_fails_ends_its_trackers(tiny_data, tiny_options, tmp_path, stand_ins, monkeypatch):
    """The next run of the process has trackers of its own."""

    def fail(self, batch):
        raise GramError("expected a finite loss")

    monkeypatch.setattr(PromptTrainer, "forward_backward", fail)
    options = ("DATASET.NUM_SHOTS", 1, "DATALOADER.NUM_WORKERS", 0, *tiny_options)
    with pytest.raises(GramError, match="expected a finite loss"):
        launch.train(train_flags(tiny_data, tmp_path / "a", "CoOp", *options), quiet=True)
    assert Own.made[0].closed and stand_ins["wandb"].status == 1
    assert stand_ins["mlflow"].ended == [(str(tmp_path / "a"), "FAILED")] and not stand_ins["mlflow"].runs


def test_a_tracker_that_cannot_begin_is_one_sentence_and_ends_the_others(tmp_path, stand_ins, monkeypatch):
    def no_key(self, folder, settings):
        raise RuntimeError("api_key not configured\nlog in")

    monkeypatch.setattr(Own, "__init__", no_key)
    says = r"expected a tracker my_trackers:Own that can begin, found an error \(api_key not configured log in\); leave"
    with pytest.raises(GramError, match=says):
        Trackers(tmp_path, {})
    assert stand_ins["wandb"].ended == len(stand_ins["mlflow"].ended) == 1 and not list(tmp_path.iterdir())


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    """The path of the command `gram` begins with its own folder."""
    (tmp_path / "printer_of_mine.py").write_text("class Printer:\n    def __init__(self, folder, settings): pass\n"
                                                 "    def close(self): print('closed')\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setenv("GRAM_TRACKERS", "printer_of_mine:Printer")
    before = list(sys.path)
    with Trackers(tmp_path / "run", {}) as trackers:
        assert type(trackers.all[0]).__module__ == "printer_of_mine" and sys.path == before


def test_without_tensorboard_a_run_has_its_other_trackers(tmp_path, stand_ins, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Trackers(tmp_path, {}) as trackers:
        trackers.log(3, {"train/loss": 0.5})
    assert "TensorBoard is not installed: no scalars are written" in capsys.readouterr().out
    assert Own.made[0].rows == [("train/loss", 3, 0.5)] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("weights", "expected wandb, mlflow or module:Class, found 'weights'"),
        ("no_such_module_here:X", "expected the module no_such_module_here, found none"),
        ("math:Tracker", "expected a class Tracker in math, found none"),
        ("math:pi", "expected a class pi in math, found 3.14"),
        (":X", "expected the module , found one that cannot be imported"),
        ("wandb", r"pip install 'gram-meta\[wandb\]'"),
    ],
)
def test_trackers_that_are_not_there_are_one_sentence_and_leave_nothing(tmp_path, monkeypatch, names, says):
    monkeypatch.setenv("GRAM_TRACKERS", names)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(GramError, match=says) as error:
        Trackers(tmp_path, {})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
