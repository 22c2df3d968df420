"""Sources in shards: WebDataset tars and Parquet with images inside, whole and damaged, and single images out of them."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from gram_meta.corpus import rows
from gram_meta.corpus.places import ImageReader
from gram_meta.corpus.readers import open_source
from gram_meta.errors import GramError


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


def rows_of(path, **options):
    return list(open_source(path, **options).rows())


def good(found):
    return [(row.location, row.caption) for row in found if not row.skip]


def skips(found):
    return Counter(row.skip for row in found if row.skip)


@pytest.fixture
def shards(tmp_path):
    """Three shards of four samples as img2dataset leaves them, with its other files beside them."""
    for shard in range(3):
        keys = [f"{shard:05d}{number:04d}" for number in range(4)]
        members = [
            member for key in keys for member in sample(key, f"caption {key}", caption="other", width=20)
        ]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"not the corpus")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    return tmp_path


def test_shards_of_img2dataset_are_read_in_their_order(shards):
    source = open_source(shards)
    found = list(source.rows())
    keys = [f"{shard:05d}{number:04d}" for shard in range(3) for number in range(4)]
    assert source.kind == "webdataset"
    assert good(found) == [(f"{key[:5]}.tar/{key}.jpg", f"caption {key}") for key in keys]
    assert [shard.name for shard in source.shards()] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [row for shard in source.shards() for row in shard.rows()] == found
    assert source.identity()["shards"] == {
        f"{n:05d}.tar": (shards / f"{n:05d}.tar").stat().st_size for n in range(3)
    }


def test_single_images_are_read_at_random(shards):
    source = open_source(shards)
    reader = ImageReader(source.image_root, source.identity()["shards"])
    found = list(source.rows())
    for row in [found[index] for index in (7, 0, 11, 3, 7)]:
        assert reader.content(row.place) == picture(int(row.location[-13:-4]))
        image, digest = reader.image(row.place)
        assert image.size == (20, 24) and any(digest)


def test_a_shard_that_has_changed_or_vanished_is_named(shards):
    source = open_source(shards)
    sizes, found = source.identity()["shards"], list(source.rows())
    with open(shards / "00001.tar", "ab") as file:
        file.write(bytes(512))
    (shards / "00002.tar").unlink()
    reader = ImageReader(source.image_root, sizes)
    with pytest.raises(GramError, match="00001.tar: expected the shard that was embedded, of .* has changed"):
        reader.content(found[4].place)
    with pytest.raises(
        GramError, match="00002.tar: expected the shard that was embedded, found No such file"
    ):
        reader.content(found[8].place)
    with pytest.raises(GramError, match="00002.tar: expected a shard"):
        list(source.rows())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{00000..00001}.tar", 8),
        ("{00002,00000}.tar", 8),
        ("*.tar", 12),
        ("0000[12].tar", 8),
        ("00001.tar", 4),
    ],
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
    assert (
        len(good(read(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512)))) == 6
    )  # no zeros at its end
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
