"""CLIP as an object of transformers, open_clip or clip: equal features, shared weights, and what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers.corpora import write_pairs

import gram_meta as gram
from gram_meta.backbone.clip import clip_module, fingerprint, load_backbone
from gram_meta.backbone.second_order import twice_differentiable
from gram_meta.errors import GramError
from gram_meta.method.prompts import initial_prompts

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
open_clip = pytest.importorskip("open_clip.model", reason="open_clip_torch is not installed")

TEXTS = ["a photo of a cat.", "two very small dogs on a blue mat"]
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VISION = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
EPS = {"norm_kwargs": {"eps": 1e-6}}


def unlike(model):
    """Every parameter moved at random: fresh layer norms are all alike, and mixing them up would go unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def of_transformers(act="quick_gelu", width=64, **text):
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"hidden_act": act, "layer_norm_eps": 1e-6}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config={**tower, **text}, vision_config=vision, projection_dim=32)
    return unlike(transformers.CLIPModel(config)).train()


def of_open_clip(kind="CLIP", vision=(), text=(), **options):
    vision, text = {**VISION, **dict(vision)}, {**TEXT, **dict(text)}
    return unlike(getattr(open_clip, kind)(32, vision, text, **options)).train()


def features(model, tokens, images):
    """What the model itself computes, L2-normalised."""
    with torch.no_grad():
        if isinstance(model, transformers.CLIPModel):
            out = model.eval()(input_ids=tokens, pixel_values=images)
            return out.image_embeds, out.text_embeds, out.logits_per_image
        one, two = (
            F.normalize(f(x), dim=-1) for f, x in ((model.eval().encode_image, images), (model.encode_text, tokens))
        )
        return one, two, model.logit_scale.exp() * one @ two.T


MODELS = {
    "transformers": of_transformers,
    "transformers, gelu": lambda: of_transformers("gelu"),
    "open_clip": lambda: of_open_clip(quick_gelu=True),
    "open_clip, gelu, eps": lambda: of_open_clip(vision=EPS, text=EPS, init_logit_bias=-10.0),
    "open_clip, custom text": lambda: of_open_clip("CustomTextCLIP"),
    "open_clip, read at its end token": lambda: of_open_clip(text={"pool_type": "eos", "eos_id": 49407}),
    "open_clip, longer texts": lambda: of_open_clip(text={"context_length": 99, "vocab_size": 49410}),
    "open_clip, ResNet": lambda: of_open_clip(vision={"layers": (1, 1, 1, 1), "width": 8, "head_width": 64}),
    "open_clip, ResNet of other heads": lambda: of_open_clip(vision={"layers": (1, 1, 1, 1), "width": 8}),
    "open_clip, mean of patches": lambda: of_open_clip(vision={"pool_type": "avg"}),
    "open_clip, layer scale": lambda: of_open_clip(vision={"ls_init_value": 0.1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_and_logits_equal_the_models_own(name):
    model, images = MODELS[name](), torch.randn(3, 3, 32, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ours = load_backbone(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    tokens = ours.tokenize(TEXTS)
    expected = features(model, tokens, images)
    prompted = gram.PromptedCLIP(model, ["cat", "dog"], initial_prompts(ours, 4, 0, "a photo of a"))
    found = ours.encode_images(images), ours.encode_texts(TEXTS)
    for ours_, theirs in zip((*found, ours.logit_scale * found[0] @ found[1].T), expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        tokens = ours.tokenize([f"a photo of a {name}." for name in ("cat", "dog")])
        torch.testing.assert_close(prompted(images), features(model, tokens, images)[2], rtol=1e-5, atol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ["transformers, gelu", "open_clip", "open_clip, layer scale"])
def test_weights_are_shared_where_they_can_be(name):
    model = MODELS[name]()
    theirs = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    copied = [key for key, value in load_backbone(model).model.state_dict().items()
              if value.untyped_storage().data_ptr() not in theirs]  # fmt: skip
    assert all("attn.in_proj_" in key for key in copied) and bool(copied) == name.startswith("transformers")


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_gradients_of_prompts_equal_those_through_transformers(act):
    """Of the text prompt through its tower, in float64; and of a gradient, for meta-training."""
    model = of_transformers(act).double().eval()
    ours = load_backbone(model)
    assert ours.precision == "fp64" and ours.design.text.activation == act and ours.design.text.head == 32
    prompt = initial_prompts(ours, 4, 0, "a photo of a")["text"].double()
    tokens, targets = ours.tokenize(["a photo of a cat.", "a photo of a dog."]), torch.tensor([0, 1, 0])
    images = torch.randn(3, 3, 32, 32).double()

    def through_theirs(prompt):
        rows = torch.cat([table.weight[tokens[:, :1]], prompt.expand(2, -1, -1), table.weight[tokens[:, 5:]]], 1)
        hook = table.register_forward_hook(lambda *_: rows)
        out = model(input_ids=tokens, pixel_values=images)
        hook.remove()
        return F.cross_entropy(out.logits_per_image, targets)

    def through_ours(prompt):
        classes = gram.PromptedCLIP(ours, ["cat", "dog"], {"text": prompt}).class_text
        return F.cross_entropy(ours.logit_scale * ours.encode_images(images) @ classes.features(prompt).T, targets)

    table = model.text_model.embeddings.token_embedding
    gradients = []
    with twice_differentiable():
        for loss in (through_theirs, through_ours):
            x = prompt.detach().requires_grad_()
            (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
            gradients.append((first.detach(), second))
    for theirs, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-9)


def test_visual_prompts_learn_through_a_gelu_tower():
    """A visual prompt has a gradient as by finite differences, in float64."""
    ours = load_backbone(of_open_clip().double())
    images, prompt = torch.randn(2, 3, 32, 32).double(), torch.randn(2, 64).double().requires_grad_()
    target = torch.randn(2, 32).double()
    assert torch.autograd.gradcheck(lambda p: (ours.encode_images(images, p) * target).sum(), prompt, atol=1e-6)
    with twice_differentiable():
        assert torch.autograd.gradgradcheck(
            lambda p: (ours.encode_images(images, p) * target).sum(), prompt, atol=1e-5, fast_mode=True
        )
    torch.testing.assert_close(ours.encode_images(images, prompt[:0]), ours.encode_images(images))


def test_an_object_is_the_clip_of_its_file(tmp_path):
    """Equal fingerprints: prompts of one serve the other. The activation belongs to the fingerprint."""
    ours = of_transformers("gelu")
    ours.save_pretrained(tmp_path / "hf")
    assert load_backbone(ours).fingerprint == load_backbone(str(tmp_path / "hf")).fingerprint
    again = transformers.CLIPModel.from_pretrained(str(tmp_path / "hf"))
    assert load_backbone(again).name == str(tmp_path / "hf")
    other = of_transformers()
    other.load_state_dict(ours.state_dict())
    assert load_backbone(other).fingerprint != load_backbone(ours).fingerprint
    theirs = of_open_clip(vision=EPS, text=EPS)
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"vision_cfg": VISION | EPS, "text_cfg": TEXT | EPS}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert load_backbone(theirs).fingerprint == load_backbone(str(tmp_path)).fingerprint
    random = load_backbone("random-tiny")
    same = load_backbone(random.model)
    assert same.name == "clip.CLIP" and same.fingerprint == random.fingerprint == fingerprint(random.model.state_dict())
    assert load_backbone(same) is same and isinstance(random.model, clip_module().model.CLIP)


def test_pixel_statistics_belong_to_the_backbone(tmp_path):
    model = of_open_clip(quick_gelu=True)
    plain = load_backbone(model)
    model.visual.image_mean, model.visual.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    ours = load_backbone(model)
    assert ours.fingerprint != plain.fingerprint and ours.design.mean == (0.5, 0.5, 0.5)
    bytes_ = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    torch.testing.assert_close(ours.normalise(bytes_), torch.full((1, 3, 32, 32), 2.0))
    from PIL import Image

    torch.testing.assert_close(ours.preprocess()(Image.new("RGB", (40, 40), "white")), torch.full((3, 32, 32), 2.0))


def test_precision_and_device_are_the_models_own():
    model = of_transformers().half()
    assert load_backbone(model).precision == "fp16" and load_backbone(model, precision="fp32").dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float16
    with pytest.raises(GramError, match="precision: expected one of"):
        load_backbone(model, precision="fp8")


@pytest.mark.slow
def test_eva_serves_text_prompts_alone():
    """EVA-02: rotary positions, SwiGLU and norms inside its layers; the tower is called as it is."""
    vision = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "image_size": 224}
    model = of_open_clip(vision=vision)
    ours, images = load_backbone(model), torch.randn(1, 3, 224, 224)
    expected = features(model, ours.tokenize(TEXTS), images)
    torch.testing.assert_close(ours.encode_images(images), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encode_texts(TEXTS), expected[1], rtol=1e-5, atol=1e-5)
    assert not ours.is_vit and ours.image_size == 224
    for call in (lambda: initial_prompts(ours, 0, 2), lambda: ours.encode_images(images, torch.zeros(2, 64))):
        with pytest.raises(
            GramError, match="visual prompts: expected a ViT image tower of OpenAI's kind, found open_cl"
        ):
            call()


def siglip():
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=tower, vision_config=vision))


REFUSED = {
    "a transformers.CLIPModel, or a CLIP of .*, found transformers.SiglipModel, whose text tower is not causal": siglip,
    "found torch.Linear": lambda: torch.nn.Linear(1, 1),
    "transformers.CLIPModel: expected an activation of text_config of quick_gelu or gelu, found gelu_new":
        lambda: of_transformers("gelu_new"),
    "width of text_config that 64 and its heads divide, found 96 with 2": lambda: of_transformers(width=96),
    "expected text_config.eos_token_id 49407, .* found 5": lambda: of_transformers(eos_token_id=5),
    "expected 49408 tokens of CLIP's tokenizer, found 60": lambda: of_open_clip(text={"vocab_size": 60}),
    "found one that is not causal, such as SigLIP's": lambda: of_open_clip(text={"no_causal_mask": True}),
    "found one that is read at 'last', not at the end": lambda: of_open_clip(text={"pool_type": "last"}),
    "found one whose projection has a bias, or none": lambda: of_open_clip(text={"proj_bias": True}),
    "found layers with scales, norms or activations of their own": lambda: of_open_clip(text={"ls_init_value": 0.1}),
    "norms or activations of their own": lambda: of_open_clip(text={"act_kwargs": {"approximate": "tanh"}}),
    "activations of their own": lambda: of_open_clip(text={"qk_norm": True}),
    'Unexpected key.*"cls_emb"': lambda: of_open_clip("CustomTextCLIP", text={"embed_cls": True}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_another_architecture_is_one_sentence(sentence):
    with pytest.raises(GramError, match=sentence) as caught:
        load_backbone(REFUSED[sentence]())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_meta_training_with_a_model(tmp_path, monkeypatch):
    """`embed`, `pretrain` and `evaluate` take it; its meta-checkpoint serves it, and no other."""
    write_pairs(tmp_path)
    model, quiet = of_open_clip(), {"progress": False}
    store = gram.embed(tmp_path / "pairs.tsv", tmp_path / "store", backbone=model, sentence_model="hash:64", **quiet)
    assert store.manifest["settings"]["clip"]["name"] == "open_clip.CLIP"
    opts = {"CHC.TOPICS.REDUCTION": "pca", "CHC.TOPICS.MIN_CLUSTER_SIZE": 8, "CHC.DOMAINS.K": 2, "TASKS.WAYS": 2}
    opts |= {"TASKS.SUPPORT_SHOTS": 2, "TASKS.QUERY_SHOTS": 4, "TASKS.HELD_OUT": 0.4, "OUTER.BATCH": 2}
    opts |= {"EVAL.EVERY": 2, "EVAL.TASKS": 4, "OUTER.STEPS": 2}
    hierarchy = gram.cluster(store, tmp_path / "hierarchy", opts=opts, **quiet)
    meta = gram.pretrain(store, hierarchy, tmp_path / "meta", opts=opts, backbone=model, **quiet)
    assert meta.backbone_name == "open_clip.CLIP" and meta.backbone_fingerprint == load_backbone(model).fingerprint
    shown = gram.evaluate(meta, store, hierarchy, tasks=2, steps=[0, 1], backbone=model, **quiet)
    assert [cell.steps for cell in shown.lines[0].cells] == [0, 1]
    classifier = gram.GramClassifier(model, meta, epochs=1, progress=False)
    classifier.fit([tmp_path / "0.png", tmp_path / "1.png"], ["cat", "dog"])
    with pytest.raises(GramError, match="expected the backbone it was made with"):
        classifier.set_params(backbone=of_open_clip(quick_gelu=True)).fit([tmp_path / "0.png"] * 2, ["cat", "dog"])
    with pytest.raises(GramError, match="store: expected the backbone it was made with, open_clip.CLIP"):
        gram.pretrain(store, hierarchy, tmp_path / "other", opts=opts, backbone=of_transformers(), **quiet)
