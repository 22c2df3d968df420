"""examples/gram_from_scratch.py, which uses nothing of gram_meta, equals the package: two independent writings of the
paper."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gram_meta.backbone.clip import clip_module, load_backbone
from gram_meta.clustering.hierarchy import Hierarchy, Topic
from gram_meta.config import load_meta_config
from gram_meta.method.apply import Regulation
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.meta_trainer import MetaTrainer
from gram_meta.method.prompts import PromptedCLIP, initial_prompts
from gram_meta.method.regulator import GradientRegulator
from gram_meta.method.tasks import TaskConfig, TaskSampler, images_of, split_topics

WORDS = ["cat", "sea lion", "house", "tree", "old boat", "lamp", "spoon", "cloud"]
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "gram_from_scratch.py"
SETTINGS = {
    "BACKBONE.NAME": "random-tiny", "BACKBONE.PRECISION": "fp64", "TASKS.WAYS": 3, "TASKS.HELD_OUT": 0.4,
    "TASKS.SUPPORT_SHOTS": 2, "TASKS.QUERY_SHOTS": 4, "INNER.STEPS": 2, "INNER.ALPHA": 0.05, "OUTER.STEPS": 6,
    "OUTER.BATCH": 2, "OUTER.LR_PROMPT": 5e-3, "OUTER.LR_REGULATOR": 1e-2, "EVAL.EVERY": 6, "EVAL.TASKS": 2,
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    """The example as a module; OpenAI's LayerNorm, which casts to float32, computes in float64."""
    monkeypatch.setattr(clip_module().model.LayerNorm, "forward", torch.nn.LayerNorm.forward)
    spec = importlib.util.spec_from_file_location("gram_from_scratch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Store:
    """Random image features, 24 a topic, as much of a pair store as text prompts read."""

    fingerprint, path = "store-1", "store"
    image_features = F.normalize(torch.randn(192, 64, generator=torch.Generator().manual_seed(2)), dim=1).numpy()

    def check_backbone(self, backbone):
        pass


@pytest.fixture
def hierarchy():
    pair = np.arange(192)
    topics = [Topic(word, 1.0, [[word, 1.0]], 24, 24, [12, 12]) for word in WORDS]
    columns = (pair, pair, pair // 24, pair // 12 % 2)
    made = Hierarchy(*columns, topics, np.zeros(len(pair), np.uint8), {"fingerprints": {}})
    made.check_store = lambda store: None
    return made


def backbone_in_float64():
    """The tiny CLIP; the package takes exp() of its logit scale in float32, so the example is given that very
    number."""
    backbone = load_backbone("random-tiny", precision="fp64")
    backbone.model.logit_scale.data = backbone.logit_scale.log()
    return backbone


def close(found, expected):
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_meta_training_ends_at_the_same_theta_and_phi(script, hierarchy, tmp_path):
    """Six steps of Algorithm 1 over the same tasks, two inner steps each, with Adam, clipping and the cosine."""
    config = load_meta_config([], [str(word) for pair in SETTINGS.items() for word in pair])
    MetaTrainer(Store(), hierarchy, tmp_path, config, progress=False).run()
    ours = load_meta_checkpoint(tmp_path / "last.safetensors")

    backbone = backbone_in_float64()
    train, held = split_topics(hierarchy, 0.4, 3, config.SEED)
    sampler = TaskSampler(hierarchy, TaskConfig(3, 2, 4), config.SEED, train, without_images=images_of(hierarchy, held))
    images = torch.from_numpy(Store.image_features).double()

    def draw(step):
        tasks = sampler.draw_batch(2 * step, 2)
        return (torch.from_numpy(np.stack([task.topics for task in tasks])),
                images[np.stack([task.support for task in tasks])],
                images[np.stack([task.query for task in tasks])])  # fmt: skip

    theta = initial_prompts(backbone, 4, 0, "a photo of a")["text"].double().requires_grad_()
    regulator = script.Regulator(64).double()
    features = script.ClassFeatures(backbone.model, WORDS, tokens=4)
    start = theta.detach().clone()
    history = script.meta_train(theta, regulator, features, draw, 6, alpha=0.05, inner_steps=2, rates=(5e-3, 1e-2))
    assert (theta - start).abs().max() > 1e-2 and len(history) == 6
    close(theta.detach(), ours.prompts["text"])
    for name, value in ours.regulator.gates["text"].named_parameters():
        close(regulator.get_parameter(name).detach(), value.detach())


@pytest.mark.slow
def test_a_few_shot_run_ends_at_the_same_prompt(script):
    backbone = backbone_in_float64()
    random = torch.Generator().manual_seed(4)
    theta = 0.1 * torch.randn(4, 64, generator=random, dtype=torch.float64)
    images = F.normalize(torch.randn(5, 3, 64, generator=random, dtype=torch.float64), dim=-1)
    ours = GradientRegulator({"text": 64}).double()
    theirs = script.Regulator(64).double()
    with torch.no_grad():
        for name, value in ours.gates["text"].named_parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=random, dtype=torch.float64))
            theirs.get_parameter(name).copy_(value)

    model = PromptedCLIP(backbone, WORDS[:5], {"text": theta}).double()
    optimizer = torch.optim.SGD([model.prompt_learner.ctx], lr=0.01, momentum=0.9)
    Regulation(model.prompt_learner.prompts(), ours).attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        scores = backbone.logit_scale * images.flatten(0, 1) @ model.class_features().T
        F.cross_entropy(scores, torch.arange(5).repeat_interleave(3)).backward()
        optimizer.step()
    features = script.ClassFeatures(backbone.model, WORDS[:5], tokens=4)
    found = script.few_shot(theta, theirs, features, images, steps=5, rate=0.01)
    assert (found - theta).abs().max() > 1e-3
    close(found, model.prompt_learner.ctx.detach())


def test_it_is_short_and_stands_alone():
    text = SCRIPT.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert "import gram_meta" not in text and "from gram_meta" not in text
