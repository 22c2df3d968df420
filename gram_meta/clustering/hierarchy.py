"""The hierarchy that `gram cluster` writes: pairs in topics, images in visual domains."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec
import numpy as np

from gram_meta.config import flatten, stored_config
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import (
    Checksum,
    PathLike,
    atomic_write,
    check_type,
    check_unchanged,
    checksums,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from gram_meta.clustering.settings import ChcSettings
    from gram_meta.corpus.store import PairStore

FORMAT = 1
PAIRS = "hierarchy.parquet"
TOPICS = "topics.json"
FATES = "fates.npy"

# The fates of the store's pairs; files hold indices into FATE_NAMES: append only.
KEPT, FILTERED, NOISE, NO_WORD, FEW_IMAGES, FEW_DOMAINS, EXCLUDED = range(7)
FATE_NAMES = (
    "kept",
    "filtered",
    "noise",
    "topic without a word",
    "topic with too few images",
    "topic without two domains",
    "excluded",
)


@dataclass
class Topic:
    """One topic."""

    word: str  # its class name
    score: float  # of the word, by Eq. 3 (1 in a labelled collection)
    words: list[tuple[str, float]]  # the ten best, with their scores
    size: int  # number of pairs
    images: int  # number of distinct images
    domains: list[int]  # number of images in each domain


class _Fingerprints(TypedDict):
    store: str
    clip: str
    sentence_model: str


class _Content(TypedDict):
    """What is read from topics.json; hierarchies of earlier versions have these keys too."""

    store: str
    fingerprints: _Fingerprints
    config: dict[str, Any]
    pairs: dict[str, int]
    topics_found: int
    topics: list[Topic]


class _WithChecksums(_Content, total=False):
    reproducible: bool
    labelled: bool
    files: dict[str, Checksum]
    sha256: str


@dataclass
class Hierarchy:
    """Pairs organised into topics and visual domains.

    Attributes:
        pair: (n,) int64, rows of the kept pairs in the store, ascending.
        image: (n,) int64, row of each pair's image in the store.
        topic: (n,) int64, of each pair: 0 ... L-1, the largest first.
        domain: (n,) int64, of each pair in its topic: 0 ... U_l-1, the largest first. Pairs of one image in one topic
            share their domain; in another topic the image may be in another domain.
        topics: L topics.
        fates: (pairs of the store,) uint8, index into `FATE_NAMES`.
        manifest: fingerprints of the store and its models, the CHC settings, and numbers of pairs by their fates.
        path: its folder.
    """

    pair: np.ndarray
    image: np.ndarray
    topic: np.ndarray
    domain: np.ndarray
    topics: list[Topic]
    fates: np.ndarray
    manifest: dict[str, Any]
    path: Path | None = field(default=None, compare=False)

    def save(self, path: PathLike) -> None:
        """Write the folder `path`; `topics.json` is written last and marks it as complete."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = check_target(path)
        (path / TOPICS).unlink(missing_ok=True)
        columns = {"pair": self.pair, "image": self.image, "topic": self.topic, "domain": self.domain}
        with atomic_write(path / PAIRS) as file:
            pq.write_table(pa.table(columns), file)
        with atomic_write(path / FATES) as file:
            np.save(file, self.fates, allow_pickle=False)
        topics = [asdict(topic) for topic in self.topics]
        content = {**self.manifest, "files": checksums(path, (PAIRS, FATES)), "topics": topics}
        sums = {"sha256": _sha256(content)}
        write_json(path / TOPICS, {"kind": "hierarchy", "format": FORMAT, **content, **sums})
        self.path = path

    @classmethod
    def open(cls, path: PathLike, verify: bool = False) -> Hierarchy:
        """Read a hierarchy; `verify`: compare checksums of files even if their sizes and modification times are known.

        Raises `GramError` for no hierarchy, another format, or files that have changed or do not belong together.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if not (path / TOPICS).is_file():
            raise GramError(f"{path}: expected a hierarchy (a folder of `gram cluster`), found no {TOPICS} there")
        manifest = read_json(path / TOPICS)
        if not isinstance(manifest, dict) or manifest.pop("kind", None) != "hierarchy":
            raise GramError(f"{path / TOPICS}: expected the topics of a hierarchy, found something else")
        if (found := manifest.pop("format", None)) != FORMAT:
            raise GramError(f"{path}: expected a hierarchy of format {FORMAT}, found format {found}")
        digest = manifest.pop("sha256", None)  # earlier versions wrote no checksums
        if digest and digest != (found := _sha256(manifest)):
            raise GramError(f"{path / TOPICS}: expected SHA-256 {digest[:12]}, found {found[:12]}: it has changed")
        check_type(manifest, _WithChecksums, str(path / TOPICS))
        try:
            topics = msgspec.convert(manifest.pop("topics"), list[Topic])
            table = pq.read_table(path / PAIRS)
            pair, image, topic, domain = (table[name].to_numpy() for name in ("pair", "image", "topic", "domain"))
            fates = np.load(path / FATES, allow_pickle=False)
            files = manifest.pop("files", {})
            hierarchy = cls(pair, image, topic, domain, topics, fates, manifest, path)
            is_consistent = hierarchy._is_consistent()
        except (OSError, EOFError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise GramError(f"{path}: expected a whole hierarchy, found {in_one_line(error)}") from None
        if not is_consistent:
            raise GramError(f"{path}: expected files of one hierarchy, found {PAIRS}, {FATES} and {TOPICS} that differ")
        check_unchanged(path, files, verify)
        return hierarchy

    def _is_consistent(self) -> bool:
        """Return whether pairs, fates, and the numbers of topics, domains and pairs agree."""
        counts = np.bincount(self.fates, minlength=len(FATE_NAMES)).tolist() if self.fates.ndim == 1 else []
        expected = {"in": len(self.fates), **dict(zip(FATE_NAMES, counts, strict=False))}
        if expected != self.manifest["pairs"] or not np.array_equal(np.flatnonzero(self.fates == KEPT), self.pair):
            return False
        if not len(self.pair) or min(map(np.min, (self.image, self.topic, self.domain))) < 0:
            return not len(self.pair)
        if self.topic.max() >= len(self.topics):
            return False
        if np.bincount(self.topic, minlength=len(self.topics)).tolist() != [topic.size for topic in self.topics]:
            return False
        domains = np.array([len(topic.domains) for topic in self.topics])
        return bool((self.domain < domains[self.topic]).all())

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the topic and domain of each pair, and of the topics' words."""
        digest = hashlib.sha256()
        for column in (self.pair, self.image, self.topic, self.domain):
            digest.update(np.ascontiguousarray(column, dtype=np.int64).data)
        digest.update("\n".join(topic.word for topic in self.topics).encode())
        return digest.hexdigest()

    def check_store(self, store: PairStore) -> None:
        """Raise `GramError` if this hierarchy was not made from `store`."""
        for name, what, of_store in (
            ("clip", "CLIP", store.clip_fingerprint),
            ("sentence_model", "Sentence-BERT", store.sentence_fingerprint),
            ("store", "contents", store.fingerprint),
        ):
            made_from = self.manifest["fingerprints"][name]
            if made_from != of_store:
                raise GramError(
                    f"{self.path or 'hierarchy'}: was made from another store than {store.path}: expected "
                    f"{what} {made_from[:12]}, found {of_store[:12]}"
                )
        if len(self.fates) != len(store) or not np.array_equal(np.asarray(store.image)[self.pair], self.image):
            raise GramError(f"{self.path or 'hierarchy'}: expected pairs and images of {store.path}, found other rows")

    def check_labelled(self, labelled: bool) -> None:
        """Raise `GramError` unless the topics are classes (`labelled`) or were found by clustering (CHC.LABELLED)."""
        names = "topics found by clustering", "labelled classes"
        found = bool(self.manifest.get("labelled"))
        if found != labelled:
            expected = f"expected a hierarchy of {names[labelled]}, found one of {names[found]}"
            raise GramError(f"CHC.LABELLED is {labelled}: {expected}")

    def settings_used(self, config: CfgNode) -> CfgNode:
        """Return these settings with the node CHC that made this hierarchy, frozen; the same object if nothing differs.

        CHC.LABELLED stays as given, for `check_labelled`; so do keys that the hierarchy does not record.
        """
        made = flatten({"CHC": self.manifest.get("config", {}).get("CHC", {})})
        given = flatten(config)
        others = {key: value for key, value in made.items() if given.get(key, value) != value}
        others.pop("CHC.LABELLED", None)
        return stored_config({**given, **others}) if others else config

    def open_store(self, path: PathLike | None = None, verify: bool = False) -> PairStore:
        """Open and check the store this hierarchy was made from, at `path` or (None) in its former folder."""
        from gram_meta.corpus.store import PairStore

        store = PairStore.open(path or self.manifest["store"], verify)
        self.check_store(store)
        return store


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_target(path: PathLike) -> Path:
    """Return `path` if a hierarchy may be written there: it does not exist, is empty, or holds an older hierarchy."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise GramError(f"{path}: expected a folder for the hierarchy, found a file")
    visible = path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir())
    topics = (path / TOPICS).read_bytes()[:100] if (path / TOPICS).is_file() else b""
    if visible and not (b'"kind": "hierarchy"' in topics or (path / PAIRS).exists()):
        raise GramError(f"{path}: expected an empty folder or a hierarchy, found other files")
    return path


def finished_before(
    path: Path, store: PairStore, settings: ChcSettings, excluded: np.ndarray | None
) -> Hierarchy | None:
    """Return the hierarchy in `path` if it was made from this store with these settings; None if there is none.

    Meta-checkpoints refer to a hierarchy by its fingerprint, so it is not replaced unasked: a `GramError` is raised if
    `path` holds one of another store, with other settings, or with other `excluded` rows of images.
    """
    if not (path / TOPICS).is_file():
        return None
    before = Hierarchy.open(path)
    left_out = np.isin(store.image, [] if excluded is None else excluded)
    same = np.array_equal(before.fates == EXCLUDED, left_out)
    old = {"the store": before.manifest["fingerprints"]["store"][:12], **flatten(before.manifest["config"])}
    new = {"the store": store.fingerprint[:12], **flatten(settings.recorded)}
    read = (name for name in new if not name.startswith("TASKS.") or name.endswith("_SHOTS"))
    other = next((name for name in read if old.get(name, new[name]) != new[name]), "" if same else "--exclude")
    if other:
        values = f" {old[other]!r}, expected the same, found {new[other]!r}" if other in new else " of other images"
        advice = "meta-checkpoints may refer to it: choose another folder, or replace it with --force"
        raise GramError(f"{path}: holds a hierarchy made with {other}{values}; {advice}")
    return before
