"""WebDataset shards: tar files in which the members with the same key form a sample, as img2dataset writes them.

`000000012.jpg`, `000000012.txt` and `000000012.json` are one sample: their key is the path without the suffix. Keys may
have dots, as in `22.05.png`, `22.05.txt`. A shard is read in one pass over its headers, which give the place of each
image; image data is skipped, and no member is ever unpickled or unpacked to disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from gram_meta.corpus.open_shards import pread
from gram_meta.corpus.sources.format import Options, Peek, common_folder, is_tar, named_shards
from gram_meta.corpus.sources.rows import (
    BAD_UTF8,
    DAMAGED,
    DUPLICATE,
    EMPTY_CAPTION,
    EXTRA_IMAGE,
    IMAGE_SUFFIXES,
    LONG_CAPTION,
    MAX_CAPTION,
    NO_CAPTION_FILE,
    NO_MEMBER,
    UNREADABLE,
    Row,
    Shard,
    checked,
)
from gram_meta.corpus.sources.source import Source, relative_name
from gram_meta.errors import GramError

BLOCK = 512  # a tar is a row of blocks of this size
WINDOW = 8192  # bytes in one read: a header and the small members after it, not the next image
STRIDE = 1 << 20  # bytes in one read where a header has to be looked for
MAX_NAME = 64 << 10  # bytes of a long name's record; a longer one is damage
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


class Member(NamedTuple):
    """A file in a tar: its name (bytes), and the offset and size of its content."""

    name: bytes
    offset: int
    size: int


class _Window:
    """Reads a file at any offset, a little ahead."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.start = 0
        self.content = b""

    def read(self, offset: int, size: int) -> bytes:
        """Return at most `size` bytes from `offset`; fewer at the file's end."""
        begin = offset - self.start
        if begin < 0 or begin + size > len(self.content):
            self.content = pread(self.descriptor, max(size, WINDOW), offset)
            self.start, begin = offset, 0
        return self.content[begin : begin + size]


# --- members ------------------------------------------------------------------------------------------------


def members(window: _Window, end: int) -> Iterator[Member | None]:
    """Yield the regular files of a tar of `end` bytes, in their order; None for a damaged part.

    After damage, reading continues at the next valid header. Two blocks of zeros end a tar, but another tar may follow
    (`cat a.tar b.tar`), or the rest of a tar that lost a piece on disk: blocks of zeros are skipped.
    """
    attributes: dict[bytes, bytes] = {}
    position, long_name = 0, b""
    while position < end:
        header = window.read(position, BLOCK)
        if not header.strip(b"\0"):
            position = _after_zeros(window, position, end)
            continue
        size = _checked_size(header)
        if size is None or len(header) < BLOCK:
            yield None
            position, long_name, attributes = _next_header(window, position + BLOCK, end), b"", {}
            continue
        kind, start = header[156:157], position + BLOCK
        if kind in b"xgLK" and kind:  # describes the next member (g: all that follow, but never their names)
            content = window.read(start, size) if size <= MAX_NAME else None
            if content is None or len(content) < size:
                yield None
                position = _next_header(window, start, end)
                continue
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind == b"x":
                attributes = _attributes(content)
        else:
            if (stated := attributes.get(b"size", b"")).isdigit():
                size = int(stated)
            if kind in (b"0", b"\0", b"7"):
                yield Member(attributes.get(b"path") or long_name or _name(header), start, size)
            long_name, attributes = b"", {}
        position = start + -(-size // BLOCK) * BLOCK


def _checked_size(header: bytes) -> int | None:
    """Return the size that a header states, or None if its checksum is wrong: it is not a header."""
    stated = _number(header[148:156])
    if stated is None or sum(header[:148]) + sum(header[156:]) + 8 * 32 != stated:
        return None
    return _number(header[124:136])


def _number(field: bytes) -> int | None:
    if field[:1] == b"\x80":  # GNU: base 256, of sizes from 8 GB on
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        return prefix + b"/" + name
    return name


def _attributes(content: bytes) -> dict[bytes, bytes]:
    """Return the records "LENGTH KEY=VALUE\\n" of a pax header."""
    found: dict[bytes, bytes] = {}
    position = 0
    while position < len(content):
        length, space, _ = content[position : position + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, _, value = content[position + len(length) + 1 : position + int(length) - 1].partition(b"=")
        found[key] = value
        position += int(length)
    return found


def _after_zeros(window: _Window, position: int, end: int) -> int:
    """Return the position of the first block from `position` on that is not all zeros."""
    while position < end:
        content = pread(window.descriptor, min(STRIDE, end - position), position)
        rest = content.lstrip(b"\0")
        if rest:
            return position + (len(content) - len(rest)) // BLOCK * BLOCK
        position += len(content) or BLOCK
    return end


def _next_header(window: _Window, position: int, end: int) -> int:
    """Return the position of the first block from `position` on that is a header with a correct checksum."""
    while position < end:
        content = pread(window.descriptor, STRIDE, position)
        at = -1
        while (at := content.find(b"ustar", at + 1)) >= 0:
            begin = at - 257
            block = content[begin : begin + BLOCK] if begin >= 0 else b""
            if begin % BLOCK == 0 and len(block) == BLOCK and _checked_size(block) is not None:
                return position + begin
        position += STRIDE
    return end


# --- samples ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sample:
    """The members of a shard that have one key."""

    image: Member | None = None
    suffix: str = ""
    text: bytes | None = None
    json: Member | None = None
    is_extra: bool = False  # it is part of a sample that has another image
    is_given: bool = False  # its captions are those of an image with another key

    @property
    def has_caption(self) -> bool:
        return self.text is not None or self.json is not None


def _shard_rows(root: Path, name: str, caption: str | None = None) -> Iterator[Row]:
    """Yield the samples of the tar `root/name`, in the order in which their keys begin.

    The members of a sample need not be adjacent. If a key has two members of the same kind, the first is taken, and a
    second image is counted as a duplicate. Images of different shards are different, whatever their keys are.

    Args:
        caption: where captions are: the suffix of a text member, or a key of the JSON. None: `.txt`, and if that is
            missing or empty, "caption" in `.json`. A text member is one caption; a list in the JSON is several.

    Raises:
        GramError: no such file, or a compressed one.
    """
    with _open_shard(root / name) as file:
        end = os.fstat(file.fileno()).st_size
        if end == 0:
            yield Row("", "", DAMAGED)
        yield from _sample_rows(_Window(file.fileno()), end, name, caption)


def _open_shard(path: Path) -> BinaryIO:
    """Open a shard; raise `GramError` if that fails, or if it is compressed."""
    try:
        file = open(path, "rb", buffering=0)
        start = os.pread(file.fileno(), 6, 0)
    except OSError as error:
        raise GramError(f"{path}: expected a shard (a .tar file), found {error.strerror}") from None
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            file.close()
            raise GramError(
                f"{path}: expected an uncompressed .tar, found {kind}; single images cannot be read from a compressed "
                "tar: uncompress it first"
            )
    return cast(BinaryIO, file)


def _sample_rows(window: _Window, end: int, shard: str, caption: str | None) -> Iterator[Row]:
    text_suffix = caption.lower() if caption else "txt"
    samples: dict[str, _Sample] = {}
    for member in members(window, end):
        if member is None:
            yield Row("", "", DAMAGED)
            continue
        key, suffix = split_name(member.name, text_suffix)
        is_image, is_text = suffix in IMAGES, suffix == text_suffix
        if not key or not (is_image or is_text or suffix == "json"):
            continue
        sample = samples.setdefault(key, _Sample())
        if is_image and sample.image is None:
            sample.image, sample.suffix = member, suffix
        elif is_image and suffix == sample.suffix:  # `.jpg` and `.png` with one key are one sample
            yield Row("", "", DUPLICATE)
        elif is_text and sample.text is None:
            sample.text = window.read(member.offset, min(member.size, MAX_TEXT))  # it is in the window now
        elif suffix == "json" and sample.json is None:
            sample.json = member
    _pair_up(samples)
    for key, sample in samples.items():
        yield from _rows_of(window, end, shard, key, sample, caption)


def split_name(name: bytes, text_suffix: str = "txt") -> tuple[str, str]:
    """Return key and suffix of a member's name, the suffix in lower case; ("", "") if it is hidden or has no suffix.

    The suffix begins at the last dot, or is `text_suffix`, which may have dots. No file is ever written under a key;
    still it cannot point outside the shard: no leading slash, no "..".
    """
    folder, _, base = name.decode("utf-8", "surrogateescape").rpartition("/")
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


def _rows_of(window: _Window, end: int, shard: str, key: str, sample: _Sample, caption: str | None) -> Iterator[Row]:
    image = sample.image
    if image is None:
        if not sample.is_given:
            yield Row("", "", NO_MEMBER)
    elif sample.is_extra:
        yield Row("", "", EXTRA_IMAGE)
    elif image.offset + image.size > end:  # cut off where the shard ends
        yield Row("", "", DAMAGED)
    else:
        for text, skip in _captions(window, sample, caption):
            location = f"{shard}/{key}.{sample.suffix}"
            row = Row(location, "", skip) if skip else checked(location, text)
            yield row._replace(shard=shard, offset=image.offset, size=image.size)


def _captions(window: _Window, sample: _Sample, caption: str | None) -> list[tuple[str, str]]:
    """Return the captions of a sample, at least one, each with the reason why it cannot be used or ""."""
    if sample.text and sample.text.strip():
        if len(sample.text) == MAX_TEXT:
            return [("", LONG_CAPTION)]
        try:
            return [(sample.text.decode("utf-8-sig"), "")]
        except UnicodeDecodeError:
            return [("", BAD_UTF8)]
    nothing = [("", NO_CAPTION_FILE if sample.text is None else EMPTY_CAPTION)]
    if sample.json is None:
        return nothing
    try:
        content = json.loads(window.read(sample.json.offset, min(sample.json.size, MAX_JSON)))
    except (ValueError, RecursionError):  # cut off, not JSON, not UTF-8
        return [("", UNREADABLE)]
    key = caption or "caption"
    if not isinstance(content, dict) or key not in content:
        return nothing
    found = content[key]
    texts = found if isinstance(found, list) and found else [found]
    return [(text, "") if isinstance(text, str) else ("", EMPTY_CAPTION) for text in texts]
