"""Recorded meta-steps equal plain ones, for every family of prompts; traces stand in for CUDA graphs."""

from functools import partial

import pytest
import torch
from helpers.graphs import Traced
from helpers.meta_training import JOINT, VISUAL, Store, make_hierarchy, pixel_trainer, settings, trainer

from gram_meta.backbone.clip import load_backbone
from gram_meta.method.outer import parameters_of
from gram_meta.method.recorded import RecordedSteps
from gram_meta.method.together import SeedsTrainer

EXACT = ("BACKBONE.PRECISION", "fp64")


@pytest.fixture(scope="module")
def store():
    return Store(load_backbone("random-tiny"))


def record(run, traces=Traced):
    """Set up a meta-trainer as on a GPU, but for the graphs."""
    run.backbone.packs_texts, run.episodes.bucket = False, 4
    run.add_gradients = RecordedSteps(run.add_gradients_plainly, parameters_of(run.optimiser), traces)
    return run


def assert_equal_runs(plain, recorded):
    for run in (plain, recorded):
        run.run()
    for name, value in plain.theta.items():
        torch.testing.assert_close(recorded.theta[name], value, rtol=1e-7, atol=1e-9)
    if plain.regulator is not None:
        torch.testing.assert_close(recorded.regulator.state_dict(), plain.regulator.state_dict(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(recorded.state.norms, plain.state.norms, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts",
    [
        *((), ("INNER.STEPS", "2", "INNER.DETACHED", "1"), ("MEMORY.SECOND_ORDER", "lean")),
        *(("REGULATOR.ENABLED", "False"), ("REGULATOR.BETA", "none"), ("OUTER.META", "False")),
        ("PROMPT.CONDITIONAL", "True"),
    ],
    ids=["whole", "long path", "lean", "no regulator", "no beta", "prompt pre-training", "conditional"],
)
def test_recorded_steps_equal_plain_ones(store, tmp_path, opts):
    recorded = record(trainer(store, tmp_path / "recorded", *EXACT, *opts))
    assert_equal_runs(trainer(store, tmp_path / "plain", *EXACT, *opts), recorded)
    assert len(recorded.add_gradients.replays) == 1  # all class prompts here fit into one length


@pytest.mark.slow
@pytest.mark.parametrize("opts", [VISUAL, JOINT, (*JOINT, "MEMORY.SECOND_ORDER", "lean")], ids=["v", "joint", "lean"])
def test_recorded_steps_on_pixels_equal_plain_ones(pixel_corpus, tmp_path, opts):
    recorded = record(pixel_trainer(pixel_corpus, tmp_path / "recorded", *opts))
    plain = pixel_trainer(pixel_corpus, tmp_path / "plain", *opts)
    for run in (plain, recorded):
        run.run()
    for name, value in plain.theta.items():
        torch.testing.assert_close(recorded.theta[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_losses_are_kept_although_a_replay_overwrites_them(store, tmp_path):
    run = record(trainer(store, tmp_path))
    episodes = list(run.episodes_of(0, 2))
    first = run.add_gradients(episodes[0])
    before = first.losses.clone()
    run.add_gradients(episodes[1])
    assert torch.equal(first.losses, before)


def test_without_graphs_a_run_goes_on_and_says_so(store, tmp_path, caplog):
    def fails(*_):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might ...")

    with caplog.at_level("INFO", logger="gram"):
        assert_equal_runs(trainer(store, tmp_path / "a", *EXACT), record(trainer(store, tmp_path / "b", *EXACT), fails))
    lines = [line for line in caplog.messages if "CUDA graphs" in line]
    assert lines == ["CUDA graphs: not used (CUDA error: operation not permitted when stream is capturing)"]


@pytest.mark.slow
def test_several_seeds_are_recorded_as_one_step(store, tmp_path):
    runs = []
    for name in ("plain", "recorded"):
        config = settings("SEEDS", "(1, 5)", *EXACT)
        run = SeedsTrainer(store, make_hierarchy(), tmp_path / name, config, progress=False)
        if name == "recorded":
            run.trainers[0].backbone.packs_texts = False
            parameters = [one for trainer in run.trainers for one in parameters_of(trainer.optimiser)]
            run.recorded = RecordedSteps(partial(run.add_gradients, run.trainers), parameters, Traced)
        run.run()
        runs.append([trainer.theta["text"] for trainer in run.trainers])
    torch.testing.assert_close(*runs, rtol=1e-7, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here: real CUDA graphs are not tried")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_equal_plain_steps(store, tmp_path, precision):
    from gram_meta.method.meta_trainer import MetaTrainer

    thetas = []
    for graphs in ("False", "True"):
        config = settings("MEMORY.CUDA_GRAPHS", graphs, "BACKBONE.PRECISION", precision)
        run = MetaTrainer(store, make_hierarchy(), tmp_path / graphs, config, device="cuda", progress=False)
        run.run()
        assert isinstance(run.add_gradients, RecordedSteps) == (graphs == "True")
        thetas.append(run.theta["text"])
    torch.testing.assert_close(*thetas, rtol=1e-3, atol=1e-4)
