"""Sources in shards: WebDataset tars and Parquet with images inside, whole and damaged, and single images out of
them."""

import io
import json
import tarfile
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corpora import good, rows_of, skips
from PIL import Image

from gram_meta.corpus.loading import run_ahead
from gram_meta.corpus.places import ImageReader
from gram_meta.corpus.sources import all_rows, open_source, rows, shards_of
from gram_meta.errors import GramError
from gram_meta.images import BROKEN, EMPTY, BadImage


def picture(number, kind="JPEG"):
    """The bytes of a small image, different for every number."""
    pixels = np.random.default_rng(number).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """A tar of (name, content)."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key, text=None, suffix="jpg", **facts):
    """The members of a sample in the order in which img2dataset writes them."""
    number = int("".join(letter for letter in key if letter.isdigit()) or 0)
    yield f"{key}.{suffix}", picture(number)
    if facts:
        yield f"{key}.json", json.dumps({"key": key, "status": "success", **facts}).encode()
    if text is not None:
        yield f"{key}.txt", text.encode()


@pytest.fixture
def shards(tmp_path):
    """Three shards of four samples as img2dataset leaves them, with its other files beside them."""
    for shard in range(3):
        keys = [f"{shard:05d}{number:04d}" for number in range(4)]
        members = [member for key in keys for member in sample(key, f"caption {key}", caption="other", width=20)]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"not the corpus")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    return tmp_path


def test_shards_of_img2dataset_are_read_in_their_order(shards):
    source = open_source(shards)
    found = list(all_rows(source))
    keys = [f"{shard:05d}{number:04d}" for shard in range(3) for number in range(4)]
    assert source.kind == "webdataset" and not skips(found)
    assert good(found) == [(f"{key[:5]}.tar/{key}.jpg", f"caption {key}") for key in keys]
    assert [shard.name for shard in shards_of(source)] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [row for shard in shards_of(source) for row in shard.rows()] == found
    assert source.identity()["shards"] == {f"{n:05d}.tar": (shards / f"{n:05d}.tar").stat().st_size for n in range(3)}


def test_single_images_are_read_at_random(shards):
    source = open_source(shards)
    reader = ImageReader(source.image_root, source.identity()["shards"])
    found = list(all_rows(source))
    for row in [found[index] for index in (7, 0, 11, 3, 7)]:
        assert reader.content(row.place) == picture(int(row.location[-13:-4]))
        image, digest = reader.image(row.place)
        assert image.size == (20, 24) and any(digest)


def test_a_shard_that_has_changed_or_vanished_is_named(shards):
    source = open_source(shards)
    sizes, found = source.identity()["shards"], list(all_rows(source))
    with open(shards / "00001.tar", "ab") as file:
        file.write(bytes(512))
    (shards / "00002.tar").unlink()
    reader = ImageReader(source.image_root, sizes)
    with pytest.raises(GramError, match="00001.tar: expected the shard that was embedded, of .* has changed"):
        reader.content(found[4].place)
    with pytest.raises(GramError, match="00002.tar: expected the shard that was embedded, found No such file"):
        reader.content(found[8].place)
    with pytest.raises(GramError, match="00002.tar: expected a shard"):
        list(all_rows(source))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("{00000..00001}.tar", 8), ("{00002,00000}.tar", 8), ("*.tar", 12), ("0000[12].tar", 8), ("00001.tar", 4)],
)
def test_shards_can_be_named_by_patterns(shards, pattern, expected):
    assert len(good(rows_of(shards / pattern))) == expected


def test_a_shard_missing_from_a_range_is_named(shards):
    with pytest.raises(GramError, match="expected the file .*00003.tar, found nothing there and 1 more of 5"):
        open_source(shards / "{00000..00004}.tar")


def test_one_sentence_for_a_compressed_shard(shards):
    import gzip

    (shards / "00000.tar.gz").write_bytes(gzip.compress((shards / "00000.tar").read_bytes()))
    with pytest.raises(GramError, match="00000.tar.gz: expected an uncompressed .tar, found gzip"):
        open_source(shards / "00000.tar.gz")
    with pytest.raises(GramError, match="00000.tar.gz: expected an uncompressed .tar, found gzip"):
        rows_of(shards)


def test_damage_costs_what_it_hits(tmp_path):
    members = [member for number in range(6) for member in sample(f"{number:09d}", f"caption {number}")]
    whole = write_tar(tmp_path / "a.tar", members).read_bytes()
    path = tmp_path / "b.tar"

    def read(content):
        path.write_bytes(content)
        return rows_of(path)

    assert len(good(read(whole))) == 6
    assert len(good(read(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512)))) == 6  # no zeros at its end
    second = whole.index(b"000000002.jpg")
    cut_in_member = read(whole[: second + 700])
    assert len(good(cut_in_member)) == 2 and skips(cut_in_member) == {rows.DAMAGED: 1}
    cut_in_header = read(whole[: second + 100])
    assert len(good(cut_in_header)) == 2 and skips(cut_in_header) == {rows.DAMAGED: 1}
    garbage = np.random.default_rng(0).bytes(1024)
    hit = read(whole[:second] + garbage + whole[second + 1024 :])
    assert skips(hit) == {rows.DAMAGED: 1, rows.NO_MEMBER: 1}  # its caption is left
    assert [caption for _, caption in good(hit)] == [f"caption {number}" for number in (0, 1, 3, 4, 5)]
    assert skips(read(b"")) == {rows.DAMAGED: 1}
    assert read(bytes(10240)) == []


@pytest.mark.slow
def test_thousands_of_headers_without_a_member_are_damage(tmp_path):
    """Each header for a long name makes tarfile read the next one, one level deeper."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a.jpg".ljust(512, b"\0")
    path = write_tar(tmp_path / "a.tar", sample("000000001", "a caption"))
    path.write_bytes(block * 1500 + path.read_bytes())
    found = rows_of(path)
    assert len(good(found)) <= 1 and skips(found)[rows.DAMAGED] >= 1


def test_damage_is_found_again_at_any_place(tmp_path):
    """Whatever 700 bytes are lost: no error, no image that is not the right one, and most of the others are there."""
    members = [member for number in range(1, 9) for member in sample(f"{number:09d}", f"caption {number}")]
    whole = bytearray(write_tar(tmp_path / "a.tar", members).read_bytes())
    path = tmp_path / "b.tar"
    for start in range(0, len(whole) - 10240, 1371):
        path.write_bytes(whole[:start] + bytes([start % 256]) * 700 + whole[start + 700 :])
        source = open_source(path)
        found = list(all_rows(source))
        reader = ImageReader(source.image_root)
        for row in found:
            if not row.skip:
                number = int(row.location[-13:-4])
                content, expected = reader.content(row.place), picture(number)
                hit = start < row.offset + row.size and row.offset < start + 700
                assert row.caption == f"caption {number}" or hit or start + 700 > row.offset
                assert content == expected or hit
        assert len(good(found)) >= 6


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_names_of_other_scripts(tmp_path, format):
    folder = "/".join(["a-folder-with-a-name-of-forty-characters"] * 3)
    keys = (
        [f"{folder}/{'x' * 90}7", "Käfer 🐞 8"] if format != tarfile.USTAR_FORMAT else [f"{folder}/{'x' * 80}7", "k8"]
    )
    members = [member for key in keys for member in sample(key, f"at {key}")]
    path = write_tar(tmp_path / "a.tar", members, format)
    source = open_source(path)
    found = list(all_rows(source))
    assert good(found) == [(f"a.tar/{key}.jpg", f"at {key}") for key in keys]
    assert [ImageReader(tmp_path).content(row.place) for row in found] == [picture(7), picture(8)]


def test_members_of_a_sample_need_not_stand_together(tmp_path):
    members = [
        ("2.txt", b"two"),
        ("1.jpg", picture(1)),
        ("2.png", picture(2, "PNG")),
        ("3.json", b"{}"),
        ("1.txt", b"one"),
    ]
    assert good(rows_of(write_tar(tmp_path / "a.tar", members))) == [("a.tar/2.png", "two"), ("a.tar/1.jpg", "one")]


def test_duplicate_keys_are_counted_and_the_first_is_taken(tmp_path):
    for shard in ("a.tar", "b.tar"):
        members = [
            *sample("1", "first"),
            *sample("2", "other"),
            ("1.jpg", b"another"),
            ("./1.JPG", b"third"),
            ("1.txt", b"x"),
        ]
        write_tar(tmp_path / shard, members)
    source = open_source(tmp_path)
    found = list(all_rows(source))
    keys = [
        (f"{shard}/{key}.jpg", text) for shard in ("a.tar", "b.tar") for key, text in (("1", "first"), ("2", "other"))
    ]
    assert good(found) == keys  # the same key in two shards is two images
    assert skips(found) == {rows.DUPLICATE: 4}
    assert ImageReader(tmp_path).content(next(row for row in found if not row.skip).place) == picture(1)


@pytest.mark.parametrize(
    "names, expected, counted",
    [
        # keys with dots, beside their beginning
        (["22.png", "22.txt", "22.05.png", "22.05.txt"], {"22.png": "22.txt", "22.05.png": "22.05.txt"}, {}),
        (["1-s2.0-S09.b.png", "1-s2.0-S09.b.json"], {"1-s2.0-S09.b.png": "1-s2.0-S09.b.json"}, {}),
        (["a.b/x.1.JPG", "a.b/x.1.TXT", "a.b/x.2.jpg"], {"a.b/x.1.jpg": "a.b/x.1.TXT"}, {rows.NO_CAPTION_FILE: 1}),
        # one key is the beginning of the other
        (["a.left.jpg", "a.right.jpg", "a.txt"], {"a.left.jpg": "a.txt"}, {rows.EXTRA_IMAGE: 1}),
        (["a.jpg", "a.txt", "a.mask.png"], {"a.jpg": "a.txt"}, {rows.EXTRA_IMAGE: 1}),
        (["a.jpg", "a.png", "a.txt"], {"a.jpg": "a.txt"}, {rows.EXTRA_IMAGE: 1}),
        (["a.jpg", "a.caption.txt"], {"a.jpg": "a.caption.txt"}, {}),
        (["a.b.c.jpg", "a.txt", "a.b.txt"], {"a.b.c.jpg": "a.b.txt"}, {rows.NO_MEMBER: 1}),
        # of two samples, each lost a member
        (["22.05.png", "22.07.txt"], {}, {rows.NO_CAPTION_FILE: 1, rows.NO_MEMBER: 1}),
        (["22.05.json", "22.png", "22.txt", "22.cls"], {"22.png": "22.txt"}, {rows.NO_MEMBER: 1}),
    ],
)
def test_keys_with_dots_are_paired_or_counted(tmp_path, names, expected, counted):
    """The caption of each picture is the name of the member that holds it."""
    texts = {name: json.dumps({"caption": name}) if name.endswith("json") else name for name in names}
    write_tar(tmp_path / "a.tar", [(name, text.encode()) for name, text in texts.items()])
    found = rows_of(tmp_path / "a.tar")
    assert good(found) == [(f"a.tar/{image}", text) for image, text in expected.items()]
    assert skips(found) == counted


def test_a_suffix_with_dots_names_the_captions(tmp_path):
    members = [("a.jpg", b""), ("a.txt", b"no"), ("a.en.txt", b"a dog"), ("b.1.jpg", b""), ("b.1.en.txt", b"a cat")]
    found = rows_of(write_tar(tmp_path / "a.tar", members), caption_column="en.txt")
    assert good(found) == [("a.tar/a.jpg", "a dog"), ("a.tar/b.1.jpg", "a cat")] and not skips(found)


def test_captions_come_from_txt_then_json_or_where_one_says(tmp_path):
    members = [
        *sample("1", "of the txt\nin two lines", caption="of the json", alt="alternative"),
        *sample("2", caption="of the json", alt=["one", "two", 3]),
        *sample("3", " \n", caption="behind an empty txt"),
        *sample("4", caption=None, alt="alternative"),
        *sample("5"),
        ("6.jpg", picture(6)),
        ("6.json", b'{"caption": "cut'),
        ("7.jpg", picture(7)),
        ("7.txt", b"bad \xff bytes"),
        *sample("8", "x" * 10_001),
        *sample("9", "x" * 100_001),
        ("10.txt", b"no image"),
        ("11.pickle", b"cos\nsystem\n(S'touch /tmp/unpickled'\ntR."),
        ("11.pyd", b""),
        ("README", b"no suffix"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    found = rows_of(path)
    assert [caption for _, caption in good(found)] == ["of the txt in two lines", "of the json", "behind an empty txt"]
    assert skips(found) == {
        rows.EMPTY_CAPTION: 1,
        rows.NO_CAPTION_FILE: 1,
        rows.UNREADABLE: 1,
        rows.BAD_UTF8: 1,
        rows.LONG_CAPTION: 2,
        rows.NO_MEMBER: 1,
    }
    found = rows_of(path, caption_column="alt")
    assert [caption for _, caption in good(found)] == ["alternative", "one", "two", "alternative"]
    assert [caption for _, caption in good(rows_of(path, caption_column="txt"))] == ["of the txt in two lines"]


def test_names_of_members_lead_nowhere_else(tmp_path):
    names = ["/etc/1.jpg", "../../2.jpg", "./a/./3.jpg", "a/../4.jpg", "a.b/5.x.jpg", "._6.jpg", "b/.jpg"]
    members = [member for name in names for member in ((name, picture(1)), (name.removesuffix("jpg") + "txt", b"text"))]
    write_tar(tmp_path / "a.tar", members)
    with open(tmp_path / "a.tar", "rb") as file:
        content = file.read()
    (tmp_path / "b.tar").write_bytes(content.replace(b"./a/./3.", b"./a/\xff/3."))  # its checksum no longer fits
    expected = ["etc/1.jpg", "%2E%2E/%2E%2E/2.jpg", "a/3.jpg", "a/%2E%2E/4.jpg", "a.b/5.x.jpg"]
    found = good(rows_of(tmp_path / "a.tar"))
    assert [location for location, _ in found] == [f"a.tar/{name}" for name in expected]
    assert skips(rows_of(tmp_path / "b.tar")) == {rows.DAMAGED: 1}  # one place


def test_a_name_that_is_not_utf8_is_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in [*sample("é1", "bad name"), *sample("2", "good name")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = rows_of(tmp_path / "a.tar")
    assert good(found) == [("a.tar/2.jpg", "good name")] and skips(found) == {rows.BAD_UTF8: 1}


def test_sizes_above_eight_gigabytes_and_tars_one_after_the_other(tmp_path):
    info = tarfile.TarInfo("huge.bin")
    info.size = 9 << 30
    huge = info.tobuf(tarfile.GNU_FORMAT)
    path = write_tar(tmp_path / "b.tar", sample("1", "after it"))
    with open(tmp_path / "a.tar", "wb") as file:  # sparse: it takes no place on the disk
        file.write(huge)
        file.seek(9 << 30, io.SEEK_CUR)
        file.write(path.read_bytes() + write_tar(tmp_path / "c.tar", sample("2", "appended")).read_bytes())
    source = open_source(tmp_path / "a.tar")
    found = list(all_rows(source))
    assert good(found) == [("a.tar/1.jpg", "after it"), ("a.tar/2.jpg", "appended")]
    assert found[0].offset > 9 << 30 and ImageReader(tmp_path).content(found[0].place) == picture(1)


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    import os

    from gram_meta.corpus import open_shards

    monkeypatch.setattr(open_shards.TARS, "most", 3)
    for shard in range(12):
        write_tar(tmp_path / f"{shard:05d}.tar", sample(f"{shard}", "text"))
    source = open_source(tmp_path)
    found, reader = list(all_rows(source)), ImageReader(source.image_root)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for row in found * 2:
        assert reader.content(row.place) == picture(int(row.shard[:5]))
    assert len(open_shards.TARS.held) == 3
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fork", "spawn", "threads"])
def test_processes_and_threads_read_from_the_same_shards(shards, tmp_path, way):
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

    (tmp_path / "parquet").mkdir()
    images = [(picture(number), "") for number in range(20)]
    write_parquet(tmp_path / "parquet" / "a.parquet", images, [str(n) for n in range(20)], row_group_size=3)
    tars, parquet = open_source(shards), open_source(tmp_path / "parquet")
    of_tars = [row.place for row in all_rows(tars)] * 4
    of_parquet = [row.place for row in all_rows(parquet)] * 4
    pool = ThreadPoolExecutor(8)
    if way != "threads":
        pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(way))
    for source, places in ((tars, of_tars), (parquet, of_parquet)):
        reader = ImageReader(source.image_root, source.identity()["shards"])
        reader.content(places[0])  # open in this process before the others begin
    with pool:
        for source, places in ((tars, of_tars), (parquet, of_parquet)):
            reader = ImageReader(source.image_root, source.identity()["shards"])
            found = list(pool.map(reader.content, places, chunksize=6))
            if source is tars:
                assert found == [picture(int(place.location[-13:-4])) for place in places]
            else:
                assert found == [picture(place.offset) for place in places]


def test_a_process_forked_in_the_middle_of_an_opening_reads_on(shards):
    """Another thread holds the cache's lock just when image workers are forked: they must not wait for it for ever."""
    import multiprocessing

    from gram_meta.corpus import open_shards

    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork")
    reader = ImageReader(shards)
    place = next(iter(all_rows(open_source(shards)))).place
    process = multiprocessing.get_context("fork").Process(target=reader.content, args=(place,))
    with open_shards.TARS.lock:
        process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive and process.exitcode == 0


def test_a_half_written_parquet_beside_images_is_passed_over(tmp_path):
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "1.jpg").write_bytes(picture(1))
    (tmp_path / "00000" / "1.txt").write_text("a dog")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 and no end")  # img2dataset's, while it is at work
    assert good(rows_of(tmp_path)) == [("00000/1.jpg", "a dog")]
    write_parquet(tmp_path / "00001.parquet", [(picture(2), "")], ["a cat"])
    with pytest.raises(GramError, match="00000.parquet: expected a Parquet file"):
        open_source(tmp_path)


# --- Parquet with images inside -----------------------------------------------------------------------------


def write_parquet(path, images, captions, **options):
    """As Hugging Face's `datasets` writes: `images` are bytes, (bytes, path), or None."""
    structs = [{"bytes": image[0], "path": image[1]} if isinstance(image, tuple) else image for image in images]
    pq.write_table(pa.table({"caption": captions, "image": structs}), path, **options)
    return path


def test_parquet_with_images_inside(tmp_path):
    for shard in range(2):
        images = [(picture(shard * 10 + number), f"{number}.jpg") for number in range(10)]
        captions = [[f"a {number}", f"b {number}"] for number in range(10)]
        write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", images, captions, row_group_size=4)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [(picture(1), "")], [["a test image"]])
    source = open_source(tmp_path)
    found = list(all_rows(source))
    assert source.kind == "parquet" and source.split == "train"
    names = [f"train-0000{shard}-of-00002.parquet" for shard in range(2)]
    assert [shard.name for shard in shards_of(source)] == names
    assert [row for shard in shards_of(source) for row in shard.rows()] == found
    expected = [(f"{name}/{number}", f"{letter} {number}") for name in names for number in range(10) for letter in "ab"]
    assert good(found) == expected and not skips(found)
    reader = ImageReader(source.image_root, source.identity()["shards"])
    for row in [found[index] for index in (39, 0, 17, 20, 8)]:
        assert reader.content(row.place) == picture(row.offset + 10 * names.index(row.shard))
    assert len(rows_of(tmp_path, split="all")) == 41 and len(rows_of(tmp_path, split="test")) == 1
    with pytest.raises(GramError, match="expected the split 'val', found test .1., train .2."):
        open_source(tmp_path, split="val")
    assert len(rows_of(tmp_path / "train-{00000..00001}-of-00002.parquet")) == 40


def test_images_of_parquet_that_are_null_empty_or_files(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jpg").write_bytes(picture(5))
    images = [(picture(0), None), (None, "files/a.jpg"), (None, None), None, (b"", "b.jpg"), (picture(3), "x.jpg")]
    path = write_parquet(tmp_path / "a.parquet", images, [f"caption {number}" for number in range(6)])
    source = open_source(path)
    found = list(all_rows(source))
    assert [shard.name for shard in shards_of(source)] == [""]  # a path may stand in several files
    assert skips(found) == {rows.NO_IMAGE: 2}
    assert [row.location for row in found if not row.skip] == [
        "a.parquet/0",
        "files/a.jpg",
        "a.parquet/4",
        "a.parquet/5",
    ]
    reader = ImageReader(source.image_root)
    contents = [reader.content(row.place) for row in found if not row.skip and row.offset != 4]
    assert contents == [picture(0), picture(5), picture(3)]
    with pytest.raises(BadImage, match=EMPTY):
        reader.content(found[4].place)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"jpg": [b"x"], "caption": ["a dog"], "url": ["u"]}, ["a dog"]),  # img2dataset's parquet
        (
            {"image": [b"x"], "sentences": [[{"raw": "one", "tokens": ["one"]}, {"raw": "two", "tokens": []}]]},
            ["one", "two"],
        ),
        ({"image": [b"x"], "caption_0": ["one"], "caption_1": ["two"]}, ["one", "two"]),
        ({"picture": [{"bytes": b"x", "path": ""}], "text": ["a dog"]}, ["a dog"]),
    ],
)
def test_columns_of_parquet_are_found(tmp_path, columns, expected):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = rows_of(tmp_path)
    assert [row.caption for row in found] == expected
    assert ImageReader(tmp_path).content(found[0].place) == b"x"


def test_large_row_groups_are_warned_of(tmp_path, monkeypatch, caplog):
    from gram_meta.corpus.sources import parquet

    path = write_parquet(
        tmp_path / "a.parquet", [(picture(n), "") for n in range(8)], list("abcdefgh"), row_group_size=4
    )
    open_source(path)
    assert "row groups" not in caplog.text
    monkeypatch.setattr(parquet, "LARGE_GROUP", 3000)
    open_source(path)
    assert "a.parquet: row groups of up to" in caplog.text


def test_damage_in_parquet_costs_the_row_group(tmp_path):
    images = [(picture(number), "") for number in range(12)]
    path = write_parquet(
        tmp_path / "a.parquet", images, [str(number) for number in range(12)], row_group_size=4, compression="snappy"
    )
    start = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    source = open_source(path)
    reader, bad = ImageReader(source.image_root), 0
    for row in all_rows(source):
        try:
            assert reader.content(row.place) == picture(row.offset)
        except BadImage as error:
            assert str(error) == BROKEN and 4 <= row.offset < 8
            bad += 1
    assert bad == 4
    path.write_bytes(content[:-100])  # cut off: it has no footer
    with pytest.raises(GramError, match="a.parquet: expected a Parquet file"):
        open_source(path)


def test_a_parquet_shard_that_has_changed_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [(picture(1), "")] * 3, ["a", "b", "c"])
    source = open_source(path)
    sizes, found = source.identity()["shards"], list(all_rows(source))
    write_parquet(path, [(picture(1), "")], ["a"])
    with pytest.raises(GramError, match="a.parquet: expected the shard that was embedded, of .* bytes, found"):
        ImageReader(tmp_path, sizes).content(found[2].place)
    with pytest.raises(GramError, match="expected the shard .* of an image in row 2 of column 'image', found 1 rows"):
        ImageReader(tmp_path).content(found[2].place)


def test_images_that_hugging_face_wrote(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    from datasets.table import embed_table_storage

    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {
        "image": [str(tmp_path / f"{number}.jpg") for number in range(6)],
        "caption": [str(number) for number in range(6)],
    }
    data = datasets.Dataset.from_dict(columns, features)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(embed_table_storage(data.data.table), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    data.to_parquet(tmp_path / "paths.parquet")  # this one has paths, and bytes that are null
    for source in (open_source(tmp_path / "hub"), open_source(tmp_path / "paths.parquet")):
        reader = ImageReader(source.image_root)
        assert [reader.content(row.place) for row in all_rows(source)] == [picture(number) for number in range(6)]
        assert [row.caption for row in all_rows(source)] == list("012345")


# --- into a store -------------------------------------------------------------------------------------------


def _faulty():
    """Images as they come, each with the reason that the manifest has to give, or "" for one that is used."""
    from PIL import ImageDraw

    from gram_meta import images

    def encoded(image, kind, **options):
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    red = Image.new("RGB", (30, 20), (255, 0, 0))
    ImageDraw.Draw(red).ellipse((5, 5, 15, 15), fill=(0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    bomb = bytearray(encoded(Image.new("1", (1, 1)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    noise = picture(5)
    return [
        (encoded(red.convert("CMYK"), "JPEG"), "jpg", ""),
        (encoded(red.convert("P"), "PNG"), "png", ""),
        (encoded(Image.fromarray(np.full((20, 30), 30_000, np.uint16)), "PNG"), "png", ""),
        (encoded(red, "JPEG", exif=exif), "jpg", ""),
        (encoded(red, "WEBP"), "webp", ""),
        (noise[: len(noise) // 2], "jpg", images.BROKEN),
        (b"", "jpg", images.EMPTY),
        (b"<html>404</html>", "jpg", images.NOT_IMAGE),
        (bytes(bomb), "png", images.BOMB),
    ]


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_faults_are_counted_by_reason_in_the_manifest(tmp_path, container):
    from gram_meta.backbone.clip import load_backbone
    from gram_meta.corpus.embedding.run import embed_pairs
    from gram_meta.corpus.embedding.sentences import load_sentence_model

    faulty = _faulty()
    if container == "tar":
        members = []
        for number, (content, suffix, _) in enumerate(faulty):
            members += [(f"{number}.{suffix}", content), (f"{number}.txt", f"caption {number}".encode())]
        whole = write_tar(tmp_path / "a.tar", [*members, *sample("77", "cut off")]).read_bytes()
        (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"77.jpg") + 600])
        source = open_source(tmp_path / "a.tar")
    else:
        contents = [(content, "") for content, _, _ in faulty]
        captions = [f"caption {number}" for number in range(len(faulty))]
        source = open_source(write_parquet(tmp_path / "a.parquet", contents, captions, row_group_size=4))
    store = embed_pairs(
        source, tmp_path / "store", load_backbone("random-tiny"), load_sentence_model("hash:16"), batch_size=4
    )
    expected = Counter(reason for _, _, reason in faulty if reason)
    expected.update({rows.DAMAGED: 1} if container == "tar" else {})
    assert store.manifest["skipped"] == expected
    assert store.manifest["counts"]["rows"] == len(store) + expected.total()
    assert list(store.captions) == [f"caption {number}" for number in range(5)]
    sizes = [store.places().image(row).size for row in range(5)]
    assert sizes == [(30, 20), (30, 20), (30, 20), (20, 30), (30, 20)]  # the turned one is upright


def test_images_are_pinned_with_and_without_workers(monkeypatch):
    """torch does not pin where there is no GPU, so this looks at what the loader is asked for."""
    from torch.utils import data

    asked = []
    loader = data.DataLoader

    def recorded(*args, **options):
        asked.append((options["num_workers"], options["pin_memory"]))
        return loader(*args, **{**options, "pin_memory": False})

    monkeypatch.setattr(data, "DataLoader", recorded)
    for workers in (0, 1):
        assert list(run_ahead(abs, range(-3, 0), workers, "", pin_memory=True)) == [3, 2, 1]
    assert asked == [(0, True), (1, True)]
    assert list(run_ahead(abs, range(-3, 0), 0, "")) == [3, 2, 1] and len(asked) == 2
