"""The store: what it holds, interruptions at any point, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gram_meta import files, images, locks
from gram_meta.backbone.clip import load_backbone
from gram_meta.cli import main
from gram_meta.corpus import places
from gram_meta.corpus.embedding import run as embedding
from gram_meta.corpus.embedding.parts import fit_text, tokens_of
from gram_meta.corpus.embedding.run import embed_pairs
from gram_meta.corpus.embedding.sentences import load_sentence_model
from gram_meta.corpus.places import ImageReader
from gram_meta.corpus.sources import all_rows, open_source
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import write_json

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting_for_the_disk")

WORDS = ["red", "green", "blue", "dog", "cat", "bird", "on", "under", "beside", "house", "tree", "road"]
ROOT = Path(embedding.__file__).parents[2]


@pytest.fixture(scope="module")
def sentence_model():
    return load_sentence_model("hash:16")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """40 images with one to three captions each, not all of an image side by side; every fifth image is
    unusable."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    lines = []
    for number in range(40):
        path = folder / f"{number:02d}.png"
        if number % 5 != 4:
            Image.fromarray(random.integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(path)
        elif number % 10 == 4:
            path.write_bytes(b"")
        for _ in range(1 + number % 3):
            lines.append(f"{path.name}\t{' '.join(random.choice(WORDS, 5))}")
    lines += [f"{number:02d}.png\ta late caption of {number}" for number in range(0, 40, 3)]
    lines.insert(7, "00.png\t")
    (folder / "pairs.tsv").write_text("\n".join(["image\tcaption", *lines]) + "\n")
    return folder / "pairs.tsv"


@pytest.fixture(scope="module")
def store(one_thread, corpus, backbone, sentence_model, tmp_path_factory):
    """An undisturbed run, in parts of 10 pairs."""
    out = tmp_path_factory.mktemp("stores") / "undisturbed"
    return embed_pairs(corpus, out, backbone, sentence_model, batch_size=4, part_size=10)


def contents(folder):
    """All files that make up a store, byte for byte."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


# --- what it holds ------------------------------------------------------------------------------------------


def test_pairs_are_those_of_the_source_in_its_order(store, corpus):
    usable = [
        (row.location, row.caption)
        for row in all_rows(open_source(corpus))
        if not row.skip and int(row.location[:2]) % 5 != 4
    ]
    assert [store.locations[row] for row in store.image] == [location for location, _ in usable]
    assert list(store.captions) == [caption for _, caption in usable]
    assert list(store.locations) == [f"{number:02d}.png" for number in range(40) if number % 5 != 4]
    assert store.captions[3:7] == list(store.captions)[3:7] and store.captions[-1] == usable[-1][1]
    assert store.captions.take([5, 2]) == [store.captions[5], store.captions[2]]
    assert len(store) == len(usable)


def test_features_are_those_of_the_towers(store, backbone, sentence_model):
    transform = backbone.preprocess()
    pixels = [transform(Image.open(store.image_root / store.locations[row]).convert("RGB")) for row in (0, 13, 31)]
    for row, image in zip((0, 13, 31), pixels, strict=True):
        expected = backbone.encode_images(image[None])[0].numpy()
        assert np.allclose(store.image_features[row], expected, atol=1e-3)
    texts = backbone.encode_texts(list(store.captions)).numpy()
    cosine = (store.image_features[store.image].astype(np.float32) * texts).sum(1)
    assert np.allclose(store.similarity, cosine, atol=2e-3)
    assert np.allclose(store.sentence_features, sentence_model.encode(list(store.captions)), atol=1e-3)
    assert store.image_features.dtype == store.sentence_features.dtype == np.float16
    assert store.similarity.dtype == np.float32
    assert isinstance(store.image_features, np.memmap)


def test_everything_skipped_is_counted(store):
    counts, skipped = store.manifest["counts"], store.manifest["skipped"]
    assert skipped["empty caption"] == 1
    assert store.manifest["skipped_images"] == {images.EMPTY: 4, images.MISSING: 4}
    assert counts["images"] == 32 and counts["pairs"] == len(store)
    assert counts["pairs"] + sum(skipped.values()) == counts["rows"]
    assert sorted(path.name for path in store.path.iterdir()) == [
        "captions.parquet",
        "image_features.npy",
        "images.parquet",
        "manifest.json",
        "sentence_features.npy",
        "similarity.npy",
    ]


def test_workers_change_nothing(store, corpus, backbone, sentence_model, tmp_path):
    embed_pairs(corpus, tmp_path / "s", backbone, sentence_model, batch_size=4, part_size=10, workers=2)
    assert contents(tmp_path / "s") == contents(store.path)


def test_long_captions_are_shortened_not_lost(backbone, tmp_path):
    texts = ["a dog", "a very long story " * 60, "x" * 3000]
    fitted = [fit_text(backbone, text) for text in texts]
    assert fitted[0] == "a dog" and tokens_of(backbone, texts)[1] == texts[1:]
    backbone.tokenize(fitted)
    for text, cut in zip(texts[1:], fitted[1:], strict=True):
        assert text.startswith(cut)
        with pytest.raises(GramError):
            backbone.tokenize([text[: len(cut) + 8]])


def test_features_that_are_not_finite_are_skipped(corpus, backbone, sentence_model, tmp_path, monkeypatch):
    encode = backbone.encode_images

    def broken(pixels):
        features = encode(pixels)
        features[0] = float("nan")
        return features

    monkeypatch.setattr(backbone, "encode_images", broken)
    store = embed_pairs(corpus, tmp_path / "s", backbone, sentence_model, batch_size=20, part_size=1000)
    assert store.manifest["skipped_images"][places.NOT_FINITE] == 2
    assert np.isfinite(store.image_features).all() and np.isfinite(store.similarity).all()
    counts = store.manifest["counts"]
    assert counts["pairs"] + sum(store.manifest["skipped"].values()) == counts["rows"]


# --- interruptions ------------------------------------------------------------------------------------------


class Dying:
    """`os.replace`, the last act of every write, that dies at its `at`-th call: before it happens, or right
    after."""

    def __init__(self, at, after):
        self.at, self.after, self.count, self.replace = at, after, 0, os.replace

    def __call__(self, source, target):
        self.count += 1
        if self.count == self.at and not self.after:
            raise KeyboardInterrupt
        self.replace(source, target)
        if self.count == self.at:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_interruptions_while_parts_are_made_change_nothing(
    store, corpus, backbone, sentence_model, tmp_path, monkeypatch, after
):
    """The run dies at each of its writes in turn, up to the last part; then the same call finishes it."""
    run = partial(embed_pairs, corpus, tmp_path / "s", backbone, sentence_model, batch_size=4, part_size=10)
    deaths = 0
    while deaths < 20 and not (tmp_path / "s" / "parts" / "000007.npz").exists():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            planned = (tmp_path / "s" / "parts" / "plan.json").exists() or not (tmp_path / "s").exists()
            writes = 1 if planned else 3  # what of the index is not counted as made is made again
            patch.setattr(os, "replace", Dying(writes + (not after), after))
            run()
        deaths += 1
        with pytest.raises(GramError, match="found an unfinished one"):
            PairStore.open(tmp_path / "s")
    assert deaths == 2 + 8  # manifest, index with its plan, and eight parts
    run()
    assert contents(tmp_path / "s") == contents(store.path)


@pytest.fixture(scope="module")
def all_parts(corpus, backbone, sentence_model, tmp_path_factory):
    """A run that died when its parts were ready and nothing was joined yet."""
    out = tmp_path_factory.mktemp("stores") / "parts"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", Dying(13, after=False))
        embed_pairs(corpus, out, backbone, sentence_model, batch_size=4, part_size=10)
    return out


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 7))
def test_interruptions_while_parts_are_joined_change_nothing(
    store, all_parts, corpus, backbone, sentence_model, tmp_path, monkeypatch, at, after
):
    run = partial(embed_pairs, corpus, tmp_path / "s", backbone, sentence_model, batch_size=4, part_size=10)
    shutil.copytree(all_parts, tmp_path / "s")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", Dying(at, after))
        run()
    run()
    assert contents(tmp_path / "s") == contents(store.path)
    assert not (tmp_path / "s" / "parts").exists()


def test_a_damaged_part_is_one_sentence(all_parts, corpus, backbone, sentence_model, tmp_path):
    shutil.copytree(all_parts, tmp_path / "s")
    part = tmp_path / "s" / "parts" / "000003.npz"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(GramError, match="000003.npz: expected a part of the store, .*; delete it and run"):
        embed_pairs(corpus, tmp_path / "s", backbone, sentence_model, batch_size=4, part_size=10)


def command(corpus, out):
    options = ["--backbone", "random-tiny", "--sentence-model", "hash:16", "--batch-size", "4", "--part-size", "10"]
    return ["embed", str(corpus), "-o", str(out), *options]


def start(corpus, out, workers=0):
    """`gram embed` in a process of its own that takes its time over every image."""
    code = (
        "import sys, time; from gram_meta.corpus.places import ImageReader; from gram_meta.cli import main\n"
        "read = ImageReader.image\n"
        "def slow(self, place): time.sleep(0.02); return read(self, place)\n"
        "ImageReader.image = slow\n"
        f"sys.exit(main({[*command(corpus, out), '--workers', str(workers)]!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_second_one_is_refused(store, corpus, backbone, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.05)
    out = tmp_path / "s"
    process = start(corpus, out, workers=1)
    try:
        deadline = time.monotonic() + 300
        while len(list((out / "parts").glob("0*.npz"))) < 2:  # well inside
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.005)
        assert main(command(corpus, out)) == 2
        assert "another run is writing to this folder" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    done = len(list((out / "parts").glob("0*.npz")))
    assert 2 <= done < 8
    (out / "parts" / ".000007.npz.abc.part").write_bytes(b"half")  # as a kill in the middle of a write leaves it
    assert main(command(corpus, out)) == 0
    expected = contents(store.path)
    assert contents(out) == expected
    assert main(command(corpus, out)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert contents(out) == expected
    (out / "parts").mkdir()  # as a kill after the last file of the store leaves them
    (out / locks.LOCK).touch()
    assert main(command(corpus, out)) == 0
    assert contents(out) == expected and not (out / "parts").exists()


def test_a_dead_image_worker_is_one_sentence_and_costs_nothing(
    store, corpus, backbone, sentence_model, tmp_path, monkeypatch
):
    run = partial(embed_pairs, corpus, tmp_path / "s", backbone, sentence_model, batch_size=4, part_size=10)
    read = ImageReader.image

    def dying(self, place):
        if place.location == "21.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "image", dying)
        with pytest.raises(GramError, match="a worker process died .* run the same command again"):
            run(workers=1)
    run(workers=1)
    assert contents(tmp_path / "s") == contents(store.path)


def test_a_full_disk_is_one_sentence_and_costs_nothing(store, corpus, backbone, sentence_model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    run = partial(embed_pairs, corpus, tmp_path / "s", backbone, sentence_model, batch_size=4, part_size=10)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(GramError, match=r"cannot be written \(No space left on device\)"):
            run()
    run()
    assert contents(tmp_path / "s") == contents(store.path)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 5}, "was begun with batch size 4, expected the same, found 5"),
        ({"part_size": 11}, "part size 10, .* found 11"),
        ({"sentence_model": "hash:17"}, "sentence model name 'hash:16', .* found 'hash:17'"),
        ({"backbone": "random-tiny-RN"}, "clip name 'random-tiny', .* found 'random-tiny-RN'"),
        ({"caption_column": "caption"}, "source caption column None, .* found 'caption'"),
    ],
)
def test_other_settings_are_refused(store, corpus, changed, words):
    settings = {"batch_size": 4, "part_size": 10, "sentence_model": "hash:16", "backbone": "random-tiny", **changed}
    source = open_source(corpus, caption_column=settings.pop("caption_column", None))
    backbone = load_backbone(settings.pop("backbone"))
    model = load_sentence_model(settings.pop("sentence_model"))
    with pytest.raises(GramError, match=words):
        embed_pairs(source, store.path, backbone, model, **settings)


def test_a_changed_source_is_refused(store, corpus, backbone, sentence_model, tmp_path):
    (tmp_path / "pairs.tsv").write_text("image\tcaption\na.png\ta dog\n")
    (tmp_path / "pairs.tsv").with_name("a.png").write_bytes(images_png())
    embed_pairs(tmp_path / "pairs.tsv", tmp_path / "s", backbone, sentence_model)
    (tmp_path / "pairs.tsv").write_text("image\tcaption\na.png\ta cat\n")
    with pytest.raises(GramError, match="source sha256"):
        embed_pairs(tmp_path / "pairs.tsv", tmp_path / "s", backbone, sentence_model)


@pytest.fixture
def of_a_folder(backbone, sentence_model, tmp_path):
    """Embed a folder of four images in two class folders, with captions, in one of the formats of folders."""
    for name in ("cats/a", "cats/b", "dogs/c", "dogs/.d/e"):
        image = tmp_path / "source" / f"{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(images_png())
        image.with_suffix(".txt").write_text("a caption\n")

    def embed(kind):
        source = open_source(tmp_path / "source", format=kind)
        return embed_pairs(source, tmp_path / kind, backbone, sentence_model)

    return embed


EDITS = {
    "an image more": lambda source: shutil.copy(source / "cats/a.png", source / "dogs/f.png"),
    "an image less": lambda source: (source / "cats/b.png").unlink(),
    "another image": lambda source: (source / "cats/a.png").write_bytes(images_png() + b" "),
    "a later time": lambda source: os.utime(source / "cats/a.png", ns=(1, 1)),
    "another name": lambda source: (source / "cats/a.png").rename(source / "cats/z.png"),
}


@pytest.mark.parametrize("kind", ["folder", "classes"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_changed_folder_is_refused(of_a_folder, tmp_path, kind, edit):
    of_a_folder(kind)
    assert len(of_a_folder(kind)) == {"folder": 4, "classes": 3}[kind]  # unchanged: finished before
    edit(tmp_path / "source")
    with pytest.raises(GramError, match=f"{kind}: expected the files that were in .*source when it was begun"):
        of_a_folder(kind)


def test_of_a_folder_what_its_format_reads_counts(of_a_folder, tmp_path):
    for kind in ("folder", "classes"):
        of_a_folder(kind)
    (tmp_path / "source/cats/readme.md").write_text("not read")
    (tmp_path / "source/cats/loop").symlink_to(tmp_path / "source")
    of_a_folder("folder")
    (tmp_path / "source/cats/a.txt").write_text("another caption\n")
    of_a_folder("classes")
    with pytest.raises(GramError, match="found some added, removed or edited"):
        of_a_folder("folder")
    path = tmp_path / "folder" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["source"]["listing"]  # of an earlier version
    write_json(path, manifest)
    assert len(of_a_folder("folder")) == 4


def images_png():
    import io

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def test_other_folders_are_left_alone(corpus, backbone, sentence_model, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for out, words in [(tmp_path, "found other files"), (tmp_path / "thesis.tex", "found a file")]:
        with pytest.raises(GramError, match=words):
            embed_pairs(corpus, out, backbone, sentence_model)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / ".lock").touch()  # of another program
    with pytest.raises(GramError, match="found other files"):
        embed_pairs(corpus, tmp_path, backbone, sentence_model)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / ".draft.part").touch()
    with pytest.raises(GramError, match="expected the manifest of a pair store|expected a pair store"):
        embed_pairs(corpus, tmp_path, backbone, sentence_model)
    assert {".draft.part", "thesis.tex"} <= {path.name for path in tmp_path.iterdir()}


def test_nothing_usable_is_one_sentence_with_an_example(backbone, sentence_model, tmp_path):
    (tmp_path / "pairs.tsv").write_text("image\tcaption\nx/a.png\ta dog\nb.png\t\n")
    with pytest.raises(
        GramError, match=r"missing file: 1.*empty caption: 1.*looked for at .*x/a\.png|empty caption: 1"
    ):
        embed_pairs(tmp_path / "pairs.tsv", tmp_path / "s", backbone, sentence_model)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"part_size": 0}, {"workers": -1}])
def test_numbers_out_of_range_are_refused(corpus, backbone, sentence_model, tmp_path, options):
    with pytest.raises(GramError, match="expected at least"):
        embed_pairs(corpus, tmp_path / "s", backbone, sentence_model, **options)


def test_damaged_stores_are_one_sentence(store, tmp_path):
    with pytest.raises(GramError, match="found no manifest.json there"):
        PairStore.open(tmp_path)
    for name, change, words in [
        ("similarity.npy", lambda p: p.write_bytes(p.read_bytes()[:200]), "expected a whole pair store"),
        ("similarity.npy", lambda p: p.write_bytes(b""), "expected a whole pair store"),
        (
            "similarity.npy",
            lambda p: (p.unlink(), os.mkfifo(p)),
            "npy: expected a file of a pair store, found something",
        ),
        ("similarity.npy", lambda p: np.save(p, np.zeros(3, np.float32)), "rows, found 3"),
        ("captions.parquet", lambda p: p.unlink(), "expected a whole pair store"),
        ("images.parquet", lambda p: pq.write_table(pa.table({"x": [1]}), p), "expected a whole pair store"),
        ("manifest.json", lambda p: p.write_text("{}"), "expected the manifest of a pair store"),
        ("manifest.json", lambda p: p.write_text("{"), "expected JSON"),
        ("manifest.json", lambda p: p.write_text(p.read_text().replace('"format": 1', '"format": 9')), "format 9"),
    ]:
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        shutil.copytree(store.path, tmp_path / "s")
        change(tmp_path / "s" / name)
        with pytest.raises(GramError, match=words):
            PairStore.open(tmp_path / "s")


def rewritten(name, change):
    """Return a function that changes an array or a column in a file of the same size, and keeps its time."""

    def rewrite(path):
        file, before = path / name, (path / name).stat()
        if name.endswith(".npy"):
            np.save(file, change(np.load(file)))
        else:
            table = pq.read_table(file)
            pq.write_table(table.set_column(0, "image", pa.array(change(table["image"].to_numpy().copy()))), file)
        return before

    return rewrite


def facts(manifest, **changes):
    return lambda path: write_json(path / "manifest.json", manifest | changes)


def test_changed_stores_are_one_sentence(store, tmp_path):
    """Each change leaves a store whose files can be read: only numbers or checksums tell."""
    manifest = json.loads((store.path / "manifest.json").read_text())
    old = {key: value for key, value in manifest.items() if key != "files"}
    mixed = rewritten("image_features.npy", lambda a: a[::-1])
    images, pairs = manifest["counts"]["images"], manifest["counts"]["pairs"]
    for change, words in [
        (mixed, r"image_features.npy: expected SHA-256 \w{12}, found \w{12}: it has changed"),
        (rewritten("similarity.npy", lambda a: a + 1), "similarity.npy: expected SHA-256"),
        (rewritten("sentence_features.npy", lambda a: a.astype(np.float32)), "expected float16 .* found float32"),
        (rewritten("image_features.npy", lambda a: a[:, :-1]), rf"expected float16 \({images}, \d+\), found float16"),
        (rewritten("captions.parquet", lambda a: a + images), "captions.parquet: expected .* it has changed"),
        (facts(manifest, counts=manifest["counts"] | {"pairs": pairs + 1}), f"manifest.json: expected {pairs} pairs"),
        (facts(old, counts=manifest["counts"] | {"images": 1}), f"manifest.json: expected {images} images"),
    ]:
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        shutil.copytree(store.path, tmp_path / "s")
        change(tmp_path / "s")
        with pytest.raises(GramError, match=words):
            PairStore.open(tmp_path / "s")
    # A store of an earlier version has no checksums; rows out of range are found when they are read.
    shutil.copytree(store.path, tmp_path / "old")
    facts(old)(tmp_path / "old")
    mixed(tmp_path / "old")
    assert len(PairStore.open(tmp_path / "old")) == pairs
    rewritten("captions.parquet", lambda a: a - 1)(tmp_path / "old")
    with pytest.raises(GramError, match=f"captions.parquet: expected rows of {images} images, found -1 to"):
        PairStore.open(tmp_path / "old").image  # noqa: B018


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (["settings"], 3, "settings: expected object, found int"),
        (["settings", "clip"], [], "settings.clip: expected object, found array"),
        (["settings", "clip", "fingerprint"], 7, "settings.clip.fingerprint: expected str, found int"),
        (["settings", "source", "image_root"], None, "settings.source.image_root: expected str, found null"),
        (["counts"], [1], "counts: expected object, found array"),
        (["counts", "pairs"], "75", r"counts.*: expected int, found str"),
        (["files", "similarity.npy"], "x", "files.*: expected object, found str"),
        (["fingerprint"], {}, "fingerprint: expected str, found object"),
        (["finished"], "yes", "finished: expected bool, found str"),
    ],
)
def test_manifests_of_other_types_are_one_sentence(store, tmp_path, keys, value, words):
    shutil.copytree(store.path, tmp_path / "s")
    manifest = inner = json.loads((tmp_path / "s" / "manifest.json").read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    facts(manifest)(tmp_path / "s")
    with pytest.raises(GramError, match=f"manifest.json: {words}"):
        PairStore.open(tmp_path / "s")
    del inner[keys[-1]]
    facts(manifest)(tmp_path / "s")
    if keys[0] not in ("counts", "files", "finished"):
        with pytest.raises(GramError, match=f"manifest.json: .*expected the key {keys[-1]}, found none"):
            PairStore.open(tmp_path / "s")


def test_files_are_read_again_only_if_they_look_changed(store, tmp_path, monkeypatch):
    shutil.copytree(store.path, tmp_path / "s")
    PairStore.open(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256_file", lambda path: pytest.fail("it was read before"))
        PairStore.open(tmp_path / "s")
    before = rewritten("similarity.npy", lambda a: a[::-1])(tmp_path / "s")
    os.utime(tmp_path / "s" / "similarity.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    PairStore.open(tmp_path / "s")  # size and time are as before
    with pytest.raises(GramError, match="similarity.npy: expected SHA-256"):
        PairStore.open(tmp_path / "s", verify=True)


def test_another_clip_is_refused(store, backbone):
    store.check_backbone(backbone)
    with pytest.raises(GramError, match="the backbone it was made with, random-tiny .* found random-tiny-RN"):
        store.check_backbone(load_backbone("random-tiny-RN"))


def test_fingerprints_tell_contents_apart(store, corpus, backbone, sentence_model, tmp_path):
    """The same captions over other pictures are another store; other batches over the same pictures are
    not."""
    again = embed_pairs(corpus, tmp_path / "same", backbone, sentence_model, batch_size=7, part_size=23)
    assert again.fingerprint == store.fingerprint
    root = tmp_path / "pictures"
    root.mkdir()
    for path in corpus.parent.glob("*.png"):
        (root / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (9, 9)).save(root / "00.png")
    other = embed_pairs(open_source(corpus, image_root=root), tmp_path / "other", backbone, sentence_model)
    assert list(other.captions) == list(store.captions) and other.fingerprint != store.fingerprint


def test_the_manifest_is_plain_json_without_times(store):
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["settings"]["clip"]["fingerprint"] == store.clip_fingerprint
    assert manifest["settings"]["sentence_model"]["fingerprint"] == store.sentence_fingerprint
    assert not [key for key in manifest if "time" in key or "date" in key]
