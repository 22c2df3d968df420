"""Prompts of every family in meta-training: losses and meta-gradients in float64, pixels, whole runs."""

import json
import pickle
import tarfile
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers.meta_training import DEEP, JOINT, MAPLE, VISUAL, Store, pixel_settings, pixel_trainer
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gram_meta.corpus.loading import to_device
from gram_meta.corpus.places import ImageReader, Places
from gram_meta.errors import GramError
from gram_meta.method import episodes as gathered
from gram_meta.method.bilevel import InnerLoop, for_each_task, lean_backward, meta_losses
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.episodes import Episodes, LoaderConfig, TaskSet, TimedIterator, initial_theta, read_pixels
from gram_meta.method.meta_trainer import MetaTrainer
from gram_meta.method.outer import OuterLoop
from gram_meta.method.prompts import (
    COUPLING,
    KINDS,
    META_NET,
    ClassText,
    CoupledCLIP,
    PromptConfig,
    PromptedCLIP,
    class_token_start,
    hold_size,
    initial_meta_net,
    template_features,
)
from gram_meta.method.regulator import GradientRegulator
from gram_meta.method.tasks import StepTasks, Task
from gram_meta.processes import ProcessGroup
from gram_meta.runs.reader import read_saved
from gram_meta.tools.export import export

pytestmark = pytest.mark.usefixtures("clip_layer_norm_in_float64")

PRECISION = "fp64"  # of the fixture `backbone`

ALPHA = 0.05
NAMES = ["cat", "a big dog", "house", "sea lion"]
CLASSES = torch.tensor([[0, 1], [3, 2]])  # two 2-way tasks
FORMS = ["visual", "joint", "conditional", "deep", "maple"]


@pytest.fixture(scope="module")
def images():
    random = torch.Generator().manual_seed(4)
    shape = (2, 2, 2, 3, 32, 32)  # tasks, ways, images, and an image as bytes
    return [torch.randint(0, 256, shape, generator=random, dtype=torch.uint8) for _ in ("support", "query")]


def make(form, backbone, images):
    """theta, support and query of two tasks."""
    random = torch.Generator().manual_seed(5)
    theta, layers = {}, (2,) * (form in ("deep", "maple"))
    if form != "visual":
        theta["text"] = 0.05 * torch.randn(*layers, 2, 64, generator=random)
    if form not in ("conditional", "maple"):
        theta["visual"] = 0.05 * torch.randn(*layers, 3, 64, generator=random)
    if form == "maple":
        shapes = zip(COUPLING, ((2, 64, 64), (2, 64)), strict=True)
        theta |= {name: 0.1 * torch.randn(shape, generator=random) for name, shape in shapes}
    if form == "conditional":
        theta |= {f"{META_NET}{key}": value for key, value in initial_meta_net(backbone, 6).items()}
    theta = {name: value.double().requires_grad_() for name, value in theta.items()}
    if form == "visual":
        classes = template_features(backbone, NAMES)[CLASSES]
    else:
        classes = ClassText(backbone, NAMES, 2).select(CLASSES)
    return theta, *(TaskSet(backbone, classes, side) for side in images)


def plain_loss(form, backbone, images, theta, task):
    """One task's loss, image by image and class by class, through clip's own modules in its own order."""
    model, loss = backbone.model, []
    with sdpa_kernel(SDPBackend.MATH):
        for k in range(2):
            for image in images[task, k]:
                visual = theta.get("visual")
                if form == "maple":  # a linear layer for each layer of the towers
                    layers = zip(theta["text"], *(theta[name] for name in COUPLING), strict=True)
                    visual = torch.stack([F.linear(*layer) for layer in layers])
                feature = plain_image(model, image, visual)
                context = theta.get("text")
                if form == "conditional":
                    hidden = F.relu(F.linear(feature, theta["meta_net.linear1.weight"], theta["meta_net.linear1.bias"]))
                    context = context + F.linear(
                        hidden, theta["meta_net.linear2.weight"], theta["meta_net.linear2.bias"]
                    )
                features = torch.stack([plain_text(backbone, NAMES[c], context) for c in CLASSES[task]])
                scores = backbone.logit_scale * features @ feature
                loss.append(F.cross_entropy(scores, torch.tensor(k)))
    return torch.stack(loss).mean()


def plain_image(model, image, prompt):
    mean, std = (torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711]))
    pixels = ((image.float() / 255 - mean[:, None, None]) / std[:, None, None]).double()
    tower = model.visual
    x = tower.conv1(pixels[None]).flatten(2)[0].T
    x = torch.cat([tower.class_embedding[None], x]) + tower.positional_embedding
    layers = [] if prompt is None else prompt.view(-1, *prompt.shape[-2:])
    x = torch.cat([x, *layers[:1]])
    x = tower.ln_pre(x)[:, None]
    for number, block in enumerate(tower.transformer.resblocks):
        if 0 < number < len(layers):
            x = torch.cat([x[: -len(layers[0])], layers[number][:, None]])
        x = block(x)
    return F.normalize(tower.ln_post(x[0, 0]) @ tower.proj, dim=0)


def plain_text(backbone, name, context):
    model = backbone.model
    layers = [] if context is None else context.view(-1, *context.shape[-2:])
    words = "a photo of a" if context is None else " ".join("X" * len(layers[0]))
    ids = backbone.tokenize([f"{words} {name}."])[0]
    x = model.token_embedding(ids)
    if context is not None:
        x = torch.cat([x[:1], layers[0], x[1 + len(layers[0]) :]])
    x = (x + model.positional_embedding)[:, None]
    for number, block in enumerate(model.transformer.resblocks):
        if 0 < number < len(layers):
            x = torch.cat([x[:1], layers[number][:, None], x[1 + len(layers[0]) :]])
        x = block(x)
    return F.normalize(model.ln_final(x[ids.argmax(), 0]) @ model.text_projection, dim=0)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_losses_against_clips_own_towers(form, backbone, images):
    theta, support, _ = make(form, backbone, images)
    losses = support(for_each_task(theta, 2))
    expected = torch.stack([plain_loss(form, backbone, images[0], theta, task) for task in (0, 1)])
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    ours = torch.autograd.grad(losses.sum(), list(theta.values()))
    theirs = torch.autograd.grad(expected.sum(), list(theta.values()))
    for name, one, other in zip(theta, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_meta_gradients_against_finite_differences(form, backbone, images):
    """Through the image tower and the meta-net, of theta, of what R does not know, and of phi."""
    theta, support, query = make(form, backbone, images)
    kinds = {name: 64 for name in theta if name in KINDS}
    regulator = GradientRegulator(kinds).double()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in regulator.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))

    def total():
        inner = InnerLoop(ALPHA, regulate=regulator.regulate_known)
        return meta_losses(support, query, theta, 2, inner).losses.sum()

    total().backward()
    for name, parameter in [*theta.items(), *regulator.named_parameters()]:
        direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        start, h, at = parameter.detach().clone(), 1e-5, {}
        for distance in (-2, -1, 1, 2):
            with torch.no_grad():
                parameter.copy_(start + distance * h * direction)
            at[distance] = total().item()
        with torch.no_grad():
            parameter.copy_(start)
        slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("form", ["deep", "maple"])
def test_deep_prompts_in_every_way_through_the_towers(form, backbone, images, monkeypatch):
    """Packed texts and rectangles, layers computed twice, one graph at a time, and the classifier of few-shot runs."""
    theta, support, query = make(form, backbone, images)
    meta_losses(support, query, theta, 2, InnerLoop(ALPHA)).losses.sum().backward()
    expected = {name: value.grad.clone() for name, value in theta.items()}
    for attribute, value in (("packs_texts", not backbone.packs_texts), ("checkpointing", True), ("lean", True)):
        monkeypatch.setattr(backbone, attribute, value, raising=False)
        theta, support, query = make(form, backbone, images)
        if attribute == "lean":
            lean_backward([support], [query], theta, 2, InnerLoop(ALPHA))
        else:
            meta_losses(support, query, theta, 2, InnerLoop(ALPHA)).losses.sum().backward()
        for name, value in theta.items():
            torch.testing.assert_close(value.grad, expected[name], rtol=1e-7, atol=1e-12, msg=f"{attribute} {name}")
    names = [NAMES[index] for index in CLASSES[0]]
    rest = {name: value for name, value in theta.items() if name in COUPLING}
    prompts = {name: value for name, value in theta.items() if name in KINDS}
    model = CoupledCLIP(backbone, names, prompts, rest) if rest else PromptedCLIP(backbone, names, prompts)
    scores = model.double()(backbone.normalise(images[0][0].flatten(0, 1)))
    losses = F.cross_entropy(scores, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(losses.double(), support(for_each_task(theta, 2))[0], rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # kept class features
        torch.testing.assert_close(model(backbone.normalise(images[0][0].flatten(0, 1))), scores, rtol=1e-6, atol=1e-5)
    assert {name for name, _ in model.prompt_learner.named_parameters()} == {"ctx", *(rest or ["visual_ctx"])}


# --- from files -------------------------------------------------------------------------------------------------------


def bytes_of(run):
    return run.episodes.backbone.preprocess(as_bytes=True)


@pytest.mark.slow
def test_workers_change_nothing(pixel_corpus, tmp_path):
    finals = []
    for workers in ("0", "2"):
        out = tmp_path / workers
        pixel_trainer(pixel_corpus, out, *JOINT, "LOADER.WORKERS", workers).run()
        finals.append(load_meta_checkpoint(out / "last.safetensors"))
    for kind in ("text", "visual"):
        assert torch.equal(finals[0].prompts[kind], finals[1].prompts[kind])


@pytest.mark.slow
def test_visual_tokens_are_held_at_one_size_which_the_image_tower_cannot_see(pixel_corpus, tmp_path):
    backbone = pixel_corpus[2]
    free, held = (
        load_meta_checkpoint(pixel_trainer(pixel_corpus, tmp_path / size, *VISUAL, "PROMPT.VISUAL_SIZE", size).run())
        for size in ("0.", "0.05")
    )
    sizes = [c.prompts["visual"].square().mean(dim=-1).sqrt() for c in (free, held)]
    assert sizes[0].std() > 0 and torch.allclose(sizes[1], torch.full((2,), 0.05))
    large = 2.0 * torch.randn(2, backbone.visual_width, generator=torch.Generator().manual_seed(0))
    small = large.clone()
    hold_size(small, 0.5)
    assert torch.allclose(small / small.norm(dim=-1, keepdim=True), large / large.norm(dim=-1, keepdim=True))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    features = [backbone.encode_images(images, prompt) for prompt in (large, small)]
    torch.testing.assert_close(*features, rtol=0, atol=1e-4)  # the layer norm's epsilon
    turned = []
    for prompt in (large, small):  # a step at one learning rate turns a token by 1 / size^2
        leaf = prompt.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(backbone.encode_images(images, leaf)[:, 0].sum(), leaf)
        turned.append((gradient.norm() / leaf.norm()).item())
    assert turned[1] / turned[0] == pytest.approx((large.norm() / small.norm()).item() ** 2, rel=0.02)


@pytest.mark.slow
def test_images_in_a_shard_are_the_same_as_files(pixel_corpus, tmp_path):
    """Drawn at random from a tar, by two workers that were forked from a process that has read it before."""
    folder, runs = pixel_corpus[3], []
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for row in range(96):
            tar.add(folder / f"{row}.png", f"{row:09d}.png")
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = [(f"00000.tar/{member.name}", member.offset_data, member.size) for member in tar]
    names, offsets, sizes = (np.array(column) for column in zip(*members, strict=True))
    places = Places(ImageReader(tmp_path), names.tolist(), ["00000.tar"], np.zeros(96, np.int64), offsets, sizes)
    for name in ("files", "shard"):
        runs.append(pixel_trainer(pixel_corpus, tmp_path / name, *JOINT, "LOADER.WORKERS", "2"))
        if name == "shard":
            runs[1].episodes.places = places
            places.image(0)
        runs[-1].run()
    for kind in ("text", "visual"):
        assert torch.equal(runs[0].theta[kind], runs[1].theta[kind])


def test_a_process_decodes_its_own_tasks_alone(pixel_corpus, tmp_path):
    store, hierarchy, _, _ = pixel_corpus
    config = pixel_settings(*VISUAL, "OUTER.BATCH", "3", "LOADER.WORKERS", "0")
    run = MetaTrainer(store, hierarchy, tmp_path, config, progress=False, group=ProcessGroup(1, 2))
    steps = StepTasks(run.train_tasks, 3, 0, 2, run.own)
    drawn = [run.train_tasks.draw(number) for number in (2, 5)]
    assert [task.words for tasks in map(steps.__getitem__, range(2)) for task in tasks] == [t.words for t in drawn]
    decoded, _ = (read_pixels(steps, run.episodes.places, bytes_of(run), number) for number in range(len(steps)))
    assert decoded[1].shape[:3] == (1, 2, 2)


@pytest.mark.slow
def test_a_run_says_how_long_the_towers_waited(pixel_corpus, tmp_path, caplog):
    with caplog.at_level("INFO", logger="gram"):
        pixel_trainer(pixel_corpus, tmp_path, *JOINT).run()
    (line,) = [record.message for record in caplog.records if "waited" in record.message]
    assert 0 <= float(line.split("waited ")[1].split(" %")[0]) < 100
    items = TimedIterator(iter([1, 2]))
    for _ in items:
        time.sleep(0.02)
    assert items.waiting_share() < 0.3  # this one never waits


def test_pixels_are_the_images_of_the_tasks(pixel_corpus, tmp_path):
    run = pixel_trainer(pixel_corpus, tmp_path, *JOINT)
    tasks = run.held_tasks[:2]
    (episode,) = run.episodes.of([tasks])
    transform = pixel_corpus[2].preprocess()
    expected = torch.stack(
        [transform(Image.open(pixel_corpus[3] / f"{row}.png")) for row in tasks[1].query.reshape(-1)]
    )
    seen = pixel_corpus[2].normalise(episode.query.images[1])
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tensors", [False, True])
def test_pixels_are_resized_as_the_store_was_made(tensors, pixel_corpus, tmp_path, monkeypatch):
    episodes = pixel_trainer(pixel_corpus, tmp_path, *JOINT).episodes
    plain, asked = episodes.backbone.preprocess, []

    def preprocess(as_bytes, on_tensors):
        asked.append(on_tensors)
        return plain(as_bytes, on_tensors)

    monkeypatch.setattr(episodes.backbone, "preprocess", preprocess)
    monkeypatch.setattr(episodes.store, "crops_tensors", tensors)
    list(episodes.of([]))
    assert asked == [tensors]


def test_workers_are_given_little(pixel_corpus, tmp_path):
    """Where worker processes are started anew, all they need is pickled: no towers, and no features of the store."""
    run = pixel_trainer(pixel_corpus, tmp_path, *JOINT)
    run.episodes.backbone.to_find_in_a_pickle = lambda: None  # which pickle refuses
    try:
        read = pickle.loads(
            pickle.dumps(partial(read_pixels, [run.held_tasks[:2]], run.episodes.places, bytes_of(run)))
        )
    finally:
        del run.episodes.backbone.to_find_in_a_pickle
    assert read(0)[1].dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.parametrize("form", [VISUAL, JOINT, ("PROMPT.CONDITIONAL", "True"), DEEP, MAPLE], ids=FORMS)
def test_a_run_learns_every_part_and_resumes_exactly(form, pixel_corpus, tmp_path):
    whole = pixel_trainer(pixel_corpus, tmp_path / "whole", *form)
    start = {name: value.detach().clone() for name, value in whole.theta.items()}
    whole.run()
    for name, value in whole.theta.items():
        assert not torch.equal(value, start[name]), name
    broken = pixel_trainer(pixel_corpus, tmp_path / "broken", *form)
    step = broken.step

    def stop(number, episode):
        if number == 3:
            raise KeyboardInterrupt
        return step(number, episode)

    broken.step = stop
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    pixel_trainer(pixel_corpus, tmp_path / "broken", *form).run(resume=True)
    one, other = (load_meta_checkpoint(tmp_path / name / "last.safetensors") for name in ("whole", "broken"))
    assert set(one.prompts) == set(other.prompts) and set(one.extras) == set(other.extras)
    for key, value in {**one.prompts, **one.extras}.items():
        assert torch.equal(value, {**other.prompts, **other.extras}[key]), key
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1] and "alignment" in json.loads(logs[0].splitlines()[-1])


@pytest.mark.slow
def test_the_meta_net_is_kept_beside_the_prompts(pixel_corpus, tmp_path):
    pixel_trainer(pixel_corpus, tmp_path, "PROMPT.CONDITIONAL", "True").run()
    checkpoint = load_meta_checkpoint(tmp_path / "best.safetensors")
    assert set(checkpoint.prompts) == {"text"} and checkpoint.regulator.widths == {"text": 64}
    net = {f"{META_NET}{name}": tuple(value.shape) for name, value in initial_meta_net(pixel_corpus[2]).items()}
    assert {name: tuple(value.shape) for name, value in checkpoint.extras.items()} == net
    checkpoint.check(pixel_corpus[2], {"text": 2}, net)
    with pytest.raises(GramError, match="expected a text prompt, which .* found a text prompt, meta_net.linear1.bias"):
        checkpoint.check(pixel_corpus[2], {"text": 2})


@pytest.mark.slow
def test_the_coupling_functions_are_kept_beside_deep_prompts(pixel_corpus, tmp_path):
    """R has one gate for the text tokens of every layer, and none for coupling functions; norms are kept by layer."""
    run = pixel_trainer(pixel_corpus, tmp_path, *MAPLE, "REGULATOR.START", "random")
    lengths = {name: value.shape for name, value in run.theta.items()}
    assert lengths == {"text": (2, 2, 64), "coupling.weight": (2, 64, 64), "coupling.bias": (2, 64)}
    sizes = [value.square().mean().sqrt().item() for value in (run.theta["text"][1], run.theta["coupling.weight"])]
    assert sizes == pytest.approx([0.02, (3 * 64) ** -0.5], rel=0.2)  # N(0, 0.02); uniform in +-64^-0.5
    assert run.episodes.text.ids.shape[1] == 2 + 3  # "of a cat." and the end token
    run.run()
    checkpoint = load_meta_checkpoint(tmp_path / "best.safetensors")
    assert set(checkpoint.prompts) == {"text"} and set(checkpoint.extras) == set(COUPLING)
    assert checkpoint.regulator.widths == {"text": 64} and checkpoint.tokens == {"text": 2}
    norms = torch.cat(run.state.norms)
    assert norms.shape == (8, 2) and set(checkpoint.gradient_norms) == {"text", "text.1"}
    last = load_meta_checkpoint(tmp_path / "last.safetensors")
    assert last.gradient_norms["text.1"]["q50"] == pytest.approx(norms[:, 1].quantile(0.5).item())
    with pytest.raises(GramError, match=r"expected prompts at the input alone, found deep ones, with which MaPLeGRAM"):
        export(tmp_path / "best.safetensors", tmp_path / "prompt.pt")
    with pytest.raises(GramError, match=r"best.safetensors: expected prompts at the input alone, found deep ones"):
        read_saved(tmp_path / "best.safetensors")


@pytest.mark.slow
def test_missing_and_broken_images_are_named(pixel_corpus, tmp_path):
    store, hierarchy, backbone, folder = pixel_corpus
    with pytest.raises(GramError, match=r"nowhere.0.png: expected an image .*LOADER.IMAGE_ROOT"):
        pixel_trainer(pixel_corpus, tmp_path, *JOINT, "LOADER.IMAGE_ROOT", str(tmp_path / "nowhere"))
    run = pixel_trainer(pixel_corpus, tmp_path / "run", *JOINT)
    row = int(run.held_tasks[0].support[0, 0])
    kept = (folder / f"{row}.png").read_bytes()
    (folder / f"{row}.png").write_bytes(kept[:100])
    try:
        with pytest.raises(
            GramError, match=f"{row}.png: expected the image that `gram embed` read, found broken image"
        ):
            run.run()
    finally:
        (folder / f"{row}.png").write_bytes(kept)


def test_a_gpu_copies_gathered_features_from_pinned_memory(backbone, monkeypatch):
    """A copy from other memory would make the processor wait for the GPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: pinned.append(value) or value)
    assert to_device(torch.ones(3), torch.device("cpu")).device.type == "cpu" and not pinned
    with FakeTensorMode():
        value = torch.ones(3)
        assert to_device(value, torch.device("cuda")).device.type == "cuda" and pinned == [value]
    store, copied = Store(backbone), []
    monkeypatch.setattr(gathered, "to_device", lambda value, device: copied.append(value.shape) or value.to(device))
    words = [f"word {number}" for number in range(20)]
    episodes = Episodes(backbone, store, words, PromptConfig(), LoaderConfig(), 1)
    (episode,) = episodes.of([[Task(np.arange(2), ("a", "b"), np.zeros((2, 1), int), np.zeros((2, 3), int))]])
    width = backbone.embed_dim
    assert copied == [(2, width), (6, width), (1, 2)]  # of the support and of the query set, and the topics
    assert episode.query.images.shape == (1, 6, width)


def test_tasks_that_cost_much_are_looked_at_few_at_a_time(pixel_corpus):
    store, _, backbone, _ = pixel_corpus
    for opts, expected in (((), 16), (("OUTER.BATCH", "20"), 20), (VISUAL, 2), (("PROMPT.CONDITIONAL", "True"), 2)):
        config = pixel_settings("OUTER.BATCH", "2", *opts)
        assert Episodes.from_config(backbone, store, ["cat"], config).at_a_time == expected


def test_what_makes_no_sense_is_refused(pixel_corpus):
    store, _, backbone, _ = pixel_corpus
    for opts, words in (
        (("PROMPT.TEXT_TOKENS", "0"), "TEXT_TOKENS or VISUAL_TOKENS"),
        ((*VISUAL, "PROMPT.CONDITIONAL", "True"), "PROMPT.CONDITIONAL"),
        (("PROMPT.TEXT_DEPTH", "2", "PROMPT.CONDITIONAL", "True"), "PROMPT.CONDITIONAL: expected .* TEXT_DEPTH 1"),
        ((*MAPLE, "PROMPT.CONDITIONAL", "True"), "PROMPT.CONDITIONAL: expected FAMILY independent"),
        ((*MAPLE, "PROMPT.VISUAL_TOKENS", "3"), "FAMILY maple: expected .* found 3 and 2, 2 and 2, 0"),
        ((*MAPLE, "PROMPT.VISUAL_DEPTH", "1"), "FAMILY maple: expected .* found 2 and 2, 1 and 2, 0"),
        ((*MAPLE, "PROMPT.VISUAL_SIZE", "0.1"), "FAMILY maple: expected .* found 2 and 2, 2 and 2, 0.1"),
        ((*MAPLE, "PROMPT.VISUAL_START", "class_token"), "FAMILY maple: .* VISUAL_START random, found .* class_token"),
    ):
        with pytest.raises(GramError, match=words):
            Episodes.from_config(backbone, store, ["cat"], pixel_settings(*opts))
    for key in ("TEXT_DEPTH", "VISUAL_DEPTH"):
        config = PromptConfig.from_config(pixel_settings(*JOINT, f"PROMPT.{key}", "3"))
        with pytest.raises(GramError, match=f"PROMPT.{key}: expected at most the tower's 2 layers, found 3"):
            initial_theta(backbone, config, 1)


def test_meta_training_may_start_from_the_class_token(pixel_corpus):
    backbone = pixel_corpus[2]
    config = PromptConfig.from_config(pixel_settings(*VISUAL, "PROMPT.VISUAL_START", "class_token"))
    theta = initial_theta(backbone, config, 1)["visual"]
    tower = backbone.model.visual
    token = tower.class_embedding + tower.positional_embedding[0]
    assert torch.equal(theta, class_token_start(backbone, 2, torch.Generator().manual_seed(1)))
    assert theta.requires_grad and (theta - token).norm() < 0.2 * token.expand(2, -1).norm()


@pytest.mark.parametrize("rate", [0.02, 0.001])  # the second is the text prompt's
def test_the_visual_prompt_may_have_its_own_rate(rate):
    theta = {"text": torch.ones(2, 3, requires_grad=True), "visual": torch.ones(2, 4, requires_grad=True)}
    outer = OuterLoop(lr_prompt=0.001, lr_visual=rate, cosine=False)
    optimiser = outer.build_optimiser(theta, None)
    for value in theta.values():
        value.grad = torch.ones_like(value)
    outer.update(optimiser, 1)
    for kind, expected in (("text", 0.001), ("visual", rate)):  # Adam's first step has the length of its rate
        torch.testing.assert_close(1 - theta[kind].detach(), torch.full_like(theta[kind], expected), rtol=1e-3, atol=0)


def test_the_temperature_is_that_of_the_query_loss_alone(pixel_corpus, tmp_path):
    run = pixel_trainer(pixel_corpus, tmp_path, "OUTER.TEMPERATURE", "2.5")
    episode = next(run.episodes.of([StepTasks(run.train_tasks, run.outer.batch, 0, 1, run.own)[0]]))
    prompts = for_each_task(run.theta, len(episode.tasks))
    for side, temperature in ((episode.support, 1.0), (episode.query, 2.5)):
        scores = side.logits(prompts) / temperature
        right = torch.log_softmax(scores, dim=2).gather(2, side.labels[..., None]).squeeze(2)
        torch.testing.assert_close(side(prompts), -right.mean(dim=1))
        torch.testing.assert_close(sum(part(prompts) for part in side.parts(2)), side(prompts))
