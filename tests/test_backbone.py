"""The towers' forward passes against the clip package's own, and the prompts around them."""

import pytest
import torch

from gram_meta.backbone import clip_module, end_positions, fingerprint, load_backbone
from gram_meta.errors import GramError
from gram_meta.prompts import (
    ClassText,
    PromptedCLIP,
    PromptLearner,
    context_from_words,
    initial_prompts,
    template_features,
)

NAMES = ["cat", "a very big and friendly dog", "house boat"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("random-tiny")


def normalised(x):
    return x / x.norm(dim=-1, keepdim=True)


def uncut_features(backbone, names, prompt):
    """Class features as CoOp computes them: 77 positions through clip's own transformer."""
    model = backbone.model
    slots = len(prompt)
    tokens = backbone.tokenize([" ".join(["X"] * slots) + f" {name}." for name in names])
    embeddings = model.token_embedding(tokens)
    x = torch.cat([embeddings[:, :1], prompt.expand(len(names), -1, -1), embeddings[:, 1 + slots :]], dim=1)
    x = model.transformer((x + model.positional_embedding).transpose(0, 1)).transpose(0, 1)
    return normalised(model.ln_final(x)[torch.arange(len(names)), tokens.argmax(-1)] @ model.text_projection)


def test_plain_texts_and_images_equal_clips_own(backbone):
    texts = ["a photo of a cat.", "two very small dogs on a blue mat, seen from above"]
    tokens = clip_module().tokenize(texts)
    torch.testing.assert_close(backbone.encode_texts(texts), normalised(backbone.model.encode_text(tokens)))
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        backbone.encode_images(images), normalised(backbone.model.encode_image(images))
    )


@pytest.mark.parametrize("tokens", [1, 4])
def test_length_cut_gives_equal_logits_and_gradients(backbone, tokens):
    prompt = torch.randn(tokens, 64).mul(0.02).requires_grad_()
    images = normalised(torch.randn(5, 64))
    cut = 10 * images @ ClassText(backbone, NAMES, tokens).features(prompt).T
    uncut = 10 * images @ uncut_features(backbone, NAMES, prompt).T
    torch.testing.assert_close(cut, uncut, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(cut)
    grads = [torch.autograd.grad((scores * weights).sum(), prompt)[0] for scores in (cut, uncut)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_sentences_are_cut_at_the_longest(backbone):
    text = ClassText(backbone, NAMES, 4)
    longest = clip_module().tokenize(["X X X X a very big and friendly dog."])
    assert 5 + text.own.shape[1] == int(end_positions(longest)[0]) + 1
    assert ClassText(backbone, ["cat"], 4).own.shape[1] == 3  # cat, full stop, end


def test_what_stands_behind_an_end_token_is_never_read(backbone):
    text, prompt = ClassText(backbone, NAMES, 4), torch.randn(4, 64)
    expected = text.features(prompt)
    behind = torch.arange(text.own.shape[1]) > text.ends[:, None]
    text.own = text.own.masked_fill(behind[..., None], float("nan"))
    torch.testing.assert_close(text.features(prompt), expected, rtol=0, atol=0)


def test_a_batch_of_prompts_and_classes_is_one_after_another(backbone):
    text = ClassText(backbone, NAMES, 2)
    prompts = torch.randn(2, 2, 64)
    classes = torch.tensor([[0, 2], [1, 0]])
    together = text.select(classes).features(prompts)
    for task in range(2):
        alone = ClassText(backbone, [NAMES[i] for i in classes[task]], 2).features(prompts[task])
        torch.testing.assert_close(together[task], alone)


def test_words_as_prompt_equal_the_written_template(backbone):
    prompt = context_from_words(backbone, "a photo of a")
    assert prompt.shape == (4, 64)
    torch.testing.assert_close(
        ClassText(backbone, NAMES, 4).features(prompt), template_features(backbone, NAMES)
    )


def test_visual_prompts_stand_behind_the_patches(backbone):
    images, prompt = torch.randn(2, 3, 32, 32), torch.randn(3, 64)
    tower = backbone.model.visual
    x = tower.conv1(images).flatten(2).permute(0, 2, 1)
    x = torch.cat([tower.class_embedding.expand(2, 1, -1), x], dim=1) + tower.positional_embedding
    x = tower.ln_pre(torch.cat([x, prompt.expand(2, -1, -1)], dim=1))
    x = tower.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    expected = normalised(tower.ln_post(x[:, 0]) @ tower.proj)
    torch.testing.assert_close(backbone.encode_images(images, prompt), expected)
    each = torch.stack([prompt, -prompt])
    torch.testing.assert_close(
        backbone.encode_images(images, each)[1:], backbone.encode_images(images[1:], -prompt)
    )


def test_resnets_serve_text_prompts_and_refuse_visual_ones():
    resnet = load_backbone("random-tiny-RN")
    images = torch.randn(2, 3, resnet.image_size, resnet.image_size)
    torch.testing.assert_close(resnet.encode_images(images), normalised(resnet.model.encode_image(images)))
    assert PromptedCLIP(resnet, NAMES, initial_prompts(resnet, 4, 0, "a photo of a"))(images).shape == (2, 3)
    with pytest.raises(GramError, match="expected a ViT"):
        resnet.encode_images(images, torch.zeros(2, 64))
    with pytest.raises(GramError, match="expected a ViT"):
        initial_prompts(resnet, 0, 2)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_keeps_prompts_float32_and_features_close(backbone, precision):
    low = load_backbone("random-tiny", precision=precision)
    assert low.fingerprint == backbone.fingerprint and low.dtype != torch.float32
    model = PromptedCLIP(low, NAMES, initial_prompts(low, 4, 0, "a photo of a"))
    assert model.prompt_learner.ctx.dtype == torch.float32
    images = torch.randn(4, 3, 32, 32)
    scores = model(images)
    assert scores.dtype == torch.float32
    exact = PromptedCLIP(backbone, NAMES, initial_prompts(backbone, 4, 0, "a photo of a"))(images)
    assert (scores - exact).abs().max() < (0.05 if precision == "fp16" else 0.4)  # of logits of size 14
    scores.logsumexp(dim=1).sum().backward()
    assert (
        model.prompt_learner.ctx.grad.dtype == torch.float32 and model.prompt_learner.ctx.grad.abs().max() > 0
    )


def test_class_features_follow_the_prompt_without_gradients(backbone):
    model = PromptedCLIP(backbone, NAMES, initial_prompts(backbone, 2, 0))
    with torch.no_grad():
        first = model.class_features()
        assert model.class_features() is first  # computed once
        model.prompt_learner.ctx += 0.1
        assert not torch.equal(model.class_features(), first)
    assert model.class_features().requires_grad


def test_only_the_prompt_learns(backbone):
    model = PromptedCLIP(backbone, NAMES, initial_prompts(backbone, 2, 3))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "prompt_learner.ctx", "prompt_learner.visual_ctx",
    ]  # fmt: skip
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert {kind: p.grad.shape for kind, p in model.prompt_learner.prompts().items()} == {
        "text": (2, 64), "visual": (3, 64),
    }  # fmt: skip
    with pytest.raises(GramError, match="kinds text and/or visual"):
        PromptLearner({"txt": torch.zeros(1, 64)})


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(backbone):
    return backbone.model.state_dict()


def test_local_files_load_through_the_same_door(tmp_path, backbone, weights):
    from safetensors.torch import save_file

    torch.save(weights, tmp_path / "clip.pt")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "nested.pt")
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "clip.safetensors")
    for name in ("clip.pt", "nested.pt", "clip.safetensors"):
        assert load_backbone(str(tmp_path / name)).fingerprint == backbone.fingerprint


def test_torchscript_archives_load(tmp_path, backbone):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Linear(1, 1)

        def forward(self, x):
            return self.visual(x)

    torch.jit.script(Holder()).save(str(tmp_path / "archive.pt"))
    with pytest.raises(
        GramError, match="OpenAI's key names, found visual.weight"
    ):  # read, and found to be no CLIP
        load_backbone(str(tmp_path / "archive.pt"))


def test_openai_names_go_through_the_clip_packages_download(tmp_path, monkeypatch, backbone, weights):
    torch.save(weights, tmp_path / "ViT-B-16.pt")
    asked = []
    module = clip_module().clip
    monkeypatch.setattr(
        module, "_download", lambda url, root: asked.append(url) or str(tmp_path / "ViT-B-16.pt")
    )
    assert load_backbone("ViT-B/16").fingerprint == backbone.fingerprint
    assert asked == [module._MODELS["ViT-B/16"]]


def test_what_cannot_be_loaded_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(GramError, match="backbone 'ViT-B/61'"):
        load_backbone("ViT-B/61")
    with pytest.raises(GramError, match="precision: expected"):
        load_backbone("random-tiny", precision="fp8")
    (tmp_path / "broken.pt").write_bytes(b"no model")
    with pytest.raises(GramError, match="broken.pt: expected a TorchScript archive or a state dict"):
        load_backbone(str(tmp_path / "broken.pt"))
    (tmp_path / "broken.safetensors").write_bytes(b"no model")
    with pytest.raises(GramError, match="broken.safetensors: expected a .safetensors"):
        load_backbone(str(tmp_path / "broken.safetensors"))

    def no_network(url, root):
        raise OSError("no route to host")

    monkeypatch.setattr(clip_module().clip, "_download", no_network)
    with pytest.raises(GramError, match="expected to download .* no route to host"):
        load_backbone("ViT-B/32")


def test_pickled_code_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(GramError, match="trap.pt"):
        load_backbone(str(tmp_path / "trap.pt"))
    assert not (tmp_path / "sprung").exists()


def test_fingerprint_sees_a_single_value(weights):
    changed = {key: value.clone() for key, value in weights.items()}
    changed["ln_final.bias"][0] += 1e-6
    assert fingerprint(changed) != fingerprint(weights)
    assert fingerprint(dict(reversed(weights.items()))) == fingerprint(weights)


def test_texts_and_images_that_do_not_fit(backbone):
    with pytest.raises(GramError, match="at most 77 tokens"):
        backbone.tokenize(["word " * 90])
    with pytest.raises(GramError, match="expected 32 x 32 pixels, found 224 x 224"):
        backbone.encode_images(torch.zeros(1, 3, 224, 224))
