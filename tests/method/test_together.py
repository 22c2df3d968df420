"""Meta-trainings of several seeds at once: each equals the run of its own seed."""

import json

import pytest
import torch
from helpers.meta_training import Store, make_hierarchy, settings, trainer

from gram_meta.backbone.clip import load_backbone
from gram_meta.config import as_dict
from gram_meta.errors import GramError
from gram_meta.files import read_json, write_json
from gram_meta.method import together as module
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.meta_run import Stopped
from gram_meta.method.meta_trainer import MetaTrainer
from gram_meta.method.outer import parameters_of
from gram_meta.method.tasks import StepTasks
from gram_meta.method.together import SeedsTrainer

EXACT = ("BACKBONE.PRECISION", "fp64")  # what is left is the rounding of a checkpoint, which holds float32


@pytest.fixture(scope="module")
def store():
    return Store(load_backbone("random-tiny"))


def together(store, out, *opts):
    return SeedsTrainer(store, make_hierarchy(), out, settings("SEEDS", "(1, 2, 5)", *opts), progress=False)


def scores(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_equal(one, other):
    """Scores over training, weights and provenance of two run folders."""
    for name in ("best.safetensors", "last.safetensors"):
        a, b = load_meta_checkpoint(one / name), load_meta_checkpoint(other / name)
        assert a.config == b.config and a.provenance["held_out_topics"] == b.provenance["held_out_topics"]
        assert a.provenance["step"] == b.provenance["step"]
        torch.testing.assert_close({**a.prompts, **a.extras}, {**b.prompts, **b.extras}, rtol=1e-5, atol=1e-7)
        if a.regulator is not None:
            torch.testing.assert_close(a.regulator.state_dict(), b.regulator.state_dict(), rtol=1e-5, atol=1e-7)
    assert a.gradient_norms.get("text", {}) == pytest.approx(b.gradient_norms.get("text", {}), rel=1e-5)
    for a, b in zip(scores(one), scores(other), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts",
    [(), ("INNER.STEPS", "2"), ("REGULATOR.ENABLED", "False"), ("PROMPT.CONDITIONAL", "True"), ("OUTER.META", "False")],
    ids=["one step", "two steps", "no regulator", "conditional", "prompt pre-training"],
)
def test_each_seed_equals_the_run_of_that_seed(store, tmp_path, opts):
    paths = together(store, tmp_path / "all", *EXACT, *opts).run()
    assert paths == [tmp_path / "all" / f"seed{seed}" / "best.safetensors" for seed in (1, 2, 5)]
    for seed, path in zip((1, 2, 5), paths, strict=True):
        trainer(store, tmp_path / f"{seed}", *EXACT, *opts, "SEED", str(seed)).run()
        assert_equal(path.parent, tmp_path / f"{seed}")


@pytest.mark.slow
def test_a_kill_between_the_saves_of_two_seeds_is_made_up_for(store, tmp_path):
    together(store, tmp_path / "whole", *EXACT).run()
    killed = together(store, tmp_path / "killed", *EXACT)
    last, save = killed.trainers[-1], killed.trainers[-1].save

    def fails_at_the_second_save(step):
        if step == 8:
            raise KeyboardInterrupt
        save(step)

    last.save = fails_at_the_second_save
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = together(store, tmp_path / "killed", *EXACT)
    resumed.run(resume=True)
    for seed in (1, 2, 5):
        assert_equal(tmp_path / "killed" / f"seed{seed}", tmp_path / "whole" / f"seed{seed}")


@pytest.mark.slow
def test_sigterm_ends_all_seeds_after_the_same_step(store, tmp_path):
    together(store, tmp_path / "whole", *EXACT).run()
    stopped = together(store, tmp_path / "stopped", *EXACT)
    step = stopped.step

    def signalled(number, trainers):
        losses = step(number, trainers)
        stopped.trainers[0].sigterm.received = number == 6
        return losses

    stopped.step = signalled
    with pytest.raises(Stopped, match="after step 6 of all seeds"):
        stopped.run()
    together(store, tmp_path / "stopped", *EXACT).run(resume=True)
    for seed in (1, 2, 5):
        assert_equal(tmp_path / "stopped" / f"seed{seed}", tmp_path / "whole" / f"seed{seed}")


def test_the_python_function_refuses_several_seeds(tmp_path):
    import gram_meta as gram

    with pytest.raises(GramError, match="SEEDS: expected one run here"):
        gram.pretrain("store", "hierarchy", tmp_path, opts={"SEEDS": (1, 2)})


@pytest.mark.slow
def test_under_fp16_the_losses_of_all_seeds_are_scaled_too(store, tmp_path):
    """Else gradients as small as those of a high temperature are lost in fp16."""
    opts = ("BACKBONE.PRECISION", "fp16", "MEMORY.SECOND_ORDER", "whole", "OUTER.TEMPERATURE", "1000")
    run = together(store, tmp_path / "all", *opts)
    tasks = [task for it in run.trainers for task in StepTasks(it.train_tasks, 2, 0, 1, range(2))[0]]
    run.add_gradients(run.trainers, next(run.trainers[0].episodes.of([tasks])))
    for seed, one in zip((1, 2, 5), run.trainers, strict=True):
        alone = trainer(store, tmp_path / f"{seed}", *opts, "SEED", str(seed))
        alone.add_gradients(next(alone.episodes_of(0, 1)))
        for found, expected in zip(parameters_of(one.optimiser), parameters_of(alone.optimiser), strict=True):
            assert (found.grad - expected.grad).norm() < 0.02 * expected.grad.norm() > 0


def chc_of(run):
    return load_meta_checkpoint(run / "last.safetensors").config["CHC"]


@pytest.mark.slow
def test_a_run_records_the_settings_that_made_its_hierarchy(store, tmp_path, monkeypatch, caplog):
    """One line names those that were asked for; a run that is older than this rule resumes."""
    hierarchy = make_hierarchy()
    made = as_dict(settings("CHC.DOMAINS.K", "2", "CHC.FILTER.KEEP", "0.5").CHC)
    del made["TOPICS"]["SELECTION"]  # as an earlier version wrote it
    hierarchy.manifest["config"] = {"CHC": made, "TASKS": {}}
    monkeypatch.setattr(module, "open_inputs", lambda *_: (store, hierarchy))

    def opened(kind, out, *opts):
        return module.open_trainer(kind, "store", "hierarchy", out, settings(*opts), progress=False)

    caplog.set_level("INFO", "gram")
    asked = ("CHC.DOMAINS.K", "4", "CHC.TOPICS.SELECTION", "leaf", "CHC.FILTER.KEEP", "0.5")
    opened(SeedsTrainer, tmp_path, "SEEDS", "(1, 2)", *asked).run()
    (line,) = [record.message for record in caplog.records if "was made with" in record.message]
    assert line == "hierarchy: was made with CHC.DOMAINS.K 2, not 4; the run records the settings of its hierarchy"
    for seed in (1, 2):
        recorded = chc_of(tmp_path / f"seed{seed}")
        assert (recorded["DOMAINS"]["K"], recorded["FILTER"]["KEEP"], recorded["TOPICS"]["SELECTION"]) == (
            2,
            0.5,
            "leaf",
        )
    with pytest.raises(GramError, match="CHC.LABELLED is True: expected a hierarchy of labelled classes"):
        opened(MetaTrainer, tmp_path / "labelled", "CHC.LABELLED", "True")
    run = tmp_path / "seed1" / "run.json"
    facts = read_json(run)
    facts["config"]["CHC"]["DOMAINS"]["K"] = 4
    write_json(run, facts)
    assert opened(MetaTrainer, tmp_path / "seed1", *asked).run(resume=True)
    caplog.clear()
    opened(MetaTrainer, tmp_path / "same", *asked, "CHC.DOMAINS.K", "2")
    assert not caplog.records
