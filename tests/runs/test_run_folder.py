"""One folder, one run, in anybody's train.py; whose prompts a checkpoint holds; equal numbers when they are asked
for."""

import contextlib
import errno
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.training import meta_of, train_flags
from torch import nn

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta import files
from gram_meta.coop import launch
from gram_meta.engine import build_trainer, set_random_seed, setup_logger
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import save_meta_checkpoint
from gram_meta.report.runs import read_runs
from gram_meta.runs import folder as run_folder
from gram_meta.runs import layout, saved
from gram_meta.trainers import base

pytestmark = pytest.mark.usefixtures("one_loading")

CONFIG = {"JointPrompt": "gram_small_c2+2_ep10_batch32_ctxv1", "UniGRAM": "gram_small_c2+2_ep10_batch32_ctxv1"}
CONFIG |= {"ZeroshotCLIP": "gram_small"}
CONFIG |= {"CoCoOp": "gram_small_c4_ep10_batch1_ctxv1", "CoCoOpGRAM": "gram_small_c4_ep10_batch1_ctxv1"}
PAIRS = [("CoOp", "CoOpGRAM"), ("CoCoOp", "CoCoOpGRAM"), ("VPT", "VPTGRAM"), ("JointPrompt", "UniGRAM")]


@pytest.fixture
def flags(tiny_data, tiny_options, tmp_path):
    """flags(out, *options): CoOp's flags for a run of one epoch, two steps."""

    def flags(out, *opts, trainer="CoOp", seed=1):
        options = "DATASET.NUM_SHOTS 2 DATALOADER.TRAIN_X.BATCH_SIZE 4 DATALOADER.NUM_WORKERS 0".split()
        config = CONFIG.get(trainer, "gram_small_c4_ep10_batch32_ctxv1")
        options = (*tiny_options, *options, *opts)
        return train_flags(tiny_data, tmp_path / out, trainer, *options, config=config, seed=seed)

    return flags


def ours(argv):
    """`gram train`; its results."""
    return launch.train(argv, quiet=True)


def train_py(argv, fail=False):
    """What a train.py in CoOp's manner does, which knows nothing of run folders; the trainer, and what it printed."""
    args = launch.build_parser().parse_args(argv)
    cfg = launch.setup_cfg(args)
    set_random_seed(cfg.SEED)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        setup_logger(cfg.OUTPUT_DIR)
        logger = sys.stdout
        try:
            print("***************\n** Arguments **\n***************")
            assert not fail, "a wrong option"
            trainer = build_trainer(cfg)
            if args.eval_only:
                trainer.load_model(args.model_dir, epoch=args.load_epoch)
                trainer.accuracy = trainer.test()
            elif not args.no_train:
                trainer.train()
        except GramError as error:
            error.printed = printed.getvalue()
            raise
        finally:
            if logger.file is not None:
                logger.file.close()  # the process ends
    return trainer, printed.getvalue()


def contents(folder):
    """Every file below a folder, by its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def without_dated_logs(folder):
    """The same without log.txt-<date>, which Dassl's logger begins beside a log.txt and nobody removes."""
    return {name: value for name, value in contents(folder).items() if not name.startswith("log.txt-")}


def learned(folder, epoch=1):
    return torch.load(Path(folder, f"prompt_learner/model.pth.tar-{epoch}"), weights_only=True)["state_dict"]


# ------------------------------------------------------------------------------------------ in somebody else's train.py


def test_a_train_py_that_knows_nothing_of_it_owns_its_folder(flags, tmp_path):
    out = tmp_path / "out"
    _, printed = train_py(flags("out"))
    assert "Finish training" in printed and (out / "log.txt").read_text() == printed
    stored = json.loads((out / "run.json").read_text())
    assert stored["finished"] and stored["results"] and stored["run"]["OPTIM.LR"] == 0.002
    before = contents(out)

    trainer, printed = train_py(flags("out"))  # the same again: one line, nothing done
    assert "This run is finished: " in printed and "epoch [" not in printed and not trainer.record.trained
    assert without_dated_logs(out) == before

    for other, says in (
        (flags("out", "OPTIM.LR", 0.1), r"holds another run \(OPTIM.LR is 0.002 there and 0.1 here\)"),
        (flags("out", seed=0), r"holds another run \(SEED is 1 there and 0 here\)"),
        (flags("out", trainer="VPT"), "holds another run"),
    ):
        with pytest.raises(GramError, match=says) as error:
            train_py(other)
        assert "\n" not in str(error.value)
        assert "Loading dataset" not in error.value.printed  # before CLIP is loaded
        assert without_dated_logs(out) == before
    with pytest.raises(GramError, match=r"holds another run \(--eval-only is False there and True here\)"):
        train_py(["--eval-only", *flags("out")])
    assert without_dated_logs(out) == before


def test_gram_train_and_a_train_py_agree_whose_a_folder_is(flags, tmp_path):
    ours(flags("a"))
    assert "This run is finished" in train_py(flags("a"))[1]
    train_py(flags("b"))
    before = contents(tmp_path / "b")
    assert ours(flags("b")) == json.loads((tmp_path / "b/results.json").read_text())
    assert contents(tmp_path / "b") == before
    assert torch.equal(learned(tmp_path / "a")["ctx"], learned(tmp_path / "b")["ctx"])


def test_an_evaluation_is_a_run_too(flags, tmp_path):
    train_py(flags("run"))
    evaluation = ["--eval-only", "--model-dir", str(tmp_path / "run")]
    trainer, _ = train_py([*evaluation, *flags("tested")])
    before = contents(tmp_path / "tested")
    again, printed = train_py([*evaluation, *flags("tested")])
    assert "This run is finished" in printed and "=> result" not in printed
    assert again.accuracy == trainer.accuracy and without_dated_logs(tmp_path / "tested") == before
    assert ours([*evaluation, *flags("tested")])["metrics"]["accuracy"] == trainer.accuracy
    with pytest.raises(GramError, match="holds another run"):
        train_py([*evaluation, "--load-epoch", "1", *flags("tested")])
    with pytest.raises(GramError, match="holds another run"):
        train_py(["--eval-only", *flags("tested")])  # the start, into the folder of what was learned
    assert without_dated_logs(tmp_path / "tested") == before


class Stop(Exception):
    pass


def stopped(monkeypatch, at):
    """Context in which training stops in an epoch."""
    step, patch = base.PromptTrainer.forward_backward, monkeypatch.context()

    @contextlib.contextmanager
    def context():
        def stopping(self, batch):
            if self.epoch == at:
                raise Stop
            return step(self, batch)

        with patch as one:
            one.setattr(base.PromptTrainer, "forward_backward", stopping)
            with pytest.raises(Stop):
                yield

    return context()


def test_a_stopped_run_goes_on_in_one_log(flags, tmp_path, monkeypatch):
    options = ("OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1)
    train_py(flags("whole", *options))
    with stopped(monkeypatch, at=2):
        train_py(flags("parts", *options))
    out = tmp_path / "parts"
    first = (out / "log.txt").read_text()
    assert "epoch [2/3]" in first and not (out / "results.json").exists()
    _, printed = train_py(flags("parts", *options))
    assert "will resume training from epoch 3" in printed
    begun = printed.index("No checkpoint") if "No checkpoint" in printed else printed.index("Found checkpoint")
    assert (out / "log.txt").read_text() == first + printed[begun:]  # which CoOp's parser reads
    (dated,) = out.glob("log.txt-*")
    assert dated.read_text() == printed  # Dassl's own, left as it is
    accuracy = json.loads((out / "results.json").read_text())["metrics"]["accuracy"]
    after = (out / "log.txt").read_text().partition("Finish training")[2]  # where CoOp's parser looks
    assert after.count(f"* accuracy: {accuracy:.1f}%") == 1
    assert torch.equal(learned(out, 3)["ctx"], learned(tmp_path / "whole", 3)["ctx"])


def test_a_start_that_failed_is_no_other_run(flags, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(AssertionError):
        train_py(flags("out"), fail=True)
    assert (out / "log.txt").is_file() and not (out / "run.json").exists()
    _, printed = train_py(flags("out"))
    (dated,) = out.glob("log.txt-*")
    assert dated.read_text() == printed
    assert (out / "log.txt").read_text().endswith(printed[printed.index("No checkpoint") :])
    with pytest.raises(AssertionError):
        train_py(flags("second"), fail=True)
    ours(flags("second"))  # and `gram train` goes the same way
    assert (tmp_path / "second/log.txt").read_text().count("** Arguments **") == 2


def test_a_log_that_this_process_writes_already_is_not_written_twice(flags, tmp_path, monkeypatch):
    """Somebody removed the log of a stopped run: Dassl's logger begins log.txt anew, beside a log.txt-<date>."""
    options = ("OPTIM.MAX_EPOCH", 2, "TRAIN.CHECKPOINT_FREQ", 1)
    with stopped(monkeypatch, at=1):
        train_py(flags("out", *options))
    (tmp_path / "out/log.txt").rename(tmp_path / "out/log.txt-2026-01-01-00-00-00")
    _, printed = train_py(flags("out", *options))
    assert (tmp_path / "out/log.txt").read_text() == printed and printed.count("=> result") == 1
    assert f"The log of this run goes on in {tmp_path}/out/log.txt" in printed


def test_an_evaluation_before_training_is_no_foreign_run(flags, tmp_path):
    """It prints results into the log of this very process before the folder is claimed."""
    argv = flags("out")
    args = launch.build_parser().parse_args(argv)
    cfg = launch.setup_cfg(args)
    with contextlib.redirect_stdout(io.StringIO()):
        setup_logger(cfg.OUTPUT_DIR)
        logger = sys.stdout
        trainer = build_trainer(cfg)
        trainer.test(split="test")
        trainer.train()
        logger.file.close()
    assert json.loads((tmp_path / "out/run.json").read_text())["finished"]


def test_the_folder_of_a_run_without_run_json_is_refused(flags, tmp_path):
    ours(flags("out"))
    out = tmp_path / "out"
    (out / "run.json").unlink()  # as CoOp itself leaves it
    before = contents(out)
    for run in (train_py, ours):
        with pytest.raises(GramError, match="found the prompt_learner/model.pth.tar-1 of a run without run.json"):
            run(flags("out"))
        assert without_dated_logs(out) == before
    shutil.rmtree(out / "prompt_learner")
    (out / "results.json").unlink()
    before = without_dated_logs(out)
    for run in (train_py, ours):
        with pytest.raises(GramError, match="found the log.txt of a run without run.json"):
            run(flags("out"))
        assert without_dated_logs(out) == before
    (out / "run.json").write_text("[]")
    with pytest.raises(GramError, match="run.json: expected the facts of a run, found something else"):
        ours(flags("out"))


def test_a_result_that_was_removed_is_made_again(flags, tmp_path):
    first = ours(flags("out"))
    (tmp_path / "out/results.json").unlink()
    again = ours(flags("out"))
    assert again["metrics"] == first["metrics"]
    assert (tmp_path / "out/log.txt").read_text().count("epoch [1/1] batch [1/2]") == 1  # tested, not trained again


def test_a_program_may_evaluate_several_things_in_a_folder_of_its_own(flags, tmp_path):
    ours(flags("run", "OPTIM.MAX_EPOCH", 2, "TRAIN.CHECKPOINT_FREQ", 1))
    trainer, _ = train_py(["--no-train", *flags("own")])
    with contextlib.redirect_stdout(io.StringIO()):
        for epoch in (1, 2):
            trainer.load_model(str(tmp_path / "run"), epoch=epoch)
            trainer.test()
            trainer.test()
            assert json.loads((tmp_path / "own/results.json").read_text())["epoch"] == epoch
            stored = json.loads((tmp_path / "own/run.json").read_text())
            assert stored["finished"] and stored["run"]["--load-epoch"] == epoch


def test_an_option_that_one_side_does_not_know_decides_nothing(flags, tmp_path):
    """A checkout has options of its own trainers; one of ours that is newer than a run was at its default."""
    ours(flags("out"))
    path = tmp_path / "out/run.json"
    stored = json.loads(path.read_text())
    stored["run"]["TRAINER.MAPLE.PROMPT_DEPTH"] = 9
    del stored["run"]["TRAIN.DETERMINISTIC"]
    path.write_text(json.dumps(stored))
    ours(flags("out"))
    with pytest.raises(GramError, match=r"TRAIN.DETERMINISTIC is False there and True here"):
        ours(flags("out", "TRAIN.DETERMINISTIC", True))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            lambda zero: zero / zero,
            "out: expected a finite loss, found nan in epoch 1, by batch 1; try a lower OPTIM.LR",
        ),
        (
            torch.sqrt,
            "out/prompt_learner: expected finite numbers in ctx, found 256 of 256 that are not, or are above 65,504",
        ),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_is_one_sentence(flags, tmp_path, capsys, monkeypatch, extra, says):
    """No checkpoint of it is written; the square root at 0 is finite, and its derivative is not."""
    loss = torch.nn.functional.cross_entropy
    monkeypatch.setattr(base.F, "cross_entropy", lambda *args: loss(*args) + extra((args[0] * 0).sum()))
    assert launch.main(flags("out", "DATALOADER.TRAIN_X.BATCH_SIZE", 8)) == 2  # one step
    assert capsys.readouterr().err.splitlines()[-1] == f"train.py: {tmp_path}/{says}"
    assert not list((tmp_path / "out").rglob("model*"))


# ----------------------------------------------------------------------------------------------- what cannot be written


def test_a_folder_that_cannot_be_written_is_one_sentence(flags, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GramError, match=r"file/out: cannot be written \(Not a directory\)"):
        ours(flags("file/out"))


def test_a_full_disk_leaves_no_half_of_a_checkpoint(flags, tmp_path, monkeypatch):
    options = ("OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1)
    ours(flags("whole", *options))
    sync, name = files.os.fsync, "model.pth.tar-2"
    save = saved.save_checkpoint

    def saving(state, *rest, **named):
        if state["epoch"] == 2:
            monkeypatch.setattr(files.os, "fsync", full)
        save(state, *rest, **named)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved, "save_checkpoint", saving)
    says = rf"{name}: cannot be written \(No space left on device\); free some space and run the same command again"
    with pytest.raises(GramError, match=says):
        ours(flags("out", *options))
    folder = tmp_path / "out/prompt_learner"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "model.pth.tar-1"]
    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(saved, "save_checkpoint", save)
    ours(flags("out", *options))
    assert torch.equal(learned(tmp_path / "out", 3)["ctx"], learned(tmp_path / "whole", 3)["ctx"])


# ------------------------------------------------------------------------------------------------------ what is there


def test_a_missing_run_or_epoch_says_what_is_there(flags, tmp_path):
    ours(flags("food/shots_2/CoOp/seed1", "OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 2))
    run = tmp_path / "food/shots_2/CoOp/seed1"

    def refused(model_dir, *more):
        with pytest.raises(GramError) as error:
            ours(["--eval-only", "--model-dir", str(model_dir), *more, *flags("tested")])
        assert "\n" not in str(error.value) and not (tmp_path / "tested").exists()
        return str(error.value)

    runs = "runs with checkpoints below"
    assert f"found {runs} {tmp_path}/food: shots_2/CoOp/seed1" in refused(tmp_path / "food")
    found = refused(tmp_path / "food/shots_2/CoOp/seed2")
    assert f"found no such folder, but {runs} {tmp_path}/food/shots_2/CoOp: seed1" in found
    assert f"its run is {run}" in refused(run / "prompt_learner")
    assert f"the folder of its run is {run}" in refused(run / "prompt_learner/model.pth.tar-3")
    assert "epoch 5 (--load-epoch), found epochs 2, 3" in refused(run, "--load-epoch", "5")
    other = tmp_path / "maple/MultiModalPromptLearner"
    other.mkdir(parents=True)
    (other / "model.pth.tar-5").write_bytes(b"")
    assert "found MultiModalPromptLearner/, which another trainer has learned" in refused(other.parent)

    def no_start(value):
        with pytest.raises(GramError) as error:
            ours(flags("tested", "MODEL.INIT_WEIGHTS", value))
        assert "\n" not in str(error.value) and not (tmp_path / "tested").exists()
        return str(error.value)

    assert f"found a folder; there are {run}/prompt_learner/model.pth.tar-2, " in no_start(run)
    there = f"found no such file; there are {run}/prompt_learner/model.pth.tar-2, "
    assert there in no_start(run / "prompt_learner/model.pth.tar-50")
    assert f"found no such file; {runs} {tmp_path}: food/" in no_start(tmp_path / "none/x.pth.tar")
    assert "or for `gram export`" in no_start(tmp_path / "meta.safetensors")
    (tmp_path / "text.pth").write_text("no checkpoint")
    assert "text.pth: expected a checkpoint" in no_start(tmp_path / "text.pth")


def test_what_cannot_begin_in_a_train_py_does_not_stop_the_next_start(flags, tmp_path):
    """Dassl's own log of the failed start stays; it counts as no run."""
    train_py(flags("run"))
    tested = ["--eval-only", "--model-dir", str(tmp_path / "run"), "--load-epoch", "7", *flags("out")]
    with pytest.raises(GramError, match=r"epoch 7 \(--load-epoch\), found epochs 1"):
        train_py(tested)
    for says, argv in (
        ("TRAINER.COOP.PREC", flags("out", "TRAINER.COOP.PREC", "fp8")),
        ("TRAINER.GRAM.CHECKPOINT is empty", flags("out", trainer="CoOpGRAM")),
    ):
        with pytest.raises(GramError, match=says):
            train_py(argv)
    assert {name.partition("-")[0] for name in contents(tmp_path / "out")} == {"log.txt"}
    _, printed = train_py(flags("out"))
    assert (
        "=> result" in printed and "=> result" in (tmp_path / "out/log.txt").read_text().partition("Finish training")[2]
    )

    trainer, printed = train_py(flags("another"))
    before = contents(tmp_path / "another")
    with pytest.raises(GramError, match="found epochs 1"):
        trainer.load_model(str(tmp_path / "run"), epoch=7)
    assert contents(tmp_path / "another") == before


def test_resume_of_something_that_is_not_there_leaves_no_folder(flags, tmp_path):
    ours(flags("run", trainer="CoOp"))
    with pytest.raises(
        GramError, match=r"--resume .*none: expected prompt_learner/checkpoint in it, found no such file; runs"
    ):
        ours(["--resume", str(tmp_path / "none"), *flags("out")])
    resume = ["--resume", str(tmp_path / "run")]
    with pytest.raises(GramError, match="ZeroshotCLIP learns nothing that could be resumed"):
        ours([*resume, *flags("out", trainer="ZeroshotCLIP")])
    with pytest.raises(GramError, match=r"expected a checkpoint of VPT \(--trainer\) to go on from, found one of CoOp"):
        ours([*resume, *flags("out", trainer="VPT")])
    with pytest.raises(GramError, match=r"expected ctx of shape \(6, 64\), found \(4, 64\)"):
        ours([*resume, *flags("out", "TRAINER.COOP.CTX_INIT", "''", "TRAINER.COOP.N_CTX", 6)])
    path = tmp_path / "run/prompt_learner/model.pth.tar-1"
    state = torch.load(path, weights_only=True)
    del state["random"], state["trainer"]
    torch.save(state, path)
    with pytest.raises(GramError, match="a checkpoint that training can go on from, found learned tensors only"):
        ours([*resume, *flags("out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "there", "here"),
    [
        ("OPTIM.LR", "0.002", "0.2"),
        ("OPTIM.MAX_EPOCH", "2", "1"),
        ("OPTIM.WEIGHT_DECAY", "0.0005", "0.1"),
        ("TRAINER.COOP.PREC", "'fp32'", "fp16"),
        ("SEED", "1", "2"),
    ],
)
def test_resume_with_settings_that_it_would_not_follow_is_refused(flags, tmp_path, option, there, here):
    """The state in a checkpoint replaces them, so results.json would record what was not used."""
    ours(flags("run", "OPTIM.MAX_EPOCH", 2))
    resume = ["--resume", str(tmp_path / "run")]
    with pytest.raises(GramError, match=f"--resume .*run: expected {option} as in that run, {there}, found "):
        ours([*resume, *flags("out", "OPTIM.MAX_EPOCH", 2, option, here, seed=2 if option == "SEED" else 1)])
    assert not (tmp_path / "out").exists()


def test_resume_with_another_meta_checkpoint_is_refused(flags, tmp_path, backbone):
    for seed in (7, 8):
        save_meta_checkpoint(tmp_path / f"meta{seed}.safetensors", meta_of(backbone, seed=seed))
    shutil.copy(tmp_path / "meta7.safetensors", tmp_path / "moved.safetensors")
    option = "TRAINER.GRAM.CHECKPOINT"
    ours(flags("run", option, tmp_path / "meta7.safetensors", trainer="CoOpGRAM"))
    resume = ["--resume", str(tmp_path / "run")]
    with pytest.raises(GramError, match=f"expected {option} as in that run, 'SHA-256 "):
        ours([*resume, *flags("out", option, tmp_path / "meta8.safetensors", trainer="CoOpGRAM")])
    ours([*resume, *flags("out", option, tmp_path / "moved.safetensors", trainer="CoOpGRAM")])


def test_resume_beyond_the_last_epoch_is_refused(flags, tmp_path):
    """Where no run.json names the settings: the weights of epoch 3 would count as those of epoch 2."""
    ours(flags("run", "OPTIM.MAX_EPOCH", 3))
    for name in ("run.json", "results.json"):
        (tmp_path / "run" / name).unlink()
    resume = ["--resume", str(tmp_path / "run")]
    with pytest.raises(GramError, match="model.pth.tar-3: expected at most the 2 epochs of OPTIM.MAX_EPOCH, found 3"):
        ours([*resume, *flags("out", "OPTIM.MAX_EPOCH", 2)])
    assert ours([*resume, *flags("out", "OPTIM.MAX_EPOCH", 3)])["epoch"] == 3


def test_a_resumed_run_in_another_folder_keeps_the_best_epoch_and_all_seconds(flags, tmp_path, monkeypatch):
    """The first epoch is the best one, and the run stops after it."""
    options = ("OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1, "TEST.FINAL_MODEL", "best_val")
    test, of_val = base.PromptTrainer.test, {0: 90.0, 1: 50.0, 2: 40.0}
    monkeypatch.setattr(
        base.PromptTrainer,
        "test",
        lambda self, split=None: test(self, split) and of_val[self.epoch] if split else test(self),
    )
    with stopped(monkeypatch, at=1):
        ours(flags("run", *options))
    before = saved.read(tmp_path / "run/prompt_learner/model-best.pth.tar")
    last = saved.read(tmp_path / "run/prompt_learner/model.pth.tar-1")
    torch.save(last | {"seconds": 1000.0}, tmp_path / "run/prompt_learner/model.pth.tar-1")
    results = ours(["--resume", str(tmp_path / "run"), *flags("out", *options)])
    best = saved.read(tmp_path / "out/prompt_learner/model-best.pth.tar")
    assert torch.equal(best["state_dict"]["ctx"], before["state_dict"]["ctx"]) and best["val_result"] == 90.0
    assert results["epoch"] == 1 and results["learned_by"] == "CoOp" and results["model_dir"] == ""
    assert 0 < last["seconds"] < 1000 < results["seconds"]["train"] < 2000
    assert saved.read(tmp_path / "out/prompt_learner/model.pth.tar-3")["seconds"] > 1000


def test_best_val_without_validation_images_is_refused(flags, tmp_path, tiny_data):
    """Else the test images choose the epoch."""
    data = shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("split_fewshot"))
    split = data / "emoji_food/split_zhou_EmojiFood.json"
    split.write_text(json.dumps(json.loads(split.read_text()) | {"val": []}))
    argv = [str(data) if value == str(tiny_data) else value for value in flags("out", "TEST.FINAL_MODEL", "best_val")]
    with pytest.raises(GramError, match="TEST.FINAL_MODEL best_val: expected a dataset with validation images"):
        ours(argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_an_epoch_the_last_one_or_the_best_where_the_run_was_to_end_with_it(flags, tmp_path, capsys):
    options = ("OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1)
    ours(flags("last", *options))
    ours(flags("best", *options, "TEST.FINAL_MODEL", "best_val"))
    last, best = tmp_path / "last", tmp_path / "best"
    assert layout.choose_checkpoint(last, None) == (
        last / "prompt_learner/model.pth.tar-3",
        "the last of epochs 1, 2, 3",
    )
    path, why = layout.choose_checkpoint(best, None)
    assert (
        path.name == "model-best.pth.tar" and why == "the best by validation; epochs here: 1, 2, 3, model-best.pth.tar"
    )
    assert layout.choose_checkpoint(best, 2) == (best / "prompt_learner/model.pth.tar-2", "")
    shutil.copy(path, last / "prompt_learner")  # of an earlier run in this folder, which was to end with its last epoch
    assert layout.choose_checkpoint(last, None)[0].name == "model.pth.tar-3"
    (last / "run.json").unlink()  # CoOp's own say nothing: there it means that the best was wished for
    assert layout.choose_checkpoint(last, None)[0].name == "model-best.pth.tar"
    results = launch.train(["--eval-only", "--model-dir", str(best), *flags("tested")])
    assert "No epoch named (--load-epoch): model-best.pth.tar is taken, the best by" in capsys.readouterr().out
    assert results["epoch"] == torch.load(path, weights_only=True)["epoch"]


@pytest.mark.slow
def test_mismatched_names_and_shapes_are_named(flags, tmp_path):
    ours(flags("run"))
    path = tmp_path / "run/prompt_learner/model.pth.tar-1"
    state = torch.load(path, weights_only=True)

    def refused(**changes):
        torch.save({**state, **changes}, path)
        with pytest.raises(GramError) as error:
            ours(["--eval-only", "--model-dir", str(tmp_path / "run"), *flags("tested")])
        assert "\n" not in str(error.value) and not (tmp_path / "tested").exists()
        return str(error.value)

    context = state["state_dict"]["ctx"]
    assert "expected ctx, which the trainer learns, found ctxx" in refused(state_dict={"ctxx": context})
    assert "found ctx, visual_ctx" in refused(state_dict={"ctx": context, "visual_ctx": context})
    assert "found nothing" in refused(state_dict={})
    assert "expected ctx of shape (4, 64), found (4, 32)" in refused(state_dict={"ctx": context[:, :32]})
    assert "expected tensors by name as state_dict, found a int" in refused(state_dict=5)
    other = {"name": "ViT-B/16", "fingerprint": "0" * 64}
    assert "was learned for the backbone ViT-B/16, found random-tiny" in refused(backbone=other)
    weights = {"name": "random-tiny", "fingerprint": "0" * 64}
    assert "backbone random-tiny, found random-tiny, of other weights" in refused(backbone=weights)
    key = "TRAINER.COOP.CLASS_TOKEN_POSITION"
    assert f"was learned with {key} 'front', found 'end'" in refused(reads={key: "front"})
    torch.save({**state, "state_dict": {"module.ctx": context}}, path)  # of a DataParallel
    ours(["--eval-only", "--model-dir", str(tmp_path / "run"), *flags("tested")])


def test_another_backbone_is_refused_before_it_is_loaded(flags, tmp_path, monkeypatch):
    train_py(flags("run"))
    monkeypatch.setattr(base, "load_backbone", lambda *_: pytest.fail("it was loaded"))
    other = flags("other", "MODEL.BACKBONE.NAME", "ViT-B/16", "INPUT.SIZE", "(224, 224)")
    with pytest.raises(GramError, match="run: expected the backbone it was made with, random-tiny, found 'ViT-B/16'"):
        launch.train(["--eval-only", "--model-dir", str(tmp_path / "run"), *other])


def test_a_start_for_another_backbone_is_reported(flags, tmp_path, capsys):
    ours(flags("run"))
    path = tmp_path / "run/prompt_learner/model.pth.tar-1"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "backbone": {"name": "ViT-B/16", "fingerprint": "0" * 64}}, path)
    launch.train(flags("out", "MODEL.INIT_WEIGHTS", path))
    assert "was learned for the backbone ViT-B/16, here is random-tiny" in capsys.readouterr().out


def test_a_flag_behind_the_options_is_reported(flags, tmp_path):
    with pytest.raises(GramError, match=r"--load-epoch stands behind KEY VALUE pairs; expected flags before them"):
        ours([*flags("out"), "--load-epoch", "5"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("before", "opts", "says"),
    [
        (
            ["--model-dir", "run"],
            [],
            "--model-dir names the run whose prompts are evaluated; expected --eval-only with it",
        ),
        (["--eval-only", "--load-epoch", "0"], [], "--load-epoch 0: expected --model-dir with it, found none"),
        ([], ["OPTIM.MAX_EPOCH", 0], "OPTIM.MAX_EPOCH: expected at least 1 .* found 0"),
        ([], ["DATALOADER.TRAIN_X.BATCH_SIZE", 0], "DATALOADER.TRAIN_X.BATCH_SIZE: expected at least 1 .* found 0"),
        (
            ["--eval-only"],
            ["DATALOADER.TEST.BATCH_SIZE", -1],
            "DATALOADER.TEST.BATCH_SIZE: expected at least 1 .* found -1",
        ),
    ],
)
def test_what_would_do_nothing_or_fail_late_is_reported_first(flags, tmp_path, before, opts, says):
    with pytest.raises(GramError, match=says) as error:
        ours([*before, *flags("out", *opts)])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- interchange


def meta_checkpoint(backbone, trainer, path):
    text, visual = {"VPTGRAM": (0, 4), "UniGRAM": (2, 2)}.get(trainer, (4, 0))
    save_meta_checkpoint(path, meta_of(backbone, text, visual, conditional=trainer == "CoCoOpGRAM"))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("plain", "gram"), PAIRS)
def test_prompts_of_a_family_are_evaluated_by_each_other(flags, tmp_path, backbone, capsys, plain, gram):
    meta = meta_checkpoint(backbone, gram, tmp_path / "meta.safetensors")
    trained = {plain: ours(flags(plain, trainer=plain))}
    trained[gram] = ours(flags(gram, "TRAINER.GRAM.CHECKPOINT", meta, trainer=gram))
    assert trained[gram]["learned_by"] == gram and trained[plain]["learned_by"] == plain
    assert trained[gram]["metrics"] != trained[plain]["metrics"] or not torch.equal(
        next(iter(learned(tmp_path / gram).values())), next(iter(learned(tmp_path / plain).values()))
    )
    for learner, other in ((plain, gram), (gram, plain)):
        capsys.readouterr()
        argv = ["--eval-only", "--model-dir", str(tmp_path / learner), *flags(f"by{other}", trainer=other)]
        results = launch.train(argv)
        printed = capsys.readouterr().out
        assert printed.count(f"Note: these prompts were learned by {learner}; {other} evaluates them\n") == 1
        assert results["metrics"] == trained[learner]["metrics"]
        assert results["trainer"] == other and results["learned_by"] == learner
        # a report sees the meta-checkpoint behind the prompts, whoever evaluates them
        assert results["meta_checkpoint"] == trained[learner]["meta_checkpoint"]
        with pytest.raises(GramError, match=f"expected a checkpoint of {other} .*, found one of {learner}"):
            resume = ["--resume", str(tmp_path / learner)]
            ours([*resume, *flags("resumed", "TRAINER.GRAM.CHECKPOINT", meta, trainer=other)])
    # evaluated with a meta-checkpoint at hand, CoOp's prompts are still none of its
    argv = flags("with", "TRAINER.GRAM.CHECKPOINT", meta, trainer=gram)
    results = ours(["--eval-only", "--model-dir", str(tmp_path / plain), *argv])
    assert results["meta_checkpoint"]["sha256"] == "" and results["learned_by"] == plain
    start = ours(["--eval-only", *flags("start", "TRAINER.GRAM.CHECKPOINT", meta, trainer=gram)])
    assert start["learned_by"] == "" and start["meta_checkpoint"]["path"] == str(meta)


def test_other_kinds_of_prompts_stay_refused(flags, tmp_path):
    ours(flags("run", trainer="CoOp"))
    for trainer in ("CoCoOp", "VPTGRAM", "UniGRAM"):
        says = f"expected prompts of .*{trainer}.*, found those of CoOp"
        with pytest.raises(GramError, match=says):
            ours(["--eval-only", "--model-dir", str(tmp_path / "run"), *flags("out", trainer=trainer)])
    assert not (tmp_path / "out").exists()


class OfficialLearner(nn.Module):
    """The shape of the learner in CoOp's trainers/coop.py: a half-precision context, and buffers of the class names."""

    def __init__(self, classes, tokens=4, width=64):
        super().__init__()
        self.ctx = nn.Parameter(torch.randn(tokens, width).half())
        self.register_buffer("token_prefix", torch.zeros(classes, 1, width).half())
        self.register_buffer("token_suffix", torch.zeros(classes, 72, width).half())


def test_a_run_of_coop_itself_loads_here(flags, tmp_path, capsys):
    """Without a fact of ours, in half precision, with the scheduler as an object, as older Dassl saved it."""
    learner = OfficialLearner(classes=4)
    optimizer = torch.optim.SGD([learner.ctx], lr=0.002)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    state = {
        "state_dict": learner.state_dict(),
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": schedule, "last_epoch": 50},
        "val_result": None,
    }
    folder = tmp_path / "run/prompt_learner"
    folder.mkdir(parents=True)
    torch.save(state, folder / "model.pth.tar-50")
    for trainer in ("CoOp", "CoOpGRAM"):
        epoch = ["--load-epoch", "50"] if trainer == "CoOp" else []
        argv = ["--eval-only", "--model-dir", str(tmp_path / "run"), *flags(f"by{trainer}", trainer=trainer)]
        results = launch.train(epoch + argv)
        assert "does not say who learned these prompts; they are taken for CoOp's" in capsys.readouterr().out
        assert results["learned_by"] == "CoOp" and results["epoch"] == 50
        assert results["model_dir"] == str(tmp_path / "run")
        (run,) = read_runs([tmp_path / f"by{trainer}"])  # a report takes it for CoOp's, whoever has evaluated it
        assert run.trainer == "CoOp" and run.label == "CoOp" and run.source == "EmojiFood"
    trainer, _ = train_py(["--no-train", *flags("start", "MODEL.INIT_WEIGHTS", folder / "model.pth.tar-50")])
    context = trainer.model.prompt_learner.ctx
    assert context.dtype == torch.float32 and torch.equal(context, learner.ctx.float())


def test_a_run_of_ours_loads_in_coop_itself(flags, tmp_path):
    """As its load_model reads a checkpoint: three keys, strict=False; and as load_pretrained_weights does."""
    from gram_meta.engine import load_checkpoint, load_pretrained_weights

    ours(flags("run"))
    path = tmp_path / "run/prompt_learner/model.pth.tar-1"
    for checkpoint in (load_checkpoint(str(path)), torch.load(path)):  # torch's own default is weights_only
        state, learner = checkpoint["state_dict"], OfficialLearner(classes=4)
        assert checkpoint["epoch"] == 1
        for name in ("token_prefix", "token_suffix"):
            state.pop(name, None)
        missing = learner.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) == {"token_prefix", "token_suffix"}
        assert torch.equal(learner.ctx, learned(tmp_path / "run")["ctx"].half())
    learner = OfficialLearner(classes=4)
    load_pretrained_weights(learner, str(path))
    assert torch.equal(learner.ctx, learned(tmp_path / "run")["ctx"].half())


# -------------------------------------------------------------------------------------------- devices and equal numbers


@pytest.mark.parametrize("trainer", ["ZeroshotCLIP", "CoOp", "CoCoOp", "VPT", "JointPrompt"])
def test_several_gpus_are_reported_and_data_parallel_is_never_entered(flags, monkeypatch, capsys, trainer):
    def never(*_, **__):
        raise AssertionError("nn.DataParallel")

    monkeypatch.setattr(nn, "DataParallel", never)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    launch.train(flags(trainer, trainer=trainer))
    lines = [line for line in capsys.readouterr().out.splitlines() if "GPU" in line and "are here" in line]
    used = "one of them" if torch.cuda.is_available() else "the CPU alone"
    assert len(lines) == 1 and lines[0].startswith(f"3 GPUs are here: {used} is used, never nn.DataParallel")


@pytest.mark.slow
def test_a_resumed_run_with_workers_and_without_kept_images_ends_the_same(flags, tmp_path, monkeypatch):
    options = ("DATALOADER.NUM_WORKERS", 2, "OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1)
    ours(flags("whole", *options))

    def stop(self):
        if self.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base.PromptTrainer, "before_epoch", stop)
        ours(flags("stopped", *options))
    ours(flags("stopped", *options, "TRAINER.MEMORY.KEPT_IMAGES", 1e-6))
    assert torch.equal(learned(tmp_path / "whole", 3)["ctx"], learned(tmp_path / "stopped", 3)["ctx"])
    line = "The training images take more than 1e-06 GB: decoded every epoch (TRAINER.MEMORY.KEPT_IMAGES)"
    assert [line in (tmp_path / run / "log.txt").read_text() for run in ("whole", "stopped")] == [False, True]


@pytest.mark.slow
def test_determinism_gives_equal_numbers_twice(flags, tmp_path, monkeypatch):
    """With two loader workers and random augmentation; also where a train.py has asked for cuDNN's benchmark."""
    options = ("TRAIN.DETERMINISTIC", True, "DATALOADER.NUM_WORKERS", 2, "OPTIM.MAX_EPOCH", 3)
    step, seen = base.PromptTrainer.forward_backward, []

    def watching(self, batch):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return step(self, batch)

    monkeypatch.setattr(base.PromptTrainer, "forward_backward", watching)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    first, second = (ours(flags(out, *options)) for out in ("first", "second"))
    assert set(seen) == {(True, False)} and run_folder.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    # afterwards, in this process, all is as it was
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    start = torch.equal(learned(tmp_path / "first", 3)["ctx"], learned(tmp_path / "second", 3)["ctx"])
    assert start and first["metrics"] == second["metrics"]
    third = ours(flags("third", *options, seed=2))
    assert not torch.equal(learned(tmp_path / "first", 3)["ctx"], learned(tmp_path / "third", 3)["ctx"]) and third
    try:
        train_py(flags("theirs", *options))  # in a train.py of others, from build_trainer on
        assert set(seen) == {(True, False)}
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(learned(tmp_path / "first", 3)["ctx"], learned(tmp_path / "theirs", 3)["ctx"])


def test_determinism_takes_a_seed(flags, tmp_path):
    with pytest.raises(GramError, match="expected --seed 0 or more, found -1"):
        ours(flags("out", "TRAIN.DETERMINISTIC", True, seed=-1))
    assert not (tmp_path / "out").exists() and not torch.are_deterministic_algorithms_enabled()
