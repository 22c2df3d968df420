"""A CLIP that does not fit is found by names and headers, before weights are loaded or downloaded."""

import pytest
import torch
from safetensors.torch import save_file

from gram_meta.backbone import clip as backbones
from gram_meta.backbone.clip import check_name, clip_module, load_backbone, sizes_of
from gram_meta.backbone.weights import empty_clip, read_sizes
from gram_meta.coop import launch
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.prompts import initial_prompts
from gram_meta.method.regulator import GradientRegulator

NO_WEIGHTS = "weights were loaded"


@pytest.fixture
def no_weights(monkeypatch):
    """Fail where weights are read, drawn or downloaded."""

    def refuse(*args, **kwargs):
        raise AssertionError(NO_WEIGHTS)

    for name in ("_state_dict_for", "_random_model", "build_clip"):
        monkeypatch.setattr(backbones, name, refuse)
    monkeypatch.setattr(clip_module().clip, "_download", refuse)


@pytest.fixture
def weights(tmp_path):
    """Headers of weights files: OpenAI's layout with ViT-B/16's widths, Hugging Face's with ViT-L/14's."""
    openai, hugging = tmp_path / "openai.safetensors", tmp_path / "hugging" / "model.safetensors"
    rows = {"token_embedding.weight": (3, 512), "visual.class_embedding": (768,), "text_projection": (512, 512)}
    save_file({name: torch.zeros(shape) for name, shape in rows.items()}, openai)
    hugging.parent.mkdir()
    (hugging.parent / "config.json").write_text('{"model_type": "clip"}')
    rows = {
        "text_model.embeddings.token_embedding.weight": (3, 768),
        "vision_model.embeddings.class_embedding": (1024,),
        "text_projection.weight": (768, 768),
    }
    save_file({name: torch.zeros(shape) for name, shape in rows.items()}, hugging)
    return str(openai), str(hugging.parent)


def test_widths_of_headers(weights, tmp_path):
    openai, hugging = weights
    assert read_sizes(tmp_path / "openai.safetensors") == {"text": 512, "visual": 768, "joint": 512}
    assert read_sizes(tmp_path / "hugging") == {"text": 768, "visual": 1024, "joint": 768}
    (tmp_path / "a.pt").write_bytes(b"anything")
    (tmp_path / "a.safetensors").write_bytes(b"anything")
    assert read_sizes(tmp_path / "a.pt") == read_sizes(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize("name", ["tiny", "tiny-RN"])
def test_sizes_of_whole_files(name, tmp_path):
    """Of each kind of file, whose numbers are never read."""
    state = load_backbone(f"random-{name}").model.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "clip.safetensors")
    sizes = {"text": 64, "joint": 64, "image": 32} | ({"visual": 64} if name == "tiny" else {})
    assert sizes_of(f"random-{name}") == sizes
    for file in ("plain.pt", "clip.safetensors"):
        assert sizes_of(str(tmp_path / file)) == sizes


def test_sizes_of_odd_files(tmp_path):
    """What has no size is left out; loading says what is wrong."""
    odd = {"text_projection": torch.zeros(()), "token_embedding.weight": torch.zeros(3)}
    odd |= {"visual.conv1.weight": torch.zeros(()), "visual.class_embedding": torch.zeros(5)}
    torch.save(odd | {"visual.positional_embedding": torch.zeros(0, 2)}, tmp_path / "odd.pt")
    assert sizes_of(str(tmp_path / "odd.pt")) == {"visual": 5}
    with pytest.raises(GramError, match="odd.pt: expected a whole CLIP of OpenAI's architecture, found"):
        load_backbone(str(tmp_path / "odd.pt"))


@pytest.mark.parametrize("name", backbones._SHAPES)
def test_sizes_of_names(name):
    with torch.device("meta"):
        model = empty_clip(clip_module(), *backbones._SHAPES[name])
    facts = {"joint": model.text_projection.shape[1], "image": model.visual.input_resolution}
    facts |= {"text": model.ln_final.weight.shape[0]}
    if not name.startswith(("RN", "tiny-RN")):
        facts["visual"] = model.visual.class_embedding.shape[0]
    assert sizes_of(name) == facts
    published = set(clip_module().clip._MODELS)
    assert published <= set(backbones._SHAPES)
    if name == "gram-small":
        assert {key: value.shape for key, value in load_backbone(name).model.state_dict().items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }


def test_what_shows_without_weights(weights, no_weights, tmp_path):
    openai, hugging = weights
    for made_with, name in (("ViT-B/16", "ViT-B/32"), ("gram-small", "ViT-B/16"), ("random-tiny", "gram-small")):
        with pytest.raises(GramError) as error:
            check_name("meta.safetensors", made_with, name, {})
        found = f"found {name!r}"
        assert str(error.value) == f"meta.safetensors: expected the backbone it was made with, {made_with}, {found}"
    for name, widths, words in (
        (openai, {"text": 768}, f"of text width 768, found {openai} of width 512"),
        (hugging, {"visual": 768}, f"of visual width 768, found {hugging} of width 1024"),
        ("ViT-L/14", {"joint": 512}, "of joint width 512, found ViT-L/14 of width 768"),
    ):
        with pytest.raises(GramError, match=f"expected the backbone it was made with, a/b.pt, {words}"):
            check_name("store", "a/b.pt", name, widths)
    (tmp_path / "a.pt").write_bytes(b"")
    for made_with, name in (
        ("ViT-B/16", openai),
        (openai, "ViT-B/16"),
        ("", "ViT-B/16"),
        ("RN50", str(tmp_path / "a.pt")),
    ):
        check_name("store", made_with, name, {"text": 512})  # only the weights can tell


@pytest.fixture
def meta(tmp_path):
    backbone = load_backbone("random-tiny")
    path = tmp_path / "best.safetensors"
    regulator = GradientRegulator({"text": backbone.text_width})
    prompts = initial_prompts(backbone, 4, 0, "a photo of a")
    save_meta_checkpoint(path, MetaCheckpoint(prompts, regulator, backbone.name, backbone.fingerprint))
    return path


def test_gram_train_compares_token_counts_before_it_loads_clip(meta, tiny_data, tiny_options, tmp_path, request):
    flags = ["--root", str(tiny_data), "--trainer", "CoOpGRAM", "--dataset-config-file", "emoji_food"]
    flags += ["--config-file", "gram_small_c4_ep10_batch32_ctxv1", "--output-dir", str(tmp_path / "out")]
    options = [*tiny_options, "TRAINER.GRAM.CHECKPOINT", str(meta), "DATASET.NUM_SHOTS", "1"]
    request.getfixturevalue("no_weights")
    for words, count in (("a photo", 2), ("", 3)):
        options += ["TRAINER.COOP.CTX_INIT", words, "TRAINER.COOP.N_CTX", "3"]
        with pytest.raises(GramError, match=rf"expected a text prompt of shape \({count}, 64\), found \(4, 64\)"):
            launch.train([*flags, *options], quiet=True)
    with pytest.raises(AssertionError, match=NO_WEIGHTS):  # with as many tokens as the file has, CLIP is loaded
        launch.train([*flags, *options, "TRAINER.COOP.N_CTX", "4"], quiet=True)


@pytest.mark.parametrize("name", ["gram-small", "ViT-B/16", "a file"])
def test_gram_train(meta, weights, tiny_data, tiny_options, tmp_path, name, request):
    tiny_options = list(tiny_options)
    tiny_options[tiny_options.index("MODEL.BACKBONE.NAME") + 1] = weights[0] if name == "a file" else name
    flags = ["--root", str(tiny_data), "--trainer", "CoOpGRAM", "--dataset-config-file", "emoji_food"]
    flags += ["--config-file", "gram_small_c4_ep10_batch32_ctxv1", "--output-dir", str(tmp_path / "out")]
    request.getfixturevalue("no_weights")
    with pytest.raises(GramError, match="best.safetensors: expected the backbone it was made with, random-tiny"):
        launch.train(
            [*flags, "TRAINER.GRAM.CHECKPOINT", str(meta), "DATASET.NUM_SHOTS", "1", *tiny_options], quiet=True
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["MODEL.BACKBONE.NAME", "ViT-B/16"], "INPUT.SIZE is (32, 32); ViT-B/16 expects (224, 224)"),
        (
            ["MODEL.BACKBONE.NAME", "RN50", "INPUT.SIZE", "(224, 224)"],
            "VPT: visual prompts expect a ViT image tower, found the ResNet RN50",
        ),
        (["MODEL.INIT_WEIGHTS", "nothing.pt"], "nothing.pt: MODEL.INIT_WEIGHTS expects a checkpoint"),
        (["MODEL.INIT_WEIGHTS", "{wide}"], "{wide}: expected the backbone it was made with, another CLIP, of visual"),
        (["--eval-only", "--model-dir", "{empty}"], "{empty}: expected prompt_learner/ in it"),
        (["--resume", "{empty}"], "--resume {empty}: expected prompt_learner/checkpoint in it"),
    ],
)
def test_gram_train_looks_at_everything_else_first(words, expected, tiny_data, tiny_options, tmp_path, request):
    places = {"empty": tmp_path / "empty", "wide": tmp_path / "wide.pt"}
    places["empty"].mkdir()
    torch.save({"state_dict": {"visual_ctx": torch.zeros(4, 768)}}, places["wide"])
    words = [word.format(**places) for word in words]
    flags = ["--root", str(tiny_data), "--trainer", "VPT", "--dataset-config-file", "emoji_food"]
    flags += ["--config-file", "gram_small_c4_ep10_batch32_ctxv1", "--output-dir", str(tmp_path / "out")]
    split = sum(2 if word.startswith("--") and word != "--eval-only" else word == "--eval-only" for word in words)
    flags += [*words[:split], "DATASET.NUM_SHOTS", "1", *tiny_options, *words[split:]]
    request.getfixturevalue("no_weights")
    with pytest.raises(GramError) as error:
        launch.train(flags, quiet=True)
    assert str(error.value).startswith(expected.format(**places))
    assert not (tmp_path / "out").exists()


def test_a_failed_download_names_the_way_to_a_local_file(monkeypatch):
    def fail(*args):
        raise OSError("no route to host")

    monkeypatch.setattr(clip_module().clip, "_download", fail)
    with pytest.raises(
        GramError, match="ViT-B/32: expected to download .* no route to host; .*MODEL.BACKBONE.NAME.*--backbone"
    ):
        load_backbone("ViT-B/32")


def test_gram_doctor_says_that_it_cannot_run(meta, no_weights, capsys, monkeypatch, tmp_path):
    """Where no meta-checkpoint of output/meta is for --backbone."""
    from gram_meta.tools import doctor

    (tmp_path / "output" / "meta").mkdir(parents=True)
    meta.rename(tmp_path / "output" / "meta" / "best.safetensors")
    monkeypatch.chdir(tmp_path)
    states = {}
    for name in ("ViT-B/16", "random-tiny", ""):
        states[name] = [check.state for check in doctor.check_meta(doctor.Environment(backbone=name))]
    assert states == {"ViT-B/16": ["note", "problem"], "random-tiny": ["fine"], "": ["fine"]}


def test_gram_doctor_loads_no_clip_that_its_meta_checkpoints_refuse(meta, weights, tmp_path, request):
    from gram_meta.tools import doctor

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"cut")
    request.getfixturevalue("no_weights")
    for name in ("gram-small", weights[0]):  # another name, and other widths
        (check,) = doctor.check_backbone(doctor.Environment(backbone=name, meta=[str(meta), str(broken)]))
        assert check.state == "note" and check.found.startswith(f"{name} is not loaded")
    for path in (meta, broken):  # one fits; a broken file does not say which CLIP it is for
        with pytest.raises(AssertionError, match=NO_WEIGHTS):
            list(doctor.check_backbone(doctor.Environment(backbone="random-tiny", meta=[str(path)])))
