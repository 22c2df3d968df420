"""Meta-training on a tiny corpus: what it learns, resumes, repeats and refuses."""

import json
from unittest.mock import MagicMock

import pytest
import torch
from helpers.meta_training import Store, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gram_meta.backbone.clip import load_backbone
from gram_meta.cli import main
from gram_meta.errors import GramError
from gram_meta.files import read_json, write_json
from gram_meta.method import outer as module
from gram_meta.method.bilevel import meta_losses
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.outer import BatchResult, parameters_of
from gram_meta.method.prompts import initial_prompts


@pytest.fixture(scope="module")
def store():
    return Store(load_backbone("random-tiny"))


def weights(path):
    checkpoint = load_meta_checkpoint(path)
    found = {f"prompts.{kind}": value for kind, value in checkpoint.prompts.items()}
    return found | (checkpoint.regulator.state_dict() if checkpoint.regulator else {})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_it_learns_and_writes_what_it_should(store, tmp_path):
    best = trainer(store, tmp_path, "OUTER.STEPS", "60", "OUTER.COSINE", "False").run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(0, 61, 4))
    assert log[-1]["loss_after"] < log[0]["loss_after"]
    checkpoint = load_meta_checkpoint(best)
    lowest = min(log, key=lambda row: row["loss_after"])
    assert checkpoint.provenance["step"] == lowest["step"]
    assert checkpoint.provenance["held_out"]["loss_after"] == pytest.approx(lowest["loss_after"])
    assert checkpoint.backbone_fingerprint == store.backbone and checkpoint.tokens == {"text": 4}
    norms = checkpoint.gradient_norms["text"]
    assert 0 < norms["q05"] <= norms["q50"] <= norms["q95"]
    first = initial_prompts(load_backbone("random-tiny"), 4, 0, "a photo of a")["text"]
    assert not torch.equal(checkpoint.prompts["text"], first)
    regulator = checkpoint.regulator.gates["text"]
    assert all(parameter.abs().max() > 1e-4 for parameter in (regulator.weight_gamma, regulator.weight_beta))
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_seed_gives_the_same_weights_twice_and_another_seed_others(store, tmp_path):
    runs = {}
    for name, opts in (("a", ()), ("b", ()), ("c", ("SEED", "2"))):
        trainer(store, tmp_path / name, *opts).run()
        runs[name] = weights(tmp_path / name / "last.safetensors")
    assert same(runs["a"], runs["b"]) and not same(runs["a"], runs["c"])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 6, 8])
def test_a_resumed_run_ends_like_an_uninterrupted_one(store, tmp_path, stop, monkeypatch):
    trainer(store, tmp_path / "whole").run()
    broken = trainer(store, tmp_path / "broken")
    step = broken.step

    def interrupted(number, episode):
        if number == stop:
            raise KeyboardInterrupt
        return step(number, episode)

    monkeypatch.setattr(broken, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    trainer(store, tmp_path / "broken").run(resume=True)
    for name in ("best.safetensors", "last.safetensors"):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "broken" / name))
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "broken")]
    assert logs[0] == logs[1]
    norms = [load_meta_checkpoint(tmp_path / run / "last.safetensors").gradient_norms for run in ("whole", "broken")]
    assert norms[0] == norms[1]
    for tag in ("held_out/loss_after", "meta_train/query_loss"):  # each step once
        events = [EventAccumulator(str(tmp_path / run / "tensorboard")).Reload() for run in ("whole", "broken")]
        assert [it.step for it in events[0].Scalars(tag)] == [it.step for it in events[1].Scalars(tag)]


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(store, tmp_path):
    best = trainer(store, tmp_path).run()
    before = best.read_bytes()
    assert trainer(store, tmp_path).run(resume=True).read_bytes() == before


@pytest.mark.slow
def test_another_runs_folder_is_refused(store, tmp_path):
    trainer(store, tmp_path).run()
    with pytest.raises(GramError, match="--resume goes on"):
        trainer(store, tmp_path).run()
    with pytest.raises(GramError, match="config.INNER.ALPHA as in the run to resume, 0.01, found 0.5"):
        trainer(store, tmp_path, "INNER.ALPHA", "0.5").run(resume=True)
    trainer(store, tmp_path, "LOADER.WORKERS", "0").run(resume=True)  # how fast images come is another thing


@pytest.mark.slow
def test_a_run_goes_on_under_a_version_with_more_settings(store, tmp_path):
    trainer(store, tmp_path).run()
    facts = read_json(tmp_path / "run.json")
    del facts["config"]["OUTER"]["META"]  # as an older version wrote it
    write_json(tmp_path / "run.json", facts)
    trainer(store, tmp_path).run(resume=True)
    with pytest.raises(GramError, match="config.OUTER.META as in the run to resume, True, found False"):
        trainer(store, tmp_path, "OUTER.META", "False").run(resume=True)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_step_and_task(store, tmp_path, monkeypatch):
    run = trainer(store, tmp_path)

    def poisoned(*args):
        result = meta_losses(*args)
        factor = torch.tensor([1.0, float("nan")]) if run.optimiser.state else 1.0
        return result._replace(losses=result.losses * factor)

    monkeypatch.setattr(module, "meta_losses", poisoned)
    with pytest.raises(GramError) as error:
        run.run()
    words = run.train_tasks.draw(3).words
    assert f"found nan at step 2 in task 3 ({', '.join(words)})" in str(error.value)
    assert load_meta_checkpoint(tmp_path / "last.safetensors").provenance["step"] == 0


def test_a_gradient_that_is_not_finite_moves_nothing(store, tmp_path):
    run = trainer(store, tmp_path)
    parameters = parameters_of(run.optimiser)
    before = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.raises(GramError, match="expected finite gradients, found others at step 1; the last good checkpoint"):
        run.finish_step(1, BatchResult.zeros(len(run.own), len(run.kinds), run.backbone.device))
    assert all(map(torch.equal, before, parameters))


@pytest.mark.slow
def test_without_a_regulator_and_without_meta_learning(store, tmp_path):
    trainer(store, tmp_path / "maml", "REGULATOR.ENABLED", "False").run()
    assert load_meta_checkpoint(tmp_path / "maml" / "last.safetensors").regulator is None
    trainer(store, tmp_path / "plain", "OUTER.META", "False").run()
    assert load_meta_checkpoint(tmp_path / "plain" / "last.safetensors").regulator is None


def test_held_out_topics_are_never_trained_on(store, tmp_path):
    run = trainer(store, tmp_path)
    held = {topic for task in run.held_tasks for topic in task.topics}
    seen = {topic for number in range(40) for topic in run.train_tasks.draw(number).topics}
    assert held <= set(run.held_topics) and seen <= set(run.train_topics) and not held & seen


def test_what_does_not_belong_together_is_refused(store, tmp_path):
    with pytest.raises(GramError, match="store: other backbone"):
        trainer(store, tmp_path, "BACKBONE.NAME", "random-tiny-RN")
    with pytest.raises(GramError, match="PROMPT: expected TEXT_TOKENS or VISUAL_TOKENS"):
        trainer(store, tmp_path, "PROMPT.TEXT_TOKENS", "0")
    with pytest.raises(
        GramError, match="CHC.LABELLED is True: expected a hierarchy of labelled classes, found one of topics"
    ):
        trainer(store, tmp_path, "CHC.LABELLED", "True")
    with pytest.raises(GramError, match="OUTER.OPTIMIZER"):
        trainer(store, tmp_path, "OUTER.OPTIMIZER", "lion")


def test_the_command_names_what_is_missing(tmp_path, capsys):
    args = ["--store", str(tmp_path / "none"), "--hierarchy", str(tmp_path / "none"), "-o", str(tmp_path / "out")]
    assert main(["pretrain", *args]) == 2
    assert "expected a pair store" in capsys.readouterr().err
    assert main(["pretrain", *args, "OUTER.STEP", "3"]) == 2
    assert "did you mean 'OUTER.STEPS'" in capsys.readouterr().err


def test_a_gpu_reads_many_steps_at_once_and_still_names_the_step(store, tmp_path):
    """With `read_every` of a GPU: a loss of an earlier step ends the run before anything of it is saved."""
    run, log = trainer(store, tmp_path, "EVAL.EVERY", "4", "CHECKPOINT.EVERY", "4"), MagicMock()
    run.read_every = 10
    coming = iter(run.episodes_of(0, 12))
    for step in range(1, 4):
        run.step(step, next(coming))
        run.record(step, log)
    assert not log.track.called and len(run.unread) == 3
    run.unread[1].numbers[2] = torch.nan
    run.step(4, next(coming))
    with pytest.raises(GramError, match="expected a finite loss, found nan at step 2 in task 2 "):
        run.record(4, log)
    assert [call.args[0] for call in log.track.call_args_list] == [1] and not list(tmp_path.iterdir())
