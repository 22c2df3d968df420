"""Sources whose captions lie in a file of their own: COCO, Karpathy, Flickr8k, JSON records, CC3M."""

import argparse
import json
import logging
import zlib

import pytest
from helpers.corpora import good, rows_of, skips
from PIL import Image

from gram_meta.commands import embed
from gram_meta.corpus import sources
from gram_meta.corpus.places import ImageReader
from gram_meta.corpus.sources import FORMATS, all_rows, open_source, rows
from gram_meta.corpus.sources.rows import Shard, Source
from gram_meta.errors import GramError


def pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, "JPEG")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


# --- COCO ---------------------------------------------------------------------------------------------------

COCO = {
    "info": {"year": 2017},
    "images": [
        {"id": 9, "file_name": "000009.jpg"},
        {"id": 25, "file_name": "000025.jpg"},
        {"id": 30, "file_name": "x.jpg"},
    ],
    "annotations": [
        {"image_id": 25, "id": 1, "caption": "A giraffe. "},
        {"image_id": 9, "id": 2, "caption": "Broccoli\non a plate"},
        {"image_id": 25, "id": 3, "caption": "Two giraffes"},
        {"image_id": 77, "id": 4, "caption": "of no image"},
        {"image_id": 9, "id": 5, "caption": ""},
        {"image_id": None, "id": 6, "caption": "of no image"},
        {"id": 7, "caption": "of no image either"},
    ],
}


def test_captions_of_coco(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_json(tmp_path / "annotations" / "captions_train2017.json", COCO)
    pictures(tmp_path / "train2017", "000009.jpg", "000025.jpg")
    source = open_source(path)
    found = list(all_rows(source))
    assert source.kind == "coco" and source.image_root == (tmp_path / "train2017").resolve()
    assert good(found) == [
        ("000009.jpg", "Broccoli on a plate"),
        ("000025.jpg", "A giraffe."),
        ("000025.jpg", "Two giraffes"),
    ]
    assert skips(found) == {rows.EMPTY_CAPTION: 2, rows.NO_IMAGE: 3}
    assert ImageReader(source.image_root).content(found[0].place)
    assert "images are in" in caplog.text and "--format coco" in caplog.text


def test_images_that_are_nowhere_are_one_sentence(tmp_path):
    path = write_json(tmp_path / "annotations" / "captions.json", COCO)
    pictures(tmp_path / "elsewhere" / "val2017", "000009.jpg")
    with pytest.raises(GramError, match="its images, such as 000009.jpg, below .*annotations.* --image-root"):
        open_source(path)
    assert open_source(path, image_root=tmp_path / "elsewhere").image_root.name == "val2017"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}, "annotations with captions, .* found none"),
        ({"licenses": []}, "found the keys licenses"),
        ([1, 2], "found a list of 2"),
        ("text", "found str"),
    ],
)
def test_json_without_captions_is_one_sentence(tmp_path, content, words):
    with pytest.raises(GramError, match=words):
        rows_of(write_json(tmp_path / "a.json", content))
    (tmp_path / "b.json").write_text('{"images": [')
    with pytest.raises(GramError, match="b.json: expected JSON"):
        open_source(tmp_path / "b.json")


# --- Karpathy -----------------------------------------------------------------------------------------------


def karpathy(*images):
    return {
        "dataset": "coco",
        "images": [
            {
                "filename": name,
                "filepath": folder,
                "split": split,
                "sentences": [{"raw": raw, "tokens": []} for raw in raws],
            }
            for name, folder, split, raws in images
        ],
    }


def test_splits_of_karpathy(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    content = karpathy(
        ("a.jpg", "train2014", "train", ["one", "two"]),
        ("b.jpg", "val2014", "restval", ["three"]),
        ("c.jpg", "val2014", "test", ["a test image"]),
        ("d.jpg", "val2014", "val", ["four"]),
    )
    path = write_json(tmp_path / "karpathy" / "dataset_coco.json", content)
    pictures(tmp_path, "train2014/a.jpg", "val2014/b.jpg", "val2014/c.jpg")
    train = [("train2014/a.jpg", "one"), ("train2014/a.jpg", "two"), ("val2014/b.jpg", "three")]
    source = open_source(path)
    assert source.kind == "karpathy" and good(all_rows(source)) == train
    assert "split train, restval taken, not test, val" in caplog.text
    assert good(rows_of(path, split="train")) == train[:2]
    assert len(rows_of(path, split="all")) == 5 and len(rows_of(path, split="val,test")) == 2
    with pytest.raises(GramError, match="expected the split 'dev', found train .1., restval .1., test .1., val .1."):
        open_source(path, split="dev")
    assert source.identity() != open_source(path, split="train").identity()


@pytest.mark.parametrize(
    ("sentences", "captions"), [("a dog", ["a dog"]), ({"raw": "a dog"}, ["a dog"]), (5, []), (True, []), (None, [])]
)
def test_sentences_of_another_type_are_one_caption_or_counted(tmp_path, sentences, captions):
    images = [{"filename": "a.jpg", "sentences": [{"raw": "one"}]}, {"filename": "a.jpg", "sentences": sentences}]
    path = write_json(tmp_path / "dataset.json", {"images": images})
    pictures(tmp_path, "a.jpg")
    found = rows_of(path)
    assert good(found) == [("a.jpg", text) for text in ["one", *captions]]
    assert skips(found) == ({} if captions else {rows.EMPTY_CAPTION: 1})


def test_karpathy_without_folders_and_with_all_images_in_one(tmp_path):
    flickr = karpathy(("a.jpg", "", "train", ["one"]))
    for image in flickr["images"]:
        del image["filepath"]
    path = write_json(tmp_path / "dataset_flickr8k.json", flickr)
    pictures(tmp_path / "Flicker8k_Dataset", "a.jpg")
    assert good(rows_of(path)) == [("a.jpg", "one")]
    path = write_json(tmp_path / "coco" / "dataset_coco.json", karpathy(("b.jpg", "train2014", "train", ["two"])))
    pictures(tmp_path / "coco" / "images", "b.jpg")
    source = open_source(path)
    assert good(all_rows(source)) == [("b.jpg", "two")] and source.image_root.name == "images"


# --- records, token files -----------------------------------------------------------------------------------


def test_json_records_and_lines(tmp_path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    items = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": "three"}, {"image": None}, 3]
    expected = [("a.jpg", "one"), ("a.jpg", "two"), ("b.jpg", "three")]
    found = rows_of(write_json(tmp_path / "records.json", items))
    assert good(found) == expected and sum(skips(found).values()) == 2
    lines = [json.dumps(item).encode() for item in items[:3]] + [b"{", b"", b"\xff"]
    (tmp_path / "records.jsonl").write_bytes(b"\n".join(lines))
    found = rows_of(tmp_path / "records.jsonl")
    assert good(found) == expected and skips(found) == {rows.NO_IMAGE: 1, rows.UNREADABLE: 2}
    with pytest.raises(GramError, match="expected a column 'text', found image, caption"):
        rows_of(tmp_path / "records.jsonl", caption_column="text")


def test_token_files_of_flickr(tmp_path):
    pictures(tmp_path / "Flicker8k_Dataset", "1.jpg", "2.jpg")
    path = tmp_path / "Flickr8k.token.txt"
    path.write_bytes(
        b"1.jpg#0\tA dog .\n1.jpg#1\tTwo dogs\tand a tab\n\n2.jpg#0\t\n2.jpg#1 no tab\n2.jpg.1#2\tgone\n2.jpg#x\t\xff\n"
    )
    found = rows_of(path)
    assert good(found) == [("1.jpg", "A dog ."), ("1.jpg", "Two dogs and a tab"), ("2.jpg.1", "gone")]
    assert skips(found) == {rows.EMPTY_CAPTION: 1, rows.COLUMN_COUNT: 1, rows.BAD_UTF8: 1}
    path.rename(tmp_path / "results_20130124.token")
    assert good(rows_of(tmp_path / "results_20130124.token")) == good(found)


def test_tables_that_go_by_other_names(tmp_path):
    pairs = [("a.jpg", "a dog, and a cat")]
    (tmp_path / "captions.txt").write_text('image,caption\na.jpg,"a dog, and a cat"\n')  # Flickr8k on Kaggle
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\na.jpg| 0| a dog, and a cat\n"
    )  # Flickr30k
    (tmp_path / "out.csv").write_text("title\tfilepath\na dog, and a cat\ta.jpg\n")  # OpenCLIP's for CC3M
    for name in ("captions.txt", "results.csv", "out.csv"):
        assert good(rows_of(tmp_path / name)) == pairs, name
    (tmp_path / "notes.txt").write_text("some notes\n")
    with pytest.raises(GramError, match="found the first line 'some notes'"):
        open_source(tmp_path / "notes.txt")


# --- CC3M ---------------------------------------------------------------------------------------------------

URLS = [f"http://example.com/{number}.jpg?size=big" for number in range(30)]


@pytest.fixture
def cc3m(tmp_path):
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text("".join(f"caption {number}\t{url}\n" for number, url in enumerate(URLS)))
    return path


def crc(number):
    return str(zlib.crc32(URLS[number].encode()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (lambda number: f"training/{crc(number)}", "training/{crc32}"),
        (lambda number: f"{crc(number)}.jpg", "{crc32}.jpg"),
        (lambda number: f"train/{number % 1000}/{number}.jpg", "train/{thousand}/{row}.jpg"),
        (
            lambda number: f"images_train/{number:07d}"[:17] + f"/{number:07d}.jpg",
            "images_train/{first4}/{row:07d}.jpg",
        ),
        (lambda number: f"{number:08d}.jpg", "{row:08d}.jpg"),
        (lambda number: f"val/{number}.png", "val/{row}.png"),
        (lambda number: f"{number + 1}.jpg", "{row1}.jpg"),
        (lambda number: f"{number + 1:08d}.jpg", "{row1:08d}.jpg"),
        (lambda number: f"{crc(number)}{'.png' if number % 2 else '.jpeg'}", "{crc32}.*"),
    ],
)
def test_images_of_cc3m_are_found_by_the_usual_names(cc3m, tmp_path, name, rule, caplog):
    caplog.set_level(logging.INFO)
    there = [number for number in range(30) if number not in (3, 11, 12)]  # some links are dead
    root = tmp_path / "images of cc3m"
    pictures(root, *(name(number) for number in there))
    source = open_source(cc3m, image_root=root)
    assert source.kind == "cc3m" and source.naming == rule
    assert f"images are called {rule}; 27 of the first 30 rows have one" in caplog.text
    found = list(all_rows(source))
    assert [row.caption for row in found] == [f"caption {number}" for number in range(30)]
    assert [found[number].location for number in there] == [name(number) for number in there]


def test_images_of_cc3m_that_are_not_there_are_one_sentence(cc3m, tmp_path):
    with pytest.raises(GramError, match="the images of the first 30 rows .* found none; say how with --image-name"):
        open_source(cc3m)
    pictures(tmp_path / "own", *(f"pic-{number:03d}.jpg" for number in range(30)))
    with pytest.raises(GramError, match="found none"):
        open_source(cc3m, image_root=tmp_path / "own")
    source = open_source(cc3m, image_root=tmp_path / "own", image_name="pic-{row:03d}.jpg")
    assert [row.location for row in all_rows(source)][29] == "pic-029.jpg"
    for rule in ("pic.jpg", "pic-{number}.jpg", "{row:x"):
        with pytest.raises(GramError, match="--image-name .* expected a name with"):
            open_source(cc3m, image_root=tmp_path / "own", image_name=rule)


def test_row_numbers_of_unknown_beginning_are_refused(cc3m, tmp_path):
    pictures(tmp_path / "images", *(f"{number}.jpg" for number in range(1, 30)))  # from 0 or from 1?
    with pytest.raises(GramError, match="neither number 0 nor number 30, .* --image-name 'images/{row}.jpg' or"):
        open_source(cc3m)
    assert open_source(cc3m, image_name="images/{row1}.jpg").naming == "images/{row1}.jpg"


def test_rows_of_cc3m_that_are_broken(tmp_path):
    path = tmp_path / "cc.tsv"
    lines = [
        "caption\turl",
        "a dog\thttp://a/0.jpg",
        "",
        "no url",
        "a cat\t",
        '"quoted\thttp://a/4.jpg',
        "\thttp://a/5.jpg",
    ]
    path.write_bytes("\n".join(lines).encode() + b"\nbad \xff\thttp://a/6.jpg\n")
    found = rows_of(path, format="cc3m", image_name="{row}.jpg")
    assert good(found) == [("0.jpg", "a dog"), ("4.jpg", '"quoted')]
    assert skips(found) == {rows.COLUMN_COUNT: 1, rows.NO_IMAGE: 1, rows.EMPTY_CAPTION: 1, rows.BAD_UTF8: 1}
    path.write_text("http://a/0.jpg\ta dog\n")  # CC12M has the URL first
    assert good(rows_of(path, image_name="{row}.jpg")) == [("0.jpg", "a dog")]


# --- which kind ---------------------------------------------------------------------------------------------


def test_options_that_mean_nothing_are_refused(cc3m, tmp_path):
    pictures(tmp_path / "images", "a.jpg")
    (tmp_path / "images" / "a.txt").write_text("a dog")
    (tmp_path / "pairs.tsv").write_text("image\tcaption\na.jpg\ta dog\n")
    for path, options, words in [
        (tmp_path / "images", {"split": "train"}, "a split does not belong to a folder of images"),
        (tmp_path / "pairs.tsv", {"split": "train"}, "a split does not belong to a tab-separated table"),
        (tmp_path / "pairs.tsv", {"image_name": "{row}"}, "a rule for image names does not belong to a tab-sep"),
        (tmp_path / "images", {"format": "tsv"}, "expected a tab-separated table, found a folder"),
        (tmp_path / "pairs.tsv", {"format": "webdataset"}, None),
        (tmp_path / "pairs.tsv", {"format": "coco"}, "expected JSON"),
        (tmp_path / "pairs.tsv", {"format": "parquet"}, "expected Parquet files"),
        (tmp_path / "pairs.tsv", {"format": "tokens"}, "found no such line"),
        (tmp_path / "images", {"format": "webdataset"}, "expected tar shards, found none in there"),
        (tmp_path / "gone", {"format": "karpathy"}, "expected Karpathy's splits in JSON, found nothing there"),
    ]:
        if words is None:  # no tar: all of it is damage
            assert skips(rows_of(path, **options)) == {rows.DAMAGED: 1}
            continue
        with pytest.raises(GramError, match=words):
            rows_of(path, **options)


def formats_of_the_command():
    parser = argparse.ArgumentParser()
    embed.add_arguments(parser)
    return next(action.choices for action in parser._actions if action.dest == "format")


def test_the_command_knows_every_format():
    assert formats_of_the_command() == ["auto", *(known.name for known in FORMATS)]
    assert len(FORMATS) == 11 == len({known.name for known in FORMATS})
    assert all(name in embed.HELP for name in ("shards/", "dataset_coco.json", "Train_GCC-training.tsv"))


def test_a_new_format_is_one_entry(tmp_path, monkeypatch):
    """An object with the members of `Format` is detected, opened, read and known to the command."""

    class Lines:
        name = "lines"
        title = "lines of image=caption"
        options = frozenset()

        def claims(self, path, peek):
            return peek.suffix == ".lines"

        def open(self, path, options):
            return Source(path, self.name, path.parent)

        def shards(self, source):
            fields = [line.split("=") for line in source.path.read_text().splitlines()]
            return [Shard("", lambda: iter([rows.checked(*pair) for pair in fields]))]

    (tmp_path / "a.lines").write_text("a.jpg=a dog\nb.jpg=\n")
    with pytest.raises(GramError, match="expected a folder, .* found .lines"):
        open_source(tmp_path / "a.lines")
    monkeypatch.setattr(sources, "FORMATS", [*FORMATS, Lines()])
    found = rows_of(tmp_path / "a.lines")
    assert good(found) == [("a.jpg", "a dog")] and skips(found) == {rows.EMPTY_CAPTION: 1}
    assert "lines" in formats_of_the_command()
    with pytest.raises(GramError, match="a split does not belong to lines of image=caption"):
        open_source(tmp_path / "a.lines", split="train")
