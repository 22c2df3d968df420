"""Whole files: JSON, hashes, atomic writes (a temporary file that is renamed), folders with an owner, copied output.

This package removes no folder but those that it has marked as its own (`claim_folder`, `remove_claimed`).
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Any, TextIO, TypedDict

import msgspec

from gram_meta.errors import GramError, as_gram_error

PathLike = str | os.PathLike[str]

_OPTION = re.compile(r"(--[\w-]+=|-\w)?(~.*)", re.DOTALL)  # of a command line: a value, perhaps with its option

# Types for the schemas of JSON files; a larger whole number is no exact float
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Number = Annotated[float, msgspec.Meta(ge=0, le=2**53)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
LEVELS = 64  # of nested lists and objects in a JSON file, at most
MARK = ".gram-owner"  # the file in a folder that names what made it


def expand_home(value: Any) -> Any:
    """Return a path, `--option=PATH` or a list of them with the home folder for `~`; any other value as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(expand_home, value))
    match = _OPTION.fullmatch(value) if isinstance(value, str) else None
    return f"{match[1] or ''}{os.path.expanduser(match[2])}" if match else value


@contextmanager
def atomic_write(path: PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; rename it to `path` when the block ends without an error.

    A reader, also after a run was killed half-way, sees the old file or the new one, never a part of a file. Raises
    `GramError` if the file cannot be written, such as on a full disk.
    """
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    with as_gram_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            os.fchmod(handle, 0o666 & ~_umask())  # mkstemp's 0600 would make results unreadable to others
            with os.fdopen(handle, mode, encoding=encoding) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


def remove_unfinished(folder: PathLike) -> None:
    """Remove what `atomic_write` left in a folder when its process was killed; no other process may write there."""
    for path in Path(folder).glob(".*.????????.part"):
        if path.is_file():
            path.unlink(missing_ok=True)


def check_claimed(folder: PathLike, owner: str) -> None:
    """Raise `GramError` unless a folder does not exist, is empty, or carries the mark of `owner`."""
    folder = Path(folder)
    mark = folder / MARK
    if mark.is_file() and mark.read_text(encoding="utf-8", errors="replace") == owner:
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise GramError(f"{folder}: expected nothing there, or what this run made, found other files; move them away")


def claim_folder(folder: PathLike, owner: str) -> None:
    """Make a folder and mark it as made by `owner`; errors as of `check_claimed`."""
    check_claimed(folder, owner)
    with atomic_write(Path(folder) / MARK, "w") as file:
        file.write(owner)


def remove_claimed(folder: PathLike, owner: str) -> None:
    """Remove a folder that `owner` made; errors as of `check_claimed`."""
    check_claimed(folder, owner)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_folder(folder: PathLike, owner: str) -> Iterator[Path]:
    """Yield a new folder beside `folder` to fill; rename it to `folder` when the block ends without an error.

    `owner` names in the mark what is made; what the same owner made before is replaced. Raises `GramError` for other
    files in `folder`, or in the unfinished folder beside it.
    """
    folder = Path(folder)
    check_claimed(folder, owner)
    beside = folder.with_name(f".{folder.name}.part")
    remove_claimed(beside, owner)
    claim_folder(beside, owner)
    try:
        yield beside
        remove_claimed(folder, owner)
        beside.rename(folder)
    except BaseException:
        remove_claimed(beside, owner)
        raise


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically; errors as of `to_json`."""
    with atomic_write(path, "w") as file:
        file.write(to_json(value, str(path), indent=2) + "\n")


def to_json(value: Any, where: str, **layout: Any) -> str:
    """Return `value` as JSON; `layout` as for `json.dumps`. Bytes of a path that are no text are escaped.

    Raises `GramError` for a number that is NaN or infinite, which JSON has no form for.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, **layout)
    except ValueError as error:
        raise GramError(f"{where}: expected finite numbers to write, found others ({error})") from None
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):x}", text)


def write_arrays(path: PathLike, arrays: Mapping[str, Any], compress: bool = False) -> None:
    """Write an .npz file of named arrays, atomically."""
    import numpy as np

    with atomic_write(path) as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)


def read_arrays(path: PathLike) -> dict[str, Any]:
    """Return the arrays of an .npz file by name; {} if the file is missing or damaged."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception:  # noqa: BLE001 - a truncated archive raises errors of several classes
        return {}


def read_json(path: PathLike, schema: Any = Any) -> Any:
    """Return the contents of a JSON file of the type `schema`, such as a TypedDict; see `check_type`.

    Raises `GramError` for a file that does not exist or cannot be read, is not JSON, or is of another type.
    """
    return parse_json(read_text(path), str(path), schema)


def read_text(path: PathLike) -> str:
    """Return the contents of a file of UTF-8 text; raise `GramError` if it cannot be read, or is no such text."""
    try:
        with as_gram_error(path, "cannot be read"):
            return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GramError(f"{path}: expected UTF-8 text, found something else ({error})") from None


def parse_json(text: str | bytes, where: str, schema: Any = Any) -> Any:
    """Return the value of a JSON text; `where` names it in errors, which are those of `read_json`."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise GramError(f"{where}: expected JSON, found something else ({error})") from None
    level = [value]
    for _ in range(LEVELS):
        groups = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [child for group in groups for child in group]
    if level:
        raise GramError(f"{where}: expected JSON of at most {LEVELS} levels, found more")
    return check_type(value, schema, where)


def check_type(value: Any, schema: Any, where: str) -> Any:
    """Return `value` if it has the type `schema`; keys that a TypedDict does not name may have any value.

    Raises `GramError` for another type, a number out of range, or a missing key; the sentence names its place.
    """
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        what, _, place = str(error).replace("`", "").partition(" - at $")
        what = re.sub("Object missing required field (.*)", r"Expected the key \1, found none", what)
        what = what.replace("Invalid enum value", "Expected another value, found")
        key = f"{place.lstrip('.')}: " if place else ""
        raise GramError(f"{where}: {key}{what[0].lower()}{what[1:].replace(', got ', ', found ')}") from None
    return value


class Tee:
    """Writes to the console and, after `keep`, also to a file: a run that cannot be built leaves no folder behind."""

    def __init__(self, console: TextIO, path: Path, mode: str) -> None:
        self.console, self.path, self.mode = console, path, mode
        self.file: IO[str] | None = None
        self.before: list[str] = []

    def keep(self) -> None:
        """Open the file, and write to it from now on."""
        with as_gram_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, self.mode, encoding="utf-8", buffering=1)  # noqa: SIM115, closed by close()
            self.file.write("".join(self.before))
        self.before.clear()

    def write(self, text: str) -> int:
        self.console.write(text)
        if self.file is None:
            self.before.append(text)
        else:
            with as_gram_error(self.path):
                self.file.write(text)
        return len(text)

    def flush(self) -> None:
        self.console.flush()
        if self.file is not None:
            with as_gram_error(self.path):
                self.file.flush()

    def isatty(self) -> bool:
        return self.console.isatty()

    @property
    def encoding(self) -> str:
        return self.console.encoding

    def close(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            with as_gram_error(self.path):
                file.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def sha256_file(path: PathLike) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with as_gram_error(path, "cannot be read"), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_once(path: PathLike, anew: bool = False) -> str:
    """Return a file's SHA-256, from a cache unless the file's size or modification time has changed, or `anew` is set.

    The cache is one small file per path in ~/.cache/gram-meta (or $XDG_CACHE_HOME); it is not needed.
    """
    path = Path(path).resolve()
    found = path.stat()
    state = f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
    note = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gram-meta", "sha256")
    note /= hashlib.sha256(os.fsencode(path)).hexdigest()
    with suppress(OSError, ValueError):
        before, digest = note.read_text().split("\n")
        if before == state and len(digest) == 64 and not anew:
            return digest
    digest = sha256_file(path)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{state}\n{digest}")
    return digest


class ModelFacts(TypedDict):
    """The name of a model, and the SHA-256 of its weights."""

    name: str
    fingerprint: str


class Checksum(TypedDict):
    """A file's size in bytes and its SHA-256."""

    bytes: Count
    sha256: str


def checksums(folder: Path, names: Iterable[str]) -> dict[str, Checksum]:
    """Return for each of these files in a folder its size in bytes and its SHA-256."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_once(folder / name)} for name in names}


def check_unchanged(folder: Path, expected: Mapping[str, Checksum], anew: bool = False) -> None:
    """Compare files in a folder with their `checksums`; raise `GramError` if one has changed.

    `anew`: read them also if size and time are unchanged.
    """
    for name, facts in expected.items():
        path, size, sha256 = folder / name, facts["bytes"], facts["sha256"]
        if (found := path.stat().st_size) != size:
            raise GramError(f"{path}: expected {size} bytes, found {found}: it has changed")
        if (digest := sha256_once(path, anew)) != sha256:
            raise GramError(f"{path}: expected SHA-256 {sha256[:12]}, found {digest[:12]}: it has changed")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
