"""WebDataset shards: tar files in which the members with the same key form a sample, as img2dataset writes them.

`000000012.jpg`, `000000012.txt` and `000000012.json` are one sample: their key is the path without the suffix. Keys may
have dots, as in `22.05.png`, `22.05.txt`. A shard is read in one pass over its headers, which give the place of each
image; image data is skipped, and no member is ever unpickled or unpacked to disk.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tarfile import BLOCKSIZE, HeaderError, TarInfo
from types import SimpleNamespace
from typing import Any, BinaryIO

from gram_meta.corpus.sources import rows as reasons
from gram_meta.corpus.sources.format import Options, Peek, common_folder, is_tar, named_shards
from gram_meta.corpus.sources.rows import IMAGE_SUFFIXES, MAX_CAPTION, Row, Shard, Source, checked, relative_name
from gram_meta.errors import GramError

WINDOW = 8192  # bytes in one read: a header and the small members after it, not the next image
STRIDE = 1 << 20  # bytes in one read where a header has to be looked for
MAX_TEXT = 4 * MAX_CAPTION + 64  # bytes of a caption's member, in UTF-8
MAX_JSON = 4 << 20  # bytes of a sample's JSON; a longer one is not about one image
IMAGES = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


class WebDataset:
    """Tar shards; each of them can be read by itself."""

    name = "webdataset"
    title = "tar shards"
    options = frozenset({"caption_column"})

    def claims(self, path: Path, peek: Peek) -> bool:
        return bool(peek.files) and all(map(is_tar, peek.files))

    def open(self, path: Path, options: Options) -> Source:
        if path.is_file():
            files = [Path(os.path.abspath(path))]  # also a tar that is not called .tar
        else:
            files = named_shards(path, is_tar, self.title)
        _open_shard(files[0]).close()
        root = common_folder(files, options.image_root)
        shown = Path(os.path.abspath(path))
        return Source(shown, self.name, root, caption_column=options.caption_column, files=tuple(files))

    def shards(self, source: Source) -> list[Shard]:
        names = [relative_name(source.image_root, file) for file in source.files]
        return [Shard(name, partial(_shard_rows, source.image_root, name, source.caption_column)) for name in names]


# --- members ------------------------------------------------------------------------------------------------


def members(file: BinaryIO, end: int) -> Iterator[TarInfo | None]:
    """Yield the regular files of a tar of `end` bytes, in their order; None for a damaged part.

    After damage, reading continues at the next valid header. Two blocks of zeros end a tar, but another tar may follow
    (`cat a.tar b.tar`), or the rest of a tar that lost a piece on disk: blocks of zeros are skipped.
    """
    tar: Any = SimpleNamespace(fileobj=file, encoding="utf-8", errors="surrogateescape", pax_headers={}, offset=0)
    position = 0
    while position < end:
        tar.offset = position
        file.seek(position)
        try:
            member = TarInfo.fromtarfile(tar)
        except (HeaderError, ValueError, RecursionError):  # of a number in a pax header; of headers without a member
            file.seek(position)
            if file.read(BLOCKSIZE).strip(b"\0"):
                yield None
                position = _next_block(file, position + BLOCKSIZE, _is_header)
            else:
                position = _next_block(file, position, lambda block: bool(block.strip(b"\0")))
            continue
        if member.isreg() and not member.issparse() and member.size >= 0:
            yield member
        position = max(tar.offset, position + BLOCKSIZE)


def _next_block(file: BinaryIO, position: int, is_wanted: Callable[[bytes], bool]) -> int:
    """Return the position of the first wanted block from `position` on; without one, the end of the file."""
    file.seek(position)
    while content := file.read(STRIDE):
        for start in range(0, len(content), BLOCKSIZE):
            if is_wanted(content[start : start + BLOCKSIZE]):
                return position + start
        position += len(content)
    return position


def _is_header(block: bytes) -> bool:
    """Return whether a block is a header with a correct checksum."""
    try:
        return block[257:262] == b"ustar" and bool(TarInfo.frombuf(block, "utf-8", "surrogateescape"))
    except HeaderError:
        return False


# --- samples ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sample:
    """The members of a shard that have one key."""

    image: TarInfo | None = None
    suffix: str = ""
    text: bytes | None = None
    json: TarInfo | None = None
    is_extra: bool = False  # it is part of a sample that has another image
    is_given: bool = False  # its captions are those of an image with another key

    @property
    def has_caption(self) -> bool:
        return self.text is not None or self.json is not None


def _shard_rows(root: Path, name: str, caption: str | None = None) -> Iterator[Row]:
    """Yield the samples of the tar `root/name`, in the order in which their keys begin; their members may be apart.

    `caption` is the suffix of a text member (one caption), or a key of the JSON (one, or a list); None: `.txt`, and if
    that is missing or empty, "caption" in `.json`. Of two members of one kind under a key the first is taken.
    """
    with _open_shard(root / name) as file:
        end = os.fstat(file.fileno()).st_size
        if end == 0:
            yield Row("", "", reasons.DAMAGED)
        yield from _sample_rows(file, end, name, caption)


def _open_shard(path: Path) -> BinaryIO:
    """Open a shard; raise `GramError` if that fails, or if it is compressed."""
    try:
        file = open(path, "rb", buffering=WINDOW)
        start = file.read(6)
    except OSError as error:
        raise GramError(f"{path}: expected a shard (a .tar file), found {error.strerror}") from None
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            file.close()
            raise GramError(
                f"{path}: expected an uncompressed .tar, found {kind}: uncompress it, to read single images"
            )
    return file


def _sample_rows(file: BinaryIO, end: int, shard: str, caption: str | None) -> Iterator[Row]:
    text_suffix = caption.lower() if caption else "txt"
    samples: dict[str, _Sample] = {}
    for member in members(file, end):
        if member is None:
            yield Row("", "", reasons.DAMAGED)
            continue
        key, suffix = _split_name(member.name, text_suffix)
        is_image, is_text = suffix in IMAGES, suffix == text_suffix
        if not key or not (is_image or is_text or suffix == "json"):
            continue
        sample = samples.setdefault(key, _Sample())
        if is_image and sample.image is None:
            sample.image, sample.suffix = member, suffix
        elif is_image:  # `.jpg` and `.png` with one key are one sample
            yield Row("", "", reasons.DUPLICATE if suffix == sample.suffix else reasons.EXTRA_IMAGE)
        elif is_text and sample.text is None:
            sample.text = _content(file, member, MAX_TEXT)  # mostly in the file's buffer now
        elif suffix == "json" and sample.json is None:
            sample.json = member
    _pair_up(samples)
    for key, sample in samples.items():
        yield from _rows_of(file, end, shard, key, sample, caption)


def _content(file: BinaryIO, member: TarInfo, most: int) -> bytes:
    """Return at most `most` bytes of a member; fewer where the shard ends."""
    file.seek(member.offset_data)
    return file.read(min(member.size, most))


def _split_name(name: str, text_suffix: str = "txt") -> tuple[str, str]:
    """Return key and suffix of a member's name, the suffix in lower case; ("", "") if it is hidden or has no suffix.

    The suffix begins at the last dot, or is `text_suffix`, which may have dots. No file is ever written under a key;
    still it cannot point outside the shard: no leading slash, no "..".
    """
    folder, _, base = name.rpartition("/")
    size = len(text_suffix) if base.lower().endswith(f".{text_suffix}") else len(base) - base.rfind(".") - 1
    stem, suffix = base[: -size - 1], base[-size:].lower()
    if not size or not stem or base.startswith("."):
        return "", ""
    parts = ["%2E%2E" if part == ".." else part for part in folder.split("/") if part not in ("", ".")]
    return "/".join([*parts, stem]), suffix


def _pair_up(samples: dict[str, _Sample]) -> None:
    """Pair images without a caption and captions without an image, if one key is the beginning of the other's.

    Of several keys the longest is taken: `a.left.jpg` belongs to `a.txt`, `a.jpg` to `a.en.txt`. A caption has one
    image: the mask `a.mask.png` beside `a.jpg` and `a.txt` is an extra image, which is counted, but not used.
    """
    for key, sample in samples.items():
        if sample.image is not None and not sample.has_caption:
            shorter = (samples[name] for name in _beginnings(key) if name in samples and samples[name].has_caption)
            if other := next(shorter, None):
                sample.is_extra = other.image is not None or other.is_given
                if not sample.is_extra:
                    sample.text, sample.json, other.is_given = other.text, other.json, True
    for key, sample in samples.items():
        if sample.image is None and not sample.is_given:
            other = next((samples[name] for name in _beginnings(key) if name in samples), None)
            if other and other.image is not None and not other.has_caption:
                other.text, other.json, sample.is_given = sample.text, sample.json, True


def _beginnings(key: str) -> Iterator[str]:
    """Yield the key without its last dotted part, without the last two, and so on."""
    start = key.rfind("/") + 2
    while (dot := key.rfind(".", start)) > 0:
        key = key[:dot]
        yield key


def _rows_of(file: BinaryIO, end: int, shard: str, key: str, sample: _Sample, caption: str | None) -> Iterator[Row]:
    image = sample.image
    if image is None:
        if not sample.is_given:
            yield Row("", "", reasons.NO_MEMBER)
    elif sample.is_extra:
        yield Row("", "", reasons.EXTRA_IMAGE)
    elif image.offset_data + image.size > end:  # cut off where the shard ends
        yield Row("", "", reasons.DAMAGED)
    else:
        for text, skip in _captions(file, sample, caption):
            location = f"{shard}/{key}.{sample.suffix}"
            row = Row(location, "", skip) if skip else checked(location, text)
            yield row._replace(shard=shard, offset=image.offset_data, size=image.size)


def _captions(file: BinaryIO, sample: _Sample, caption: str | None) -> list[tuple[str, str]]:
    """Return the captions of a sample, at least one, each with the reason why it cannot be used or ""."""
    if sample.text and sample.text.strip():
        if len(sample.text) == MAX_TEXT:
            return [("", reasons.LONG_CAPTION)]
        try:
            return [(sample.text.decode("utf-8-sig"), "")]
        except UnicodeDecodeError:
            return [("", reasons.BAD_UTF8)]
    nothing = [("", reasons.NO_CAPTION_FILE if sample.text is None else reasons.EMPTY_CAPTION)]
    if sample.json is None:
        return nothing
    try:
        content = json.loads(_content(file, sample.json, MAX_JSON))
    except (ValueError, RecursionError):  # cut off, not JSON, not UTF-8
        return [("", reasons.UNREADABLE)]
    key = caption or "caption"
    if not isinstance(content, dict) or key not in content:
        return nothing
    found = content[key]
    texts = found if isinstance(found, list) and found else [found]
    return [(text, "") if isinstance(text, str) else ("", reasons.EMPTY_CAPTION) for text in texts]
