"""What is kept for the backward pass: activations computed again instead, class sentences in chunks; equal results."""

import threading
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from yacs.config import CfgNode

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta.backbone import clip, load_backbone
from gram_meta.backbone.recompute import recomputed
from gram_meta.backbone.second_order import second_order_enabled
from gram_meta.coop import launch
from gram_meta.engine import build_trainer, set_random_seed
from gram_meta.method import prompts as around
from gram_meta.method.bilevel import InnerLoop, meta_losses, twice_differentiable
from gram_meta.method.prompts import ClassText, ConditionalCLIP, PromptedCLIP, initial_meta_net, initial_prompts
from gram_meta.trainers import memory
from gram_meta.trainers.coop import PlacedText

NAMES = ["cat", "a very big and friendly dog", "house boat", "tree", "an old red fire truck"]


@pytest.fixture(scope="module")
def exact():
    """Layer norms in float64: OpenAI's own cast to float32."""
    return load_backbone("random-tiny", precision="fp64")


class Box:
    """What autograd keeps of a saved tensor, as long as the graph needs it."""

    def __init__(self, tensor):
        self.tensor = tensor


@contextmanager
def kept_bytes(backbone, peak=None):
    """Counts the bytes that graphs made inside hold now for backward passes; weights left out, a storage once.

    `peak`: a list that gets the count at every tensor that is kept, those of a recomputation too.
    """
    boxes = weakref.WeakSet()
    weights = {weight.untyped_storage().data_ptr() for weight in backbone.parameters()}

    def pack(tensor):
        box = Box(tensor)
        boxes.add(box)
        if peak is not None:
            peak.append(count())
        return box

    def count():
        storages = {x.data_ptr(): x.nbytes() for x in (box.tensor.untyped_storage() for box in boxes)}
        return sum(size for address, size in storages.items() if address not in weights)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        yield count


@contextmanager
def checkpointing(backbone):
    backbone.checkpointing = True
    try:
        yield
    finally:
        backbone.checkpointing = False


def both_ways(backbone, run):
    """The same computation with activations kept and computed again."""
    plain = run()
    with checkpointing(backbone):
        return plain, run()


# --------------------------------------------------------------------------------------------------- recomputed calls


def test_recomputed_gradients_of_three_orders():
    x, y = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def plain(x, y):
        return (x * y).sin() + x @ y.T @ x, y.exp()

    def again(*inputs):
        return recomputed(plain, *inputs)

    assert torch.autograd.gradcheck(again, (x, y))
    assert torch.autograd.gradgradcheck(again, (x, y))

    def third(function):
        result = sum(out.pow(2).sum() for out in function(x, y))
        first = torch.autograd.grad(result, (x, y), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, y), create_graph=True)
        return torch.autograd.grad(sum(g.sum() for g in second), (x, y))

    for ours, expected in zip(third(again), third(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_recomputed_takes_inputs_without_gradient_twice_and_unused_outputs():
    x = torch.randn(3, requires_grad=True)
    fixed = torch.randn(3)

    def plain(a, b, c):
        return a * b + c * c, fixed * c, a - c

    expected = torch.autograd.grad(plain(x, x, fixed)[0].sum(), x)
    torch.testing.assert_close(torch.autograd.grad(recomputed(plain, x, x, fixed)[0].sum(), x), expected)
    product, constant, _ = recomputed(plain, fixed, fixed, fixed)  # nothing to keep
    assert not product.requires_grad and not constant.requires_grad
    with torch.no_grad():
        assert recomputed(plain, x, x, x)[0].grad_fn is None


def test_recomputation_runs_under_the_kernels_and_the_autocast_of_the_forward_pass():
    seen = []

    def plain(x):
        flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        seen.append((*flags, torch.is_autocast_enabled("cpu")))
        return x @ x

    x = torch.randn(2, 2, requires_grad=True)
    with twice_differentiable(), torch.autocast("cpu"):
        y = recomputed(plain, x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert seen == [(False, True, True)] * 2
    assert torch.backends.cuda.flash_sdp_enabled() and not torch.is_autocast_enabled("cpu")


def test_recomputation_in_another_thread_is_twice_differentiable_as_the_forward_pass():
    """Autograd's thread of a GPU inherits no context variable from the thread of the forward pass."""
    seen = []

    def plain(x):
        seen.append(second_order_enabled())
        return x @ x

    x = torch.randn(2, 2, requires_grad=True)
    with twice_differentiable():
        twice = recomputed(plain, x)
    once = recomputed(plain, x)
    for y in (twice, once):
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
    assert seen == [True, False, True, False] and not second_order_enabled()


# ------------------------------------------------------------------------------------------------------- both towers


def test_checkpointed_text_is_equal_bit_by_bit():
    backbone = load_backbone("random-tiny")
    text = ClassText(backbone, NAMES, 4)
    prompt = torch.randn(4, 64).mul(0.02).requires_grad_()

    def run():
        features = text.features(prompt)
        return features, *torch.autograd.grad(features.sin().sum(), prompt)

    for plain, again in zip(*both_ways(backbone, run), strict=True):
        assert torch.equal(plain, again)


def test_checkpointed_images_are_equal_bit_by_bit():
    backbone = load_backbone("random-tiny")
    images, prompt = torch.randn(3, 3, 32, 32), torch.randn(2, 64, requires_grad=True)

    def run():
        features = backbone.encode_images(images, prompt)
        return features, *torch.autograd.grad(features.sin().sum(), prompt)

    for plain, again in zip(*both_ways(backbone, run), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kinds", [("text",), ("visual",), ("text", "visual")])
def test_checkpointed_meta_gradients_are_exact(exact, kinds, steps):
    start = initial_prompts(exact, 2, 2, seed=1)
    theta = {kind: start[kind].double().requires_grad_() for kind in kinds}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 2, 3, 3, 32, 32, generator=generator)  # support and query, tasks, images, ...
    text = ClassText(exact, NAMES, 2).select(torch.tensor([[0, 1, 2], [3, 1, 4]]))
    fixed = F.normalize(torch.randn(2, 3, 64, generator=generator, dtype=torch.float64), dim=-1)

    def losses(of):
        def loss(prompts):
            classes = text.features(prompts["text"]) if "text" in prompts else fixed  # (2, 3, D)
            pixels = images[of].flatten(0, 1)
            each = prompts["visual"].repeat_interleave(3, 0) if "visual" in prompts else None
            seen = exact.encode_images(pixels, each).unflatten(0, (2, 3))
            scores = 20 * seen @ classes.transpose(1, 2)  # (2, 3 images, 3 classes)
            labels = torch.arange(3).expand(2, 3)
            return F.cross_entropy(scores.transpose(1, 2), labels, reduction="none").mean(1)

        return loss

    def run(**options):
        result = meta_losses(losses(0), losses(1), theta, 2, InnerLoop(5.0, steps, **options)).losses.sum()
        return result, *torch.autograd.grad(result, list(theta.values()))

    plain, again = both_ways(exact, run)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())
    lost = run(first_order=True)[1] - plain[1]
    assert lost.abs().max() > 1e-3 * plain[1].abs().max()  # there is a second order to lose


def test_checkpointing_keeps_the_layers_inputs_alone(exact):
    text = ClassText(exact, NAMES, 2)
    prompt = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    images = torch.randn(4, 3, 32, 32)
    visual = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)

    def kept(run, second_order=False):
        with kept_bytes(exact) as count, twice_differentiable():
            result = run().sum()
            wanted = prompt if run is of_text else visual
            graph = torch.autograd.grad(result, wanted, create_graph=True) if second_order else result
            return count() if graph is not None else 0

    def of_text():
        return text.features(prompt)

    def of_images():
        return exact.encode_images(images, visual)

    for run, share in ((of_text, 0.2), (of_images, 0.25)):
        for second_order in (False, True):
            plain, again = both_ways(exact, partial(kept, run, second_order))
            assert again < share * plain, (run.__name__, second_order)


# ------------------------------------------------------------------------------------------------------ class chunks

MANY = [f"{look} {thing}" for look in ("", "very big and old", "red", "small wooden") for thing in NAMES]  # 20


def prompt_and_text(kind, backbone):
    """A prompt, requiring gradients, and the class sentences it belongs to."""
    shape = {"shared": (3, 64), "images": (5, 3, 64), "placed": (3, 64), "each": (len(MANY), 3, 64)}[kind]
    prompt = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(backbone.logit_scale.dtype)
    placed = {"placed": "middle", "each": "front"}.get(kind)
    text = PlacedText(backbone, MANY, 3, placed) if placed else ClassText(backbone, MANY, 3)
    return prompt.mul(0.1).requires_grad_(), text


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 30, 55])
@pytest.mark.parametrize("kind", ["shared", "images", "placed", "each"])
def test_chunks_give_equal_features_and_gradients(exact, kind, size):
    prompt, text = prompt_and_text(kind, exact)
    plain = text.features(prompt)
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weights).sum(), prompt)[0]
    text.chunk = size
    chunked = text.features(prompt)
    torch.testing.assert_close(chunked, plain, rtol=0, atol=1e-12)
    gradient = torch.autograd.grad((chunked * weights).sum(), prompt)[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["shared", "images", "placed", "each"])
def test_one_chunk_is_alive_at_a_time(exact, kind):
    def peak(size):
        prompt, text = prompt_and_text(kind, exact)
        text.chunk = size
        with kept_bytes(exact, counts := []) as now:
            features = text.features(prompt).sum()
            after_forward = now()
            features.backward()
        return after_forward, max(counts)

    (plain, plain_peak), (forward, chunked_peak) = peak(0), peak(4)
    assert plain == plain_peak
    assert forward < 0.15 * plain  # prompts and places, and what makes the features one tensor
    assert chunked_peak < 0.45 * plain


@pytest.mark.parametrize("kind", ["shared", "images", "placed", "each"])
def test_without_gradients_few_sentences_are_encoded_at_a_time(exact, kind, monkeypatch):
    prompt, text = prompt_and_text(kind, exact)
    prompt = prompt.detach()
    expected = text.features(prompt)
    monkeypatch.setattr(around, "SENTENCES", 6)
    seen, encode = [], exact.encode_text

    def spying(own, *args, **options):
        seen.append(own.shape[:-2].numel())
        return encode(own, *args, **options)

    monkeypatch.setattr(exact, "encode_text", spying)
    torch.testing.assert_close(text.features(prompt), expected, rtol=0, atol=1e-12)
    assert max(seen) == 6 and sum(seen) == expected.shape[:-1].numel()


def test_sentences_are_packed_once(exact, monkeypatch):
    made, packing = [], clip.Packing
    monkeypatch.setattr(clip, "Packing", lambda *args: made.append(args) or packing(*args))
    prompt, text = prompt_and_text("shared", exact)
    expected = text.features(prompt)
    assert torch.equal(text.features(prompt), expected) and len(made) == 1
    text.chunk = 7
    for _ in range(2):
        text.features(prompt)
    assert len(made) == 1 + 3
    fewer = text.select(torch.tensor([3, 1]))  # not what was kept for all of them
    torch.testing.assert_close(fewer.features(prompt), expected[[3, 1]])


# -------------------------------------------------------------------------------------------------- chosen by itself


def options(**changes):
    node = CfgNode({"CHECKPOINTING": "auto", "CLASSES": 0, "TEXT_BUDGET": 1.0, "IMAGE_BUDGET": 0.0})
    node.merge_from_list([item for pair in changes.items() for item in pair])
    return node


@pytest.fixture(scope="module")
def deep():
    """As many layers as CLIP has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip._SHAPES, "deep", (64, 32, 12, 64, 8, 77, 49408, 64, 1, 12))
        return load_backbone("random-deep")


@pytest.fixture(params=[True, False], ids=["packed", "rectangle"])
def packs(deep, request):
    """Whether texts are packed, as on a CPU, or computed as a rectangle, as on a GPU."""
    deep.packs_texts = request.param
    yield request.param
    deep.packs_texts = True


@pytest.mark.parametrize("placed", [False, True])
def test_the_estimates_are_what_is_kept(deep, placed, packs):
    text = PlacedText(deep, MANY, 4, "middle") if placed else ClassText(deep, MANY, 4)
    prompt = torch.randn(4, 64, requires_grad=True)
    with kept_bytes(deep) as now:
        features = text.features(prompt)
        assert 1 <= memory.text_bytes(text) / now() < 1.2
    visual = torch.randn(2, 64, requires_grad=True)
    with kept_bytes(deep) as now:
        images = deep.encode_images(torch.randn(3, 3, 32, 32), visual)
        assert 1 <= memory.image_bytes(deep, 3, 2) / now() < 1.2
    assert features.requires_grad and images.requires_grad


def test_chunks_are_chosen_from_the_number_of_classes(deep, packs):
    text = ClassText(deep, MANY, 4)
    whole = memory.text_bytes(text) / memory.GB
    assert memory.class_chunk(text, options()) == 0
    assert memory.class_chunk(text, options(TEXT_BUDGET=1.01 * whole)) == 0
    for share in (0.99, 0.5, 0.21, 0.1):
        few = options(TEXT_BUDGET=share * whole)
        size = memory.class_chunk(text, few)
        parts = text._in_parts(size).texts
        assert len(parts) > 1 and max(map(memory.text_bytes, parts)) <= share * whole * memory.GB
        assert size == memory.class_chunk(text, few)  # and again
        fewer = -(-len(MANY) // (len(parts) - 1))
        if len(parts) > 2:  # no fewer parts would do
            assert max(map(memory.text_bytes, text._in_parts(fewer).texts)) > share * whole * memory.GB
    tiny = options(TEXT_BUDGET=1e-9)
    assert memory.class_chunk(text, tiny) == 1
    assert memory.class_chunk(text, options(CHECKPOINTING="never", TEXT_BUDGET=1e-9)) == 0
    assert memory.class_chunk(text, options(CHECKPOINTING="never", CLASSES=3)) == 3
    assert memory.class_chunk(text, options(CLASSES=20)) == 0
    # each image has sentences of its own: all classes of two images at a time, or some of one's
    assert memory.class_chunk(text, options(TEXT_BUDGET=2.5 * whole), images=2) == 0
    assert memory.class_chunk(text, options(TEXT_BUDGET=2.5 * whole), images=8) == 40
    assert memory.class_chunk(text, options(TEXT_BUDGET=0.6 * whole), images=8) == 10


def test_what_is_arranged_is_printed(deep):
    prompts = initial_prompts(deep, 3, 2)
    text, both = {"text": prompts["text"]}, PromptedCLIP(deep, MANY, prompts)
    visual = PromptedCLIP(deep, MANY, {"visual": prompts["visual"]})
    coop = PromptedCLIP(deep, MANY, text)
    cocoop = ConditionalCLIP(deep, MANY, text, initial_meta_net(deep))
    try:
        for model in (both, visual, coop, cocoop):
            assert memory.arrange(model, options(), 4) == [] and deep.checkpointing is False
        assert "20 class sentences" in memory.arrange(coop, options(TEXT_BUDGET=0.003), 4)[0]
        assert 0 < coop.class_text.chunk < 20 and deep.checkpointing is False
        assert "80 class sentences" in memory.arrange(cocoop, options(TEXT_BUDGET=0.003), 4)[0]
        (printed,) = memory.arrange(visual, options(IMAGE_BUDGET=0.001), 4)
        assert printed.startswith("Memory: 4 images leave about 0.0") and deep.checkpointing == "images"
        assert len(memory.arrange(both, options(IMAGE_BUDGET=0.001, TEXT_BUDGET=0.003), 4)) == 2
        assert deep.checkpointing == "images" and both.class_text.chunk
        memory.arrange(both, options(CHECKPOINTING="always"), 4)
        assert deep.checkpointing is True and not both.class_text.chunk
        memory.arrange(coop, options(CHECKPOINTING="always"), 4)
        assert deep.checkpointing == "text"
        assert memory.arrange(both, options(CHECKPOINTING="never", IMAGE_BUDGET=1e-9, TEXT_BUDGET=1e-9), 4) == []
        assert deep.checkpointing is False
    finally:
        deep.checkpointing = False


# ---------------------------------------------------------------------------------------------------------- trainers

CONFIGS = {
    "CoOp": "gram_small_c4_ep10_batch32_ctxv1",
    "CoCoOp": "gram_small_c4_ep10_batch1_ctxv1",
    "VPT": "gram_small_c4_ep10_batch32_ctxv1",
    "JointPrompt": "gram_small_c2+2_ep10_batch32_ctxv1",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_trainers_step_is_the_same_with_and_without(name, tiny_data, tiny_options, tmp_path, capsys):
    def step(*changes):
        arguments = [
            "--root",
            str(tiny_data),
            "--seed",
            "1",
            "--trainer",
            name,
            "--dataset-config-file",
            "emoji_food",
            "--config-file",
            CONFIGS[name],
            "--output-dir",
            str(tmp_path / "out"),
            *tiny_options,
            "DATASET.NUM_SHOTS",
            "2",
            "DATALOADER.TRAIN_X.BATCH_SIZE",
            "2",
            "OPTIM.WARMUP_EPOCH",
            "-1",
            *changes,
        ]
        cfg = launch.setup_cfg(launch.build_parser().parse_args(arguments))
        set_random_seed(cfg.SEED)
        trainer = build_trainer(cfg)
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Memory:")]
        text, layers = trainer.model.class_text, trainer.backbone.checkpointing
        trainer.num_batches, trainer.epoch, trainer.batch_idx = 5, 0, 0
        trainer.set_model_mode("train")
        start = torch.nn.utils.parameters_to_vector(trainer.model.prompt_learner.parameters()).detach().clone()
        trainer.forward_backward(next(iter(trainer.train_loader_x)))
        end = torch.nn.utils.parameters_to_vector(trainer.model.prompt_learner.parameters()).detach()
        return end - start, text.chunk if text is not None else 0, layers, printed

    plain, chunk, layers, printed = step()
    assert plain.abs().max() > 0 and not chunk and layers is False and not printed
    again = step("TRAINER.MEMORY.CHECKPOINT", "always")  # version 0.1's name
    assert torch.equal(again[0], plain) and again[2]  # layers computed again are the same to the last bit
    forced = step("TRAINER.MEMORY.CLASSES", "3", "TRAINER.MEMORY.IMAGE_BUDGET", "1e-9")
    assert forced[1] == (0 if name == "VPT" else 3) and forced[2] == (
        "images" if name in ("VPT", "JointPrompt") else False
    )
    assert len(forced[3]) == (2 if name == "JointPrompt" else 1)
    torch.testing.assert_close(forced[0], plain, rtol=0, atol=2e-4 * plain.abs().max().item())
