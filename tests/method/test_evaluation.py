"""gram eval-meta: the same tasks adapted in several ways, against a calculation task by task."""

import json

import numpy as np
import pytest
import torch

from gram_meta.cli import main
from gram_meta.config import load_meta_config, stored_config
from gram_meta.errors import GramError
from gram_meta.method import adaptation
from gram_meta.method.adaptation import evaluate_adaptation
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.episodes import Episodes
from gram_meta.method.meta_trainer import MetaTrainer
from gram_meta.method.tasks import TaskConfig, TaskSampler, images_of

pytestmark = pytest.mark.slow

OPTS = [
    *("BACKBONE.NAME", "random-tiny", "TASKS.WAYS", "2", "TASKS.HELD_OUT", "0.4", "TASKS.SUPPORT_SHOTS", "2"),
    *("TASKS.QUERY_SHOTS", "4", "OUTER.STEPS", "2", "EVAL.EVERY", "2", "EVAL.TASKS", "3", "OUTER.BATCH", "2"),
    *("PROMPT.TEXT_TOKENS", "2", "PROMPT.WORDS", "a photo", "OUTER.LR_REGULATOR", "0.05", "INNER.ALPHA", "0.1"),
]
JOINT = ("PROMPT.VISUAL_TOKENS", "2", "LOADER.WORKERS", "0")


@pytest.fixture(scope="module")
def runs(pixel_corpus, tmp_path_factory):
    store, hierarchy, _, _ = pixel_corpus
    found = {}
    for name, opts in {"joint": JOINT, "raw": ("REGULATOR.ENABLED", "False")}.items():
        out = tmp_path_factory.mktemp(name)
        best = MetaTrainer(store, hierarchy, out, load_meta_config([], [*OPTS, *opts]), progress=False).run()
        found[name] = load_meta_checkpoint(best.with_name("last.safetensors"))
    return found


def measure(checkpoint, corpus, **more):
    return evaluate_adaptation(
        checkpoint, corpus[0], corpus[1], progress=False, **{"tasks": 5, "steps": (0, 2), **more}
    )


def test_against_adapting_each_task_alone(runs, pixel_corpus):
    store, hierarchy, backbone, _ = pixel_corpus
    checkpoint = runs["joint"]
    result = measure(checkpoint, pixel_corpus)
    config = stored_config(checkpoint.config)
    held = checkpoint.provenance["held_out_topics"]
    sampler = TaskSampler(hierarchy, TaskConfig(2, 2, 4), 1000, held)
    episodes = Episodes.from_config(backbone, store, [topic.word for topic in hierarchy.topics], config)
    losses = {"R on": [], "R off": [], "R off, same length": []}
    for task in sampler.draw_batch(0, 5):
        (episode,) = episodes.of([[task]])
        for form, found in losses.items():
            prompts = {kind: value[None].clone().requires_grad_() for kind, value in checkpoint.prompts.items()}
            for _ in range(2):
                grads = torch.autograd.grad(episode.support(prompts).sum(), list(prompts.values()))
                for (kind, value), g in zip(list(prompts.items()), grads, strict=True):
                    regulated = checkpoint.regulator.parts(kind, g).regulated
                    step = {"R on": regulated, "R off": g, "R off, same length": g * regulated.norm() / g.norm()}[form]
                    prompts[kind] = (value - 0.1 * step).detach().requires_grad_()
            found.append(episode.query(prompts).item())
    for form, found in losses.items():
        (line,) = [line for line in result.lines if (line.start, line.gradient) == ("theta*", form)]
        assert line.cells[-1].loss == pytest.approx(np.mean(found), rel=1e-5), form
    assert losses["R on"] != losses["R off"]
    assert "held out" in result.topics


def test_tasks_by_structure_are_those_of_the_stores_features(pixel_corpus, tmp_path):
    """Meta-training, its held-out tasks and gram eval-meta."""
    store, hierarchy, _, _ = pixel_corpus
    config = load_meta_config([], [*OPTS, "TASKS.TOPICS", "near"])
    trainer = MetaTrainer(store, hierarchy, tmp_path, config, progress=False)
    tasks, train, held = TaskConfig.from_config(config), trainer.train_topics, trainer.held_topics
    away, features = images_of(hierarchy, held), store.image_features
    same = TaskSampler(hierarchy, tasks, 1, train, away, features).draw_batch(0, 3)
    assert [task.words for task in trainer.train_tasks.draw_batch(0, 3)] == [task.words for task in same]
    same = TaskSampler(hierarchy, tasks, 2, held, features=features).draw_batch(0, 3)
    assert [task.words for task in trainer.held_tasks] == [task.words for task in same]
    checkpoint = load_meta_checkpoint(trainer.run())
    assert measure(checkpoint, pixel_corpus).tasks == 5


def test_the_controls_of_a_constant_regulator_and_of_a_moved_start(runs, pixel_corpus):
    store, hierarchy, backbone, _ = pixel_corpus
    checkpoint = runs["joint"]
    config = stored_config(checkpoint.config)
    sampler = TaskSampler(hierarchy, TaskConfig(2, 2, 4), 1000, checkpoint.provenance["held_out_topics"])
    episodes = Episodes.from_config(backbone, store, [topic.word for topic in hierarchy.topics], config)

    def gradients(episode, prompts):
        leaves = {kind: value.detach().clone().requires_grad_() for kind, value in prompts.items()}
        return dict(zip(leaves, torch.autograd.grad(episode.support(leaves).sum(), list(leaves.values())), strict=True))

    start = {kind: value[None] for kind, value in checkpoint.prompts.items()}
    gates = {kind: [] for kind in start}
    for episode in episodes.of([[task] for task in sampler.draw_batch(5, 5)]):  # other tasks than those that are scored
        for kind, g in gradients(episode, start).items():
            gates[kind].append(checkpoint.regulator.parts(kind, g))
    gamma = {kind: torch.stack([part.gamma.detach() for part in parts]).mean(0) for kind, parts in gates.items()}
    beta = {kind: torch.stack([part.beta.detach() for part in parts]).mean(0) for kind, parts in gates.items()}
    moved = {kind: value - config.INNER.ALPHA * config.INNER.STEPS * beta[kind] for kind, value in start.items()}
    mean_losses, moved_losses = [], []
    for episode in episodes.of([[task] for task in sampler.draw_batch(0, 5)]):
        g, there = gradients(episode, start), gradients(episode, moved)
        after = {
            kind: value - config.INNER.ALPHA * (gamma[kind] * g[kind] + beta[kind]) for kind, value in start.items()
        }
        mean_losses.append(episode.query(after).item())
        moved_losses.append(
            episode.query({kind: value - config.INNER.ALPHA * there[kind] for kind, value in moved.items()}).item()
        )
    lines = {
        (line.start, line.gradient): line.cells[-1] for line in measure(checkpoint, pixel_corpus, steps=(0, 1)).lines
    }
    assert lines["theta*", "R's mean"].loss == pytest.approx(np.mean(mean_losses), rel=1e-5)
    assert lines["theta* moved by the mean beta", "R off"].loss == pytest.approx(np.mean(moved_losses), rel=1e-5)
    assert len(lines) == 9 and lines["theta*", "R's mean"].loss != lines["theta*", "R on"].loss


def test_tables_say_what_there_is(runs, pixel_corpus):
    result = measure(runs["raw"], pixel_corpus, steps=(1, 0))
    assert [(line.start, line.gradient) for line in result.lines] == [("theta*", "raw"), ('"a photo"', "raw")]
    assert [cell.steps for cell in result.lines[0].cells] == [0, 1]
    assert json.loads(json.dumps(result.as_dict()))["tasks"] == 5
    text = str(result)
    assert 'these tasks: theta* with raw against "a photo" with raw lowers the query loss after 1 steps by' in text
    assert "acc. 1" in text and "loss 0" in text and "5 2-way tasks from" in text


@pytest.mark.parametrize(
    ("losses", "before", "after", "found"),
    [
        ([0.5, 0.6, 0.4], 0.6, 0.9, ["helps on these tasks", "by 0.500 ± 0.248"]),
        ([1.5, 1.6, 1.4], 0.6, 0.9, ["does harm on these tasks", "by -0.500"]),
        ([0.5, 1.6, 1.0], 0.6, 0.9, ["makes no clear difference", "More tasks (--tasks)"]),
        ([0.5, 0.6, 0.4], 0.96, 1.0, ["has more than 95 % of them right: such tasks teach little. Raise TASKS.WAYS"]),
        ([0.5, 0.6, 0.4], 0.25, 0.27, ["The accuracy of 27 % is near chance (25 %)"]),
    ],
)
def test_the_verdict_on_tasks_that_help_harm_are_solved_or_hopeless(losses, before, after, found):
    learned, plain = ("theta*", "R on"), ('"a photo of a"', "R off")
    scores = {
        (*learned, 5): [
            (torch.tensor(losses[:2]), torch.full((2,), after)),
            (torch.tensor(losses[2:]), torch.tensor([after])),
        ],
        (*plain, 0): [(torch.tensor([2.0, 2.0, 2.0]), torch.full((3,), before))],
        (*plain, 5): [(torch.tensor([1.0, 1.0, 1.0]), torch.full((3,), after))],
        ("theta*", "R off", 5): [(torch.tensor(losses) - 0.2, torch.full((3,), after))],
    }
    sentences = adaptation._verdict(scores, learned, plain, 5, 4)
    assert "R^phi does harm: R on against R off, both from theta*, lowers it by -0.200 ± 0.000." in sentences[1]
    assert "lower OUTER.LR_REGULATOR" in sentences[2]
    assert all(part in " ".join(sentences) for part in found)
    assert ("teach little" in " ".join(sentences)) == ("teach little" in " ".join(found) or "chance" in found[0])


def test_another_hierarchy_gives_all_its_topics(runs, pixel_corpus, monkeypatch):
    checkpoint = runs["raw"]
    monkeypatch.setitem(checkpoint.provenance, "hierarchy", "another")
    assert "all topics" in measure(checkpoint, pixel_corpus, opts=["TASKS.WAYS", "5"]).topics


@pytest.mark.parametrize("held", [[[]], [1e308], [-1], [99], None, {}, "0"])
def test_held_out_topics_that_were_edited_are_one_sentence(runs, pixel_corpus, monkeypatch, held):
    monkeypatch.setitem(runs["raw"].provenance, "held_out_topics", held)
    with pytest.raises(GramError, match="held_out_topics: "):
        measure(runs["raw"], pixel_corpus)


def test_bad_input_is_one_sentence(runs, pixel_corpus, tmp_path, capsys):
    with pytest.raises(GramError, match="--tasks"):
        measure(runs["raw"], pixel_corpus, tasks=0)
    with pytest.raises(GramError, match="TASKS.WAYS: expected at least 9 topics"):
        measure(runs["raw"], pixel_corpus, opts=["TASKS.WAYS", "9"])
    with pytest.raises(GramError, match="did you mean 'TASKS.WAYS'"):
        measure(runs["raw"], pixel_corpus, opts=["TASKS.WAY", "9"])
    command = ["eval-meta", str(tmp_path / "none"), "--store", "a", "--hierarchy", "b"]
    assert main([*command, "--steps", "0", "1", "TASKS.WAYS", "2"]) == 2  # KEY VALUE is no step
    assert "expected a meta-checkpoint" in capsys.readouterr().err
    assert main([*command, "--steps", "0", "few"]) == 2
    assert "--steps: expected numbers from 0 on, found 'few'" in capsys.readouterr().err


def test_without_a_step_the_starts_are_compared(runs, pixel_corpus):
    """Also with a regulator, whose means need a gradient."""
    plain, result = (measure(runs["joint"], pixel_corpus, steps=steps) for steps in ((0, 2), (0,)))
    assert [line.start for line in result.lines] == [line.start for line in plain.lines]
    for found, expected in zip(result.lines, plain.lines, strict=True):
        (cell,) = found.cells
        assert cell.loss == pytest.approx(expected.cells[0].loss, rel=1e-5)
    assert "after 0 steps" in str(result) and result.alignment == {}


def test_under_fp16_losses_are_scaled_as_in_meta_training(runs, pixel_corpus, monkeypatch):
    scales = []
    path = adaptation.inner_path
    monkeypatch.setattr(adaptation, "inner_path", lambda s, p, inner: scales.append(inner.scale) or path(s, p, inner))
    measure(runs["raw"], pixel_corpus, tasks=1, steps=(1,), opts=["BACKBONE.PRECISION", "fp16"])
    assert set(scales) == {256.0}
    scales.clear()
    measure(runs["raw"], pixel_corpus, tasks=1, steps=(1,))
    assert set(scales) == {1.0}
