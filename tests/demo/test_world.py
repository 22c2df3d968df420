"""The emoji world: what is kept apart stays apart, the same seed gives the same files, the packaged model loads."""

import csv
import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from gram_meta.demo import emoji, roles, styles, world
from gram_meta.demo.captions import STATED, Captioner, plural
from gram_meta.errors import GramError

pytestmark = pytest.mark.slow

_MISSING = emoji.missing_packages()
needs_drawings = pytest.mark.skipif(bool(_MISSING), reason=f"demo packages are not installed: {', '.join(_MISSING)}")


def the_recipe():
    """scripts/train_packaged_clip.py, as a module."""
    pytest.importorskip("torch")
    path = Path(__file__).resolve().parents[2] / "scripts" / "train_packaged_clip.py"
    spec = importlib.util.spec_from_file_location("train_packaged_clip", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


# --- roles ------------------------------------------------------------------------------------------------------------


def test_every_concept_has_one_role_and_names_are_unique():
    table = roles.roles()
    assert [role.concept for role in table] == list(emoji.concepts())
    assert len(table) > 1300
    for field in ("code", "name"):
        assert len({getattr(role.concept, field) for role in table}) == len(table)


def test_datasets_have_distinct_concepts_with_labels_in_order():
    codes = defaultdict(set)
    for name in roles.DATASETS:
        classes = roles.classes_of(name)
        assert [role.label for role in classes] == list(range(roles.CLASSES_PER_DATASET))
        codes[name] = {role.concept.code for role in classes}
        assert {role.concept.group for role in classes} <= set(roles.DATASETS[name])
    everything = set.union(*codes.values())
    assert len(everything) == roles.CLASSES_PER_DATASET * len(roles.DATASETS)


def test_datasets_show_no_style_that_clip_has_seen_their_concepts_in():
    for spec in world.SPECS.values():
        assert set(spec.look.styles) <= set(roles.RARE_STYLES)
    for spec in world.SHIFTS.values():
        assert set(spec.look.styles) == set(roles.HELD_STYLES)


@pytest.mark.parametrize("kind", ["styles", "grounds"])
def test_each_style_and_ground_of_a_dataset_is_in_the_corpus_and_in_another_dataset(kind):
    shown = {name: set(getattr(spec.look, kind)) for name, spec in world.SPECS.items()}
    for name, own in shown.items():
        assert own <= set(getattr(world.CORPUS_LOOK, kind))
        assert own <= set.union(*(other for key, other in shown.items() if key != name)), name


def test_clip_has_seen_all_drawings_of_every_concept():
    for role in roles.roles():
        assert sorted(role.seen) == sorted(role.concept.sources)
        if role.part != "teacher":
            assert len(role.seen) == 3  # meta and downstream concepts have the same sources


def test_parts_have_their_shares():
    able = {role.concept.group for role in roles.roles() if role.part != "teacher"}
    assert able == {group for groups in roles.DATASETS.values() for group in groups}
    for groups in roles.DATASETS.values():
        parts = [r.part for r in roles.roles() if r.concept.group in groups and roles._can_be_class(r.concept)]
        assert parts.count("teacher") == pytest.approx(0.25 * len(parts), abs=3)
        assert parts.count("meta") == len(parts) - parts.count("teacher") - roles.CLASSES_PER_DATASET
    assert sum(role.part == "meta" for role in roles.roles()) > 500


def test_downstream_sources_are_balanced():
    test_sources = [role.seen[2] for name in roles.DATASETS for role in roles.classes_of(name)]
    assert {source: test_sources.count(source) for source in emoji.SOURCES} == {
        source: len(test_sources) // 3 for source in emoji.SOURCES
    }


def test_close_relatives_are_in_one_part():
    part = {role.concept.name: role.part for role in roles.roles()}
    for names in (("cow", "cow face"), ("red apple", "green apple"), ("beer mug", "clinking beer mugs")):
        assert len({part[name] for name in names}) == 1, names
    words = defaultdict(set)
    for role in roles.roles():
        if role.part != "teacher":
            for word in roles._words(role.concept):
                dataset = next(name for name, groups in roles.DATASETS.items() if role.concept.group in groups)
                words[dataset, word].add(role.part)
    assert {word: parts for word, parts in words.items() if len(parts) > 1} == {}


def test_styles_of_training_and_held_styles_do_not_meet():
    groups = (roles.COMMON_STYLES, roles.RARE_STYLES, roles.HELD_STYLES)
    assert sorted(sum(groups, ())) == sorted(styles.STYLES)
    train_clip = the_recipe()
    held = set(roles.HELD_STYLES)
    assert not held & set(train_clip.FULL_LOOK.styles)
    assert not held & set(world.CORPUS_LOOK.styles)
    assert set(train_clip.SHY_LOOK.styles) == set(roles.COMMON_STYLES)
    assert set(train_clip.SHY_LOOK.grounds) == set(roles.PLAIN_GROUNDS)


@pytest.mark.parametrize("step", [3, 2599, 2700])  # patches dropped, whole pictures, crops
def test_batches_of_clip_do_not_depend_on_who_renders_them(step, monkeypatch):
    torch = pytest.importorskip("torch")
    train_clip = the_recipe()
    drawings = some_drawings()
    monkeypatch.setattr(train_clip, "load_drawings", lambda pairs, progress: drawings[np.arange(len(pairs)) % 5])
    recipe = train_clip.Recipe(steps=2600, batch=24, twins=8)
    pairs, tokens = train_clip.PretrainingPairs(recipe), train_clip.Tokens(train_clip.all_words(["fox"]))
    found = []
    for workers in (0, 2):
        batches = train_clip.Batches(pairs, tokens, worker=1)
        loader = train_clip.DataLoader(batches, batch_size=None, sampler=[step - 1, step], num_workers=workers)
        found.append(list(loader)[1])
    for here, there in zip(*found, strict=True):
        assert (here is None and there is None) or torch.equal(here, there)
    pictures, kept, rows, ends, left_out = found[0]
    assert pictures.shape == (24, 64, 64, 3) and rows.shape == (24, 20) and left_out.shape == (24, 24)
    assert (kept is None) == (step == 2599)


def test_clip_is_shown_rare_styles_and_textured_grounds_of_teachers_only(monkeypatch):
    """Neither the drawing nor its company in such a picture is a meta or downstream concept."""
    train_clip = the_recipe()
    blank = np.zeros((64, 64, 4), dtype=np.uint8)
    monkeypatch.setattr(train_clip, "load_drawings", lambda pairs, progress: np.stack([blank] * len(pairs)))
    scenes = []
    monkeypatch.setattr(train_clip, "render", lambda _, s: scenes.append(s) or np.zeros((len(s), 64, 64, 3), np.uint8))
    pairs = train_clip.PretrainingPairs(train_clip.Recipe())
    for step in (0, 1, 2, 3):
        pairs.batch(step)
        pairs.batch(step, worker=1)
    parts = np.array([role.part for role in roles.roles()])[pairs.concept]
    seen = set()
    for s in scenes:
        style, ground = np.array(styles.STYLES)[s.style], np.array(styles.GROUNDS)[s.ground]
        rare = np.isin(style, roles.RARE_STYLES) | np.isin(ground, roles.TEXTURED_GROUNDS)
        assert (parts[s.drawing[rare]] == "teacher").all()
        assert (parts[s.other[rare & (s.other >= 0)]] == "teacher").all()
        seen |= set(parts[s.drawing[~rare]])
    assert seen == {"teacher", "meta", *roles.DATASETS}


# --- pictures and captions --------------------------------------------------------------------------------------------


def some_scenes(n=64, seed=0, drawings=5):
    look = styles.Look(
        styles.even(styles.STYLES), styles.even(styles.GROUNDS), (0.6, 0.2, 0.2), (0.4, 0.3, 0.3), (0.4, 0.3, 0.3), 0.3
    )
    rng = np.random.default_rng(seed)
    return styles.sample_scenes(look, rng.integers(0, drawings, n), np.arange(drawings), rng)


def some_drawings(n=5):
    rng = np.random.default_rng(3)
    drawings = rng.integers(0, 256, (n, 64, 64, 4), dtype=np.uint8)
    drawings[:, :16, :, 3] = 0
    return drawings


def test_a_picture_does_not_depend_on_its_batch():
    scenes, drawings = some_scenes(), some_drawings()
    together = styles.render(drawings, scenes)
    assert together.shape == (64, 64, 64, 3) and together.dtype == np.uint8
    np.testing.assert_array_equal(together[10:13], styles.render(drawings, scenes[10:13]))
    np.testing.assert_array_equal(together, styles.render(drawings, some_scenes()))
    assert (together != styles.render(drawings, some_scenes(seed=1))).any()


@pytest.mark.parametrize("style", styles.STYLES)
def test_each_style_changes_the_picture(style):
    scenes, drawings = some_scenes(16), some_drawings()
    scenes.ground[:] = styles.GROUNDS.index("blue")
    scenes.style[:] = styles.STYLES.index("photo")
    plain = styles.render(drawings, scenes).astype(int)
    scenes.style[:] = styles.STYLES.index(style)
    other = styles.render(drawings, scenes).astype(int)
    changed = np.abs(plain - other).mean(axis=(1, 2, 3))
    assert (changed == 0).all() if style == "photo" else changed.mean() > 2 and (changed > 0.2).all()


def test_captions_state_facts_only():
    scenes = some_scenes(400)
    names = ["fox", "red apple", "bus", "crown", "violin"]
    captions, stated = Captioner(names, ["Objects"] * 5)(scenes, np.random.default_rng(1))
    assert stated.shape == (400, len(STATED))
    for i, caption in enumerate(captions):
        name = names[scenes.drawing[i]]
        assert name in caption.lower() or plural(name) in caption.lower()
    for column, key in enumerate(STATED):
        printed = stated[:, column] >= 0
        assert 0.02 < printed.mean() < 0.9, key
        np.testing.assert_array_equal(stated[printed, column], getattr(scenes, key)[printed])


def test_captions_that_are_also_true_are_found():
    train_clip = the_recipe()
    scenes = some_scenes(4)
    scenes.drawing[:] = [0, 1, 2, 0]
    scenes.style[:] = [0, 0, 0, 1]
    concept = np.array([7, 7, 8])  # drawings 0 and 1 are one concept from two sources
    stated = np.full((4, len(STATED)), -1)
    stated[0, 0] = 0  # caption 0 states its style: true of picture 1, not of picture 3
    found = train_clip.also_true(concept, scenes, stated)
    assert found.astype(int).tolist() == [[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return world.write_world(root, datasets=["animals"], corpus_size=200, progress=False)


@needs_drawings
def test_corpus_files(small_world):
    pairs, truth = rows_of(small_world["corpus"]), rows_of(small_world["truth"])
    assert list(pairs[0]) == ["image", "caption"] and list(truth[0]) == world.TRUTH_COLUMNS
    assert [row["image"] for row in pairs] == [row["image"] for row in truth]
    assert len(pairs) == 200
    for pair, true in zip(pairs, truth, strict=True):
        assert (small_world["corpus"].parent / pair["image"]).is_file()
        named = (
            true["concept"].lower() in pair["caption"].lower()
            or plural(true["concept"]).lower() in pair["caption"].lower()
        )
        assert named or true["caption_is_wrong"] == "1"
    assert sum(true["caption_is_wrong"] == "1" for true in truth) == round(200 * world.WRONG_CAPTIONS)


@needs_drawings
def test_meta_corpus_and_datasets_share_no_concept(small_world):
    corpus = {row["code"] for row in rows_of(small_world["truth"])}
    assert corpus and corpus <= {role.concept.code for role in roles.roles() if role.part == "meta"}


@needs_drawings
def test_dataset_files(small_world):
    folder = small_world["animals"]
    split = json.loads((folder / "split_zhou_EmojiAnimals.json").read_text())
    truth = {row["image"]: row for row in rows_of(folder / "truth.tsv")}
    names = [role.concept.name for role in roles.classes_of("animals")]
    drawings = {}
    for key, rows in split.items():
        assert all((folder / "images" / path).is_file() for path, _, _ in rows)
        assert all(names[label] == name for _, label, name in rows)
        drawings[key] = {(truth[f"images/{path}"]["code"], truth[f"images/{path}"]["source"]) for path, _, _ in rows}
    counts = {key: np.bincount([label for _, label, _ in rows]) for key, rows in split.items()}
    assert counts["train"].min() >= 16 and counts["val"].min() >= 4
    half = len(names) // 2
    assert min(counts["test"][:half].sum(), counts["test"][half:].sum()) >= 1000
    assert not drawings["test"] & (drawings["train"] | drawings["val"])
    looks = {(row["style"], row["ground"]) for row in truth.values()}
    assert not {style for style, _ in looks} & set(roles.COMMON_STYLES)  # CLIP has not seen the drawings in these


@needs_drawings
def test_same_recipe_same_files_and_nothing_is_written_twice(small_world, tmp_path):
    again = world.write_world(tmp_path, datasets=[], corpus_size=200, progress=False)
    for key in ("corpus", "truth"):
        assert again[key].read_bytes() == small_world[key].read_bytes()
    pictures = sorted((again["corpus"].parent / "images").iterdir())
    assert [p.read_bytes() for p in pictures] == [
        (small_world["corpus"].parent / "images" / p.name).read_bytes() for p in pictures
    ]
    before = [p.stat().st_mtime_ns for p in pictures]
    pictures[0].touch()
    world.write_world(tmp_path, datasets=[], corpus_size=200, progress=False)
    assert [p.stat().st_mtime_ns for p in pictures][1:] == before[1:] and pictures[0].exists()
    world.write_world(tmp_path, datasets=[], corpus_size=100, progress=False)  # another recipe takes its place
    assert len(rows_of(again["corpus"])) == 100
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@needs_drawings
def test_drawings_are_square_and_not_empty():
    fox = next(c for c in emoji.concepts() if c.name == "fox")
    seen = [emoji.drawing(fox, source) for source in emoji.SOURCES]
    for one in seen:
        assert one.shape == (64, 64, 4) and 0.1 < (one[..., 3] > 128).mean() < 0.95
    assert np.abs(seen[0].astype(int) - seen[1]).mean() > 5


def test_bad_requests_are_one_sentence(tmp_path):
    with pytest.raises(GramError, match="'birds' is no dataset"):
        world.write_world(tmp_path, datasets=["birds"])
    with pytest.raises(GramError, match="source must be one of"):
        emoji.drawing(emoji.concepts()[0], "left") if not _MISSING else (_ for _ in ()).throw(
            GramError("source must be one of")
        )


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setattr(emoji, "missing_packages", lambda: ["resvg-py"])
    with pytest.raises(GramError, match=r'resvg-py.*pip install "gram-meta\[demo\]"'):
        emoji.require_packages()


# --- the packaged model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packaged():
    pytest.importorskip("torch")
    from gram_meta.backbone import packaged as packaged_clip

    assert packaged_clip.weights_path().is_file()  # they travel in the repository
    return packaged_clip


def test_packaged_weights_are_small_and_load_into_openai_code(packaged):
    torch = pytest.importorskip("torch")
    build_model = pytest.importorskip("clip.model").build_model
    assert packaged.weights_path().stat().st_size <= 16 * 2**20
    state = packaged.load_packaged_state_dict()
    assert state["token_embedding.weight"].shape == (packaged.VOCABULARY, 128)
    assert all(torch.isfinite(tensor.float()).all() for tensor in state.values())
    model = build_model(dict(state)).float()
    assert model.visual.input_resolution == 64 and model.context_length == 77
    with torch.no_grad():
        features = model.encode_image(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, 128)


def test_token_embeddings_have_the_size_that_prompt_learning_is_made_for(packaged):
    table = packaged.load_packaged_state_dict()["token_embedding.weight"]
    trained = table[(table - table.mean(0)).abs().sum(1) > 1e-3]  # the other rows are all the same
    assert 0.015 < trained.std() < 0.025


def test_shrinking_the_text_stream_changes_no_feature():
    torch = pytest.importorskip("torch")
    train_clip = the_recipe()
    recipe = train_clip.Recipe(text_layers=2, vision_layers=1)
    model = train_clip.new_model(recipe, 50)
    with torch.no_grad():
        model.token_embedding.weight.mul_(10)
    rows, ends = torch.randint(0, 50, (3, 9)), torch.tensor([4, 8, 6])
    with torch.no_grad():
        before = train_clip.encode_text(model, rows, ends)
        model.load_state_dict(train_clip.shrink_text_stream(model.state_dict(), std=0.1))
        after = train_clip.encode_text(model, rows, ends)
    torch.testing.assert_close(before, after, atol=0.02, rtol=0.02)


def test_untrained_tokens_are_named(packaged):
    assert packaged.untrained_tokens(["a photo of a fox.", "X X X X red apple."]) == {}
    assert packaged.untrained_tokens(["a photo of a zeppelin"])["a photo of a zeppelin"]


def training_of(path):
    """How packaged weights were made: the recipe, the steps, the division of concepts."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, framework="np") as file:
        return json.loads(file.metadata()["training"])


def test_packaged_model_was_trained_on_this_division_of_concepts(packaged):
    assert training_of(packaged.weights_path())["roles"] == roles.roles_hash()


def test_save_and_load_round_trip(tmp_path):
    torch = pytest.importorskip("torch")
    from gram_meta.backbone import packaged as packaged_clip

    model = {
        "token_embedding.weight": torch.randn(3, 4),
        "logit_scale": torch.tensor(3.25),
        "visual.proj": torch.randn(4, 4),
    }
    path = tmp_path / "small.safetensors"
    packaged_clip.save_packaged(model, np.array([5, 9, 40_000]), path, {"step": 7})
    state = packaged_clip.load_packaged_state_dict(path)
    torch.testing.assert_close(
        state["token_embedding.weight"][[5, 9, 40_000]], model["token_embedding.weight"], atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(
        state["token_embedding.weight"][6], model["token_embedding.weight"].mean(0), atol=1e-3, rtol=1e-3
    )
    assert state["logit_scale"].item() == 3.25 and training_of(path) == {"step": 7}
    (tmp_path / "other.safetensors").write_bytes(path.read_bytes().replace(b"gram-small-1", b"gram-small-9"))
    with pytest.raises(GramError, match="expected weights in the format gram-small-1, found 'gram-small-9'"):
        packaged_clip.load_packaged_state_dict(tmp_path / "other.safetensors")
    with pytest.raises(GramError, match="found nothing there"):
        packaged_clip.load_packaged_state_dict(tmp_path / "none.safetensors")


@pytest.mark.parametrize("folder", ["corpus", "emoji_animals", ".emoji_animals.part"])
def test_other_files_are_refused_and_kept(folder, tmp_path):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "thesis.txt").write_text("two years")
    size = 10 if folder == "corpus" else 0
    with pytest.raises(GramError, match=f"{folder}: expected nothing there, or what this run made, found other files"):
        world.write_world(tmp_path, datasets=["animals"], corpus_size=size, progress=False)
    assert [path.name for path in tmp_path.rglob("*")] == [folder, "thesis.txt"]
