"""The towers' forward passes against the clip package's own, and the prompts around them."""

import json
import os
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch

from gram_meta.backbone import clip
from gram_meta.backbone.clip import _Digest, clip_module, end_positions, fingerprint, load_backbone
from gram_meta.backbone.weights import _read_file, build_clip
from gram_meta.errors import GramError
from gram_meta.method.prompts import (
    ClassText,
    PromptedCLIP,
    PromptLearner,
    context_from_words,
    initial_prompts,
    template_features,
)

NAMES = ["cat", "a very big and friendly dog", "house boat"]


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
    torch.testing.assert_close(backbone.encode_images(images), normalised(backbone.model.encode_image(images)))


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
    text, shared = ClassText(backbone, NAMES, 4), torch.randn(5, 64)
    expected = backbone.encode_text(text.own, text.ends, shared)
    behind = torch.arange(text.own.shape[1]) > text.ends[:, None]
    strange = text.own.masked_fill(behind[..., None], float("nan"))
    torch.testing.assert_close(backbone.encode_text(strange, text.ends, shared), expected, rtol=0, atol=0)


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
    torch.testing.assert_close(ClassText(backbone, NAMES, 4).features(prompt), template_features(backbone, NAMES))


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
    torch.testing.assert_close(backbone.encode_images(images, each)[1:], backbone.encode_images(images[1:], -prompt))


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
    assert model.prompt_learner.ctx.grad.dtype == torch.float32 and model.prompt_learner.ctx.grad.abs().max() > 0


def test_class_features_follow_a_prompt_that_is_replaced(backbone):
    """A new parameter may lie where the old one lay, with as many writes: its features are its own."""
    model = PromptedCLIP(backbone, ["cat", "sea lion"], {"text": context_from_words(backbone, "a photo of a")})
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(5):
            model.prompt_learner.ctx = None  # frees the old one before the new one is made
            model.prompt_learner.ctx = torch.nn.Parameter(torch.randn(4, backbone.text_width, generator=random))
            torch.testing.assert_close(model.class_features(), model.class_text.features(model.prompt_learner.ctx))


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
        "prompt_learner.ctx",
        "prompt_learner.visual_ctx",
    ]
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert {kind: p.grad.shape for kind, p in model.prompt_learner.prompts().items()} == {
        "text": (2, 64),
        "visual": (3, 64),
    }
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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64])
def test_loading_draws_nothing_at_random(tmp_path, monkeypatch, weights, backbone, stored, precision):
    """The modules are built without memory, and each weight goes from the file to its number type at once."""
    in_file = {key: value.to(stored) for key, value in weights.items()}
    torch.save(in_file, tmp_path / "clip.pt")

    def without_memory(function):
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            assert result.is_meta, f"{function.__name__} drew {tuple(result.shape)}"
            return result

        return called

    for owner, names in ((torch.Tensor, ("normal_", "uniform_")), (torch, ("randn", "rand"))):
        for name in names:
            monkeypatch.setattr(owner, name, without_memory(getattr(owner, name)))
    loaded = load_backbone(str(tmp_path / "clip.pt"), precision=precision)
    assert loaded.fingerprint == fingerprint(in_file)
    assert loaded.logit_scale == in_file["logit_scale"].float().exp()
    products = ("conv1", "in_proj", "out_proj", "c_fc", "c_proj")
    low = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for key, value in loaded.model.state_dict().items():
        high = low if precision in ("fp32", "fp64") else torch.float32
        expected = in_file[key].float().to(low if any(part in key for part in products) else high)
        assert value.dtype == expected.dtype and torch.equal(value, expected), key
    masks = [block.attn_mask for block in loaded.model.transformer.resblocks]
    assert all(torch.equal(mask, torch.full((77, 77), -torch.inf).triu(1)) for mask in masks) and masks


def test_a_mapped_file_may_change_afterwards(tmp_path, weights, backbone):
    torch.save(weights, tmp_path / "clip.pt")
    loaded = load_backbone(str(tmp_path / "clip.pt"))
    (tmp_path / "clip.pt").write_bytes(b"")  # while the thread computes the fingerprint: reading there is a bus error
    assert loaded.fingerprint == backbone.fingerprint
    assert torch.equal(loaded.encode_texts(["a cat"]), backbone.encode_texts(["a cat"]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_the_fingerprint_too(monkeypatch, weights):
    """The thread that computes it exists in the first process alone."""
    begun = threading.Event()

    def slow(state):
        begun.set()
        time.sleep(0.5)
        return fingerprint(state)

    result = _Digest(slow, weights)
    begun.wait()
    pid = os.fork()
    if not pid:
        os._exit(result() != fingerprint(weights))
    assert os.waitpid(pid, 0)[1] == 0 and result() == fingerprint(weights)


def test_a_process_of_many_runs_loads_the_same_clip_once(tmp_path, monkeypatch, weights):
    read = []
    state_dict_for = clip._state_dict_for
    monkeypatch.setattr(clip, "_state_dict_for", lambda name: read.append(name) or state_dict_for(name))
    monkeypatch.setattr(clip, "_kept", {})
    torch.save(weights, tmp_path / "clip.pt")
    path = str(tmp_path / "clip.pt")
    assert load_backbone(path) is not load_backbone(path) and len(read) == 2
    monkeypatch.setattr(clip, "keeps_last", True)
    first, second = load_backbone(path), load_backbone(path)
    assert len(read) == 3 and second.model is first.model and second.fingerprint == fingerprint(weights)
    first.checkpointing, first.packs_texts = True, False
    assert not second.checkpointing and second.packs_texts and load_backbone(path).packs_texts
    assert load_backbone(path, precision="bf16").dtype == torch.bfloat16 and len(read) == 4 and len(clip._kept) == 1
    torch.save({key: value + 1 for key, value in weights.items()}, path)
    assert load_backbone(path, precision="bf16").fingerprint != first.fingerprint and len(read) == 5


@pytest.mark.parametrize("name", ["clip.pt", "random-tiny"])
def test_a_kept_clip_leaves_the_generator_where_a_first_load_does(tmp_path, monkeypatch, weights, name):
    """Else the images' order and crops, and random starts, depend on what a process of `gram bench` ran before."""
    monkeypatch.setattr(clip, "_kept", {})
    monkeypatch.setattr(clip, "keeps_last", True)
    monkeypatch.chdir(tmp_path)
    torch.save(weights, name)
    loaded, drawn = [], []
    for _ in range(2):
        torch.manual_seed(1)
        loaded.append(load_backbone(name))
        drawn.append(torch.rand(3))
    assert loaded[0].model is loaded[1].model and torch.equal(*drawn)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "error::UserWarning")
def test_a_torchscript_archive_is_read_as_torch_reads_it(tmp_path, monkeypatch, weights):
    """OpenAI's files are such archives, with half of the numbers in 16 bits."""

    class Holder(torch.nn.Module):
        def __init__(self, state):
            super().__init__()
            for name in dict.fromkeys(key.split(".")[0] for key in state):
                inside = {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}
                if inside:
                    self.add_module(name, Holder(inside))
                else:
                    self.register_parameter(name, torch.nn.Parameter(state[name], requires_grad=False))

        def forward(self, x: int) -> int:
            return x

    halves = {key: value.half() if value.ndim > 1 else value for key, value in weights.items()}
    model = Holder(halves)
    model.register_buffer("input_resolution", torch.tensor(32))
    torch.jit.script(model).save(str(tmp_path / "clip.pt"))
    theirs = torch.jit.load(str(tmp_path / "clip.pt")).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)  # it compiles the archive's code, and copies the weights
    ours = _read_file(tmp_path / "clip.pt")
    assert ours.keys() == theirs.keys() >= {*weights, "input_resolution"}
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    assert load_backbone(str(tmp_path / "clip.pt")).fingerprint == fingerprint(halves)


@pytest.mark.parametrize("forge", ["another storage", "another class"])
def test_a_forged_archive_is_one_sentence(tmp_path, forge):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "good.pt"))
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "clip.pt", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("data.pkl"):
                old, new = {
                    "another storage": (b"FloatStorage", b"nopenStorage"),
                    "another class": (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nopen\n"),
                }[forge]
                assert old in content
                content = content.replace(old, new)
            bad.writestr(name.replace("good", "clip"), content)
    with pytest.raises(GramError, match="clip.pt: expected a "):
        load_backbone(str(tmp_path / "clip.pt"))


def test_an_archive_of_another_model(tmp_path):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Linear(1, 1)

        def forward(self, x):
            return self.visual(x)

    torch.jit.script(Holder()).save(str(tmp_path / "archive.pt"))
    with pytest.raises(GramError, match="OpenAI's key names, found visual.weight"):  # read, and found to be no CLIP
        load_backbone(str(tmp_path / "archive.pt"))


def test_openai_names_go_through_the_clip_packages_download(tmp_path, monkeypatch, backbone, weights):
    torch.save(weights, tmp_path / "ViT-B-16.pt")
    asked = []
    module = clip_module().clip
    monkeypatch.setattr(module, "_download", lambda url, root: asked.append(url) or str(tmp_path / "ViT-B-16.pt"))
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


# --- weights of other layouts -----------------------------------------------------------------------------------------

WIDTH = 64  # of both towers of random-tiny: one head


def in_hugging_face_names(weights):
    """OpenAI's names as transformers' CLIPModel has them; written out here by hand, to check the way back."""
    other = {}
    for key, value in weights.items():
        tower = "vision_model" if key.startswith("visual.") else "text_model"
        rest = key.removeprefix("visual.")
        if rest.startswith("transformer.resblocks."):
            _, _, number, *inside = rest.split(".")
            layer, inside = f"{tower}.encoder.layers.{number}", ".".join(inside)
            if inside.startswith("attn.in_proj_"):
                for which, part in zip("qkv", value.chunk(3), strict=True):
                    other[f"{layer}.self_attn.{which}_proj.{inside.removeprefix('attn.in_proj_')}"] = part
                continue
            for old, new in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                inside = inside.replace(old, new)
            other[f"{layer}.{inside}"] = value
            continue
        name = {
            "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
            "positional_embedding": f"{tower}.embeddings.position_embedding.weight",
            "ln_final.weight": "text_model.final_layer_norm.weight",
            "ln_final.bias": "text_model.final_layer_norm.bias",
            "class_embedding": "vision_model.embeddings.class_embedding",
            "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
            "ln_pre.weight": "vision_model.pre_layrnorm.weight",
            "ln_pre.bias": "vision_model.pre_layrnorm.bias",
            "ln_post.weight": "vision_model.post_layernorm.weight",
            "ln_post.bias": "vision_model.post_layernorm.bias",
            "text_projection": "text_projection.weight",
            "proj": "visual_projection.weight",
            "logit_scale": "logit_scale",
        }[rest]
        other[name] = value.T if name.endswith("projection.weight") else value
    other["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as older files have them
    return {key: value.contiguous().clone() for key, value in other.items()}


def hugging_face_config(**changes):
    tower = {"hidden_size": WIDTH, "num_attention_heads": 1, "hidden_act": "quick_gelu"}
    config = {"model_type": "clip", "text_config": dict(tower), "vision_config": dict(tower)}
    for key, value in changes.items():
        *above, name = key.split("__")
        (config[above[0]] if above else config)[name] = value
    return json.dumps(config)


def open_clip_config(**changes):
    model = {
        "embed_dim": 64,
        "quick_gelu": True,
        "vision_cfg": {"width": WIDTH, "patch_size": 8},
        "text_cfg": {"width": WIDTH, "heads": 1},
    }
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073]}}
    for key, value in changes.items():
        *above, name = key.split("__")
        node = config
        for part in above:
            node = node[part]
        node[name] = value
    return json.dumps(config)


@pytest.mark.slow
def test_hugging_face_names_in_a_folder_or_a_file(tmp_path, weights):
    from safetensors.torch import save_file

    weights = {key: value + 0.01 * torch.randn_like(value) for key, value in weights.items()}  # no two alike
    other = in_hugging_face_names(weights)
    assert not set(other) & set(weights) - {"logit_scale"}
    folder = tmp_path / "clip-hf"
    folder.mkdir()
    (folder / "config.json").write_text(hugging_face_config())
    torch.save(other, folder / "pytorch_model.bin")
    assert load_backbone(str(folder)).fingerprint == fingerprint(weights)  # the very same values
    assert load_backbone(str(folder / "pytorch_model.bin")).fingerprint == fingerprint(weights)
    save_file({key: value + 1 for key, value in other.items()}, folder / "model.safetensors")
    assert load_backbone(str(folder)).fingerprint != fingerprint(weights)  # safetensors come first


def test_weights_in_parts_load(tmp_path, backbone, weights):
    from safetensors.torch import save_file

    other = in_hugging_face_names(weights)
    names = sorted(other)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: other[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(hugging_face_config())
    assert load_backbone(str(tmp_path)).fingerprint == backbone.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module.", "text.", "module.text."])
def test_open_clips_names_with_and_without_prefixes(tmp_path, backbone, weights, prefix):
    def named(key):
        is_text = not key.startswith("visual.") and key != "logit_scale"
        return prefix.removesuffix("text.") + ("text." if is_text and prefix.endswith("text.") else "") + key

    other = {named(key): value for key, value in weights.items()} | {named("attn_mask"): torch.zeros(77, 77)}
    torch.save({"epoch": 3, "name": "run", "state_dict": other}, tmp_path / "epoch_3.pt")
    (tmp_path / "open_clip_config.json").write_text(open_clip_config())
    assert load_backbone(str(tmp_path / "epoch_3.pt")).fingerprint == backbone.fingerprint


def test_a_folder_of_open_clips_hub(tmp_path, backbone, weights):
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(open_clip_config())
    assert load_backbone(str(tmp_path)).fingerprint == backbone.fingerprint
    # timm's folders hold the image tower alone beside it, with a config of their own
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_clip_224"}))
    assert load_backbone(str(tmp_path)).fingerprint == backbone.fingerprint


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"text_config__hidden_act": "gelu_new"}, "activation of text_config of quick_gelu or gelu, found gelu_new"),
        ({"vision_config__num_attention_heads": 3}, "width of vision_config that 64 and its heads divide, found 64 wi"),
        ({"text_config__eos_token_id": 7}, "expected text_config.eos_token_id 49407, of CLIP's tokenizer, found 7"),
        ({"model_type": "siglip"}, "model_type 'clip', found 'siglip'"),
    ],
)
def test_what_a_hugging_face_config_computes_differently_is_refused(tmp_path, weights, changes, sentence):
    torch.save(in_hugging_face_names(weights), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(hugging_face_config(**changes))
    with pytest.raises(GramError, match=sentence):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"model_cfg__vision_cfg__head_width": 80},
            "width of vision_cfg that 64 and its heads divide, found 64 with 0",
        ),
        (
            {"model_cfg__text_cfg__act_kwargs": {"approximate": "tanh"}},
            "act_kwargs None, .* found {'approximate': 'tan",
        ),
        ({"model_cfg__vision_cfg__timm_model_name": "vit_so400m"}, "'vit_so400m'; gram_meta.load_backbone takes such"),
        ({"model_cfg__text_cfg__hf_model_name": "roberta"}, "hf_model_name 'roberta'"),
        ({"model_cfg__text_cfg__no_causal_mask": True}, "no_causal_mask False, .* found True"),
        ({"model_cfg__vision_cfg__pool_type": "avg"}, "pool_type tok, .* found avg"),
        ({"preprocess_cfg__mean": [0.5, 0.5]}, "a standard deviation of three colours, found .0.5, 0.5"),
        ({"preprocess_cfg__std": "none"}, "a standard deviation of three colours, found none"),
    ],
)
def test_what_an_open_clip_config_computes_differently_is_refused(tmp_path, weights, changes, sentence):
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(open_clip_config(**changes))
    with pytest.raises(GramError, match=sentence):
        load_backbone(str(tmp_path))


def test_weights_that_do_not_say_how_to_compute_want_their_config(tmp_path, weights):
    other = in_hugging_face_names(weights)
    torch.save(other, tmp_path / "hf.bin")
    with pytest.raises(GramError, match="expected config.json beside it.*activation"):
        load_backbone(str(tmp_path / "hf.bin"))
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(GramError, match="expected open_clip_config.json beside it.*quick_gelu"):
        load_backbone(str(tmp_path / "open_clip_pytorch_model.bin"))
    with pytest.raises(GramError, match="expected a Hugging Face model .* found hf.bin, open_clip"):
        load_backbone(str(tmp_path))


def test_other_architectures_and_broken_weights_are_one_sentence(tmp_path, weights):
    (tmp_path / "config.json").write_text(hugging_face_config())
    other = in_hugging_face_names(weights)
    file = tmp_path / "pytorch_model.bin"
    torch.save(other | {"logit_bias": torch.zeros(())}, file)
    with pytest.raises(GramError, match="found another .such as SigLIP"):
        load_backbone(str(tmp_path))
    torch.save(other | {"text_model.head.weight": torch.zeros(2)}, file)
    with pytest.raises(GramError, match="Hugging Face's CLIPModel, found text_model.head.weight"):
        load_backbone(str(tmp_path))
    torch.save({key: value for key, value in other.items() if not key.endswith("0.self_attn.k_proj.bias")}, file)
    with pytest.raises(GramError, match="expected .*0.self_attn.k_proj.bias beside"):
        load_backbone(str(tmp_path))
    torch.save({key: value for key, value in other.items() if "final_layer_norm" not in key}, file)
    with pytest.raises(GramError, match="found no ln_final.weight"):
        load_backbone(str(tmp_path))
    key = "text_model.embeddings.token_embedding.weight"
    torch.save(other | {key: other[key][:1000]}, file)
    with pytest.raises(GramError, match="49408 tokens of CLIP's tokenizer, found 1000"):
        load_backbone(str(tmp_path))
    torch.save({key: value for key, value in weights.items() if "ln_2" not in key}, tmp_path / "some.pt")
    with pytest.raises(GramError, match="some.pt: expected a whole CLIP .*ln_2"):
        load_backbone(str(tmp_path / "some.pt"))


def test_a_longer_context_and_a_bigger_vocabulary_serve(tmp_path, weights):
    longer = dict(weights)
    longer["positional_embedding"] = torch.cat([weights["positional_embedding"]] * 2)[:100]
    longer["token_embedding.weight"] = torch.cat([weights["token_embedding.weight"], torch.ones(3, WIDTH)])
    torch.save(longer, tmp_path / "longer.pt")
    backbone = load_backbone(str(tmp_path / "longer.pt"))
    assert backbone.context_length == 100
    texts = ["a photo of a cat.", "word " * 90]
    torch.testing.assert_close(
        backbone.encode_texts(texts), normalised(backbone.model.encode_text(backbone.tokenize(texts)))
    )


def unlike(model):
    """Every parameter moved at random: fresh layer norms are all alike, and mixing them up would go unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.slow
def test_features_equal_transformers_own(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, "hidden_act": "quick_gelu"},
        vision_config={**tower, "hidden_act": "quick_gelu", "image_size": 32, "patch_size": 8},
        projection_dim=64,
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(config).eval()
    unlike(theirs).save_pretrained(tmp_path)
    theirs.double()
    ours = load_backbone(str(tmp_path), precision="fp64")
    texts, images = ["a photo of a cat.", "two very small dogs"], torch.randn(3, 3, 32, 32).double()
    with torch.no_grad():
        out = theirs(input_ids=ours.tokenize(texts), pixel_values=images)
    torch.testing.assert_close(ours.encode_texts(texts), out.text_embeds, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.encode_images(images), out.image_embeds, rtol=0, atol=1e-12)
    scores = ours.logit_scale * ours.encode_images(images) @ ours.encode_texts(texts).T
    torch.testing.assert_close(scores, out.logits_per_image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_features_equal_open_clips_own(tmp_path, kind):
    module = pytest.importorskip("open_clip.model", reason="open_clip_torch is not installed")
    vision = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    theirs = getattr(module, kind)(64, vision, text, quick_gelu=True).eval()
    torch.save(unlike(theirs).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"embed_dim": 64, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    ours = load_backbone(str(tmp_path), precision="fp64")
    theirs.double()
    texts, images = ["a photo of a cat.", "two very small dogs"], torch.randn(3, 3, 32, 32).double()
    with torch.no_grad():
        expected = theirs.encode_text(ours.tokenize(texts)), theirs.encode_image(images)
    torch.testing.assert_close(ours.encode_texts(texts), normalised(expected[0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.encode_images(images), normalised(expected[1]), rtol=0, atol=1e-12)


def test_a_clip_package_that_wants_design_details_gets_those_of_a_plain_clip(monkeypatch, tmp_path, weights, backbone):
    """As in MaPLe's, PromptSRC's and ProMetaR's checkouts."""
    module, seen = clip_module().model, []
    build, build_clip = module.build_model, module.CLIP

    def build_model(state_dict, design_details):
        seen.append(design_details)
        return build(state_dict)

    def clip(*shape, design_details):
        seen.append(design_details)
        return build_clip(*shape)

    torch.save(weights, tmp_path / "clip.pt")
    monkeypatch.setattr(module, "build_model", build_model)
    assert load_backbone(str(tmp_path / "clip.pt")).fingerprint == backbone.fingerprint
    monkeypatch.setattr(module, "CLIP", clip)
    assert load_backbone("random-tiny").fingerprint == backbone.fingerprint
    for details in seen:
        assert details["trainer"] == "CoOp" and details["vision_depth"] == details["language_depth"] == 0
    assert len(seen) == 2


@pytest.mark.parametrize("checkout", ["CoOp", "MaPLe", "PromptSRC", "ProMetaR"])
def test_features_are_the_same_with_a_checkouts_clip(checkout, backbone):
    folder = os.environ.get("GRAM_CHECKOUTS")
    if not folder or not os.path.isdir(os.path.join(folder, checkout, "clip")):
        pytest.skip(f"GRAM_CHECKOUTS names no folder with {checkout}/clip")
    code = (
        "import torch, clip; from gram_meta.backbone.clip import load_backbone; b = load_backbone('random-tiny');"
        "i = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32);"
        "print(clip.__file__); print(b.fingerprint);"
        "print(torch.cat([b.encode_images(i), b.encode_texts(['a cat', 'dogs'])]).flatten().tolist())"
    )
    place = os.path.join(folder, checkout)
    path = os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    where, fingerprint_there, numbers = done.stdout.strip().splitlines()[-3:]
    assert where.startswith(os.path.realpath(place)) or where.startswith(place)
    assert fingerprint_there == backbone.fingerprint
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    here = torch.cat([backbone.encode_images(images), backbone.encode_texts(["a cat", "dogs"])])
    torch.testing.assert_close(torch.tensor(json.loads(numbers)).view_as(here), here, rtol=0, atol=1e-6)


def test_tf32_is_float32_with_quick_products_and_any_other_precision_ends_it():
    switches = torch.backends.cuda.matmul, torch.backends.cudnn  # of matrix products, and of convolutions
    before = [one.allow_tf32 for one in switches]
    try:
        backbone = load_backbone("random-tiny", precision="tf32")
        assert all(one.allow_tf32 for one in switches) and backbone.dtype == torch.float32
        load_backbone("random-tiny")
        assert not any(one.allow_tf32 for one in switches)
    finally:
        for one, value in zip(switches, before, strict=True):
            one.allow_tf32 = value


@pytest.mark.parametrize("shape", ["tiny", "tiny-RN"])
def test_loading_leaves_the_random_numbers_that_clips_own_code_leaves(shape):
    """CLIP's own code draws weights before it loads them, and a checkout's trainer draws its prompt afterwards."""
    state = load_backbone(f"random-{shape}").model.state_dict()
    found = []
    for build in (lambda: clip_module().model.build_model(dict(state)), lambda: build_clip(clip_module(), state, "it")):
        torch.manual_seed(3)
        build()
        found.append(torch.rand(3))
    assert torch.equal(*found)
