"""Few-shot subsets: drawn as CoOp draws them, and kept in `split_fewshot/` so that every run has the same.

Runs read `shot_<n>-seed_<s>.json`, which has relative paths. `shot_<n>-seed_<s>.pkl` beside it is for CoOp's own code:
it is written with the present absolute paths, and renewed when they change. Without a JSON, CoOp's own pickle is read.
"""

import hashlib
import json
import os
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gram_meta.datasets.pickles import Record, read_pickle, relative_to, write_pickle
from gram_meta.errors import GramError
from gram_meta.files import read_json, sha256_file, write_json

Entry = tuple[str, int, str]  # path relative to the folder of images, label, class name
Splits = dict[str, list[Entry]]  # "train", "val", "test"

MAX_VAL_SHOTS = 4  # CoOp's: validation never takes more than this many images of a class


@dataclass(frozen=True)
class FewShot:
    """The few-shot subsets of one dataset."""

    folder: Path  # `split_fewshot`
    images: Path  # the folder that relative paths start from
    source: str  # the origin of the subsets, for messages
    fingerprint: str  # SHA-256 of the source
    parts: tuple[str, ...] = ("train", "val")  # "train" and "val", or "train" alone if all validation images are used

    def subset(self, splits: Splits, shots: int, seed: int) -> tuple[Splits, dict[str, str]]:
        """Return the splits with `shots` training images per class (validation: at most 4), and their JSON file.

        The file is {"path", "sha256"}. An existing one is used. Otherwise the subset is drawn and stored; it stays in
        memory, and the path is empty, if the folder cannot be written or the seed is negative.
        """
        path = self.folder / f"shot_{shots}-seed_{seed}.json"
        pickled = path.with_suffix(".pkl")
        if seed < 0:
            drawn = self._draw(splits, shots, random)
        elif path.is_file():
            drawn = self._stored(path, splits)
            self._check_classes(path, drawn, splits, shots)
        elif pickled.is_file():
            drawn = self._taken_over(pickled, splits)
            self._check_classes(pickled, drawn, splits, shots)
        else:  # as `random` would draw right after Dassl has seeded it; the global generator keeps its state
            drawn = self._draw(splits, shots, random.Random(seed))
        contents = {"format": 1, "shots": shots, "seed": seed, "split_sha256": self.fingerprint, **drawn}
        text = json.dumps(contents, indent=2, ensure_ascii=False) + "\n"  # as write_json writes it
        facts = {"path": "", "sha256": hashlib.sha256(text.encode()).hexdigest()}
        if seed >= 0 and (path.is_file() or _written(path, contents)):
            facts = {"path": os.fspath(path), "sha256": sha256_file(path)}
            self._export(pickled, drawn)
        return {**splits, **drawn}, facts

    def _draw(self, splits: Splits, shots: int, draw: Any) -> Splits:
        print(f"Creating a {shots}-shot dataset")
        wanted = {"train": shots, "val": min(shots, MAX_VAL_SHOTS)}
        return {part: _sample(splits[part], wanted[part], draw) for part in self.parts}

    def _stored(self, path: Path, splits: Splits) -> Splits:
        print(f"Loading preprocessed few-shot data from {path}")
        stored = read_json(path)
        try:
            source = stored["split_sha256"]
            drawn = {part: as_entries(stored[part]) for part in self.parts}
        except (KeyError, TypeError, ValueError):
            raise _refused(path, "expected a few-shot subset, found other contents") from None
        if source != self.fingerprint:
            raise _refused(path, f"was drawn from something else than the {self.source} there now")
        for part in self.parts:
            known = set(splits[part])
            if unknown := [entry for entry in drawn[part] if entry not in known]:
                raise self._not_there(path, part, unknown[0][0])
        return drawn

    def _not_there(self, path: Path, part: str, image: str) -> GramError:
        return _refused(path, f"names {image}, which is no {part} image of the {self.source} there now")

    def _check_classes(self, path: Path, drawn: Splits, splits: Splits, shots: int) -> None:
        """Raise `GramError` unless a subset has at least one training image of each class, and at most `shots`."""
        counts = {part: Counter(label for _, label, _ in drawn[part]) for part in drawn}
        classes = {label for _, label, _ in splits["train"]}
        if missing := classes - set(counts["train"]):
            wanted = f"training images of all {len(classes)} classes"
            raise _refused(path, f"expected {wanted}, found none of {len(missing)} of them")
        if (most := max(n for counter in counts.values() for n in counter.values())) > shots:
            raise _refused(path, f"expected at most {shots} images of a class, found {most}")

    def _taken_over(self, path: Path, splits: Splits) -> Splits:
        """Return the subset in a pickle of CoOp's, with the present paths of its images."""
        print(f"Loading preprocessed few-shot data from {path}")
        records = read_pickle(path)
        drawn: Splits = {}
        for part in self.parts:
            if part not in records and splits[part]:
                raise _refused(path, f"expected images under {part!r}, found none")
            known = {entry[0]: entry for entry in splits[part]}
            drawn[part] = [self._known(path, part, record, known) for record in records.get(part, [])]
        self._note_names(path, records, drawn)
        return drawn

    def _known(self, path: Path, part: str, record: Record, known: dict[str, Entry]) -> Entry:
        image, label, _ = record
        end = relative_to(image, known)
        if end is None:
            raise self._not_there(path, part, image)
        if known[end][1] != label:
            now = f"{known[end][1]} as in the {self.source} there now"
            raise _refused(path, f"gives {end} the label {label}, expected {now}")
        return known[end]

    def _note_names(self, path: Path, records: dict[str, list[Record]], drawn: Splits) -> None:
        pairs = [pair for part in drawn for pair in zip(records.get(part, []), drawn[part], strict=True)]
        if other := sorted({(old[2], entry[2]) for old, entry in pairs if old[2] != entry[2]}):
            print(
                f"Note: {path} calls {len(other)} classes by other names ({other[0][0]!r} for {other[0][1]!r}, ...); "
                f"those of the {self.source} hold"
            )

    def _export(self, path: Path, drawn: Splits) -> None:
        """Write the pickle for CoOp's own code, or renew its paths; a pickle with another subset is not changed."""
        wanted = {
            part: [(os.path.join(self.images, image), label, name) for image, label, name in entries]
            for part, entries in drawn.items()
        }
        try:
            if path.is_file():
                try:
                    found = read_pickle(path)
                except GramError as error:
                    print(f"Note: {error}; it is left alone, the JSON beside it holds")
                    return
                if found == wanted:
                    return
                if not _same_images(found, drawn):
                    print(
                        f"Note: {path} holds another subset than the JSON beside it; the JSON holds here, and CoOp's "
                        "own code would use the pickle: remove the one that is not meant"
                    )
                    return
            write_pickle(path, wanted)
        except (GramError, OSError) as error:
            print(f"Note: {error}")


def _refused(path: Path, why: str) -> GramError:
    return GramError(f"{path}: {why}; remove it to draw anew")


def as_entries(rows: Any) -> list[Entry]:
    """Convert rows of a JSON file; raise `TypeError` or `ValueError`, which names what was found, for another form."""
    if not isinstance(rows, list):
        raise TypeError(f"{str(rows)[:60]!r} for a list of rows")
    entries = []
    for row in rows:
        if not isinstance(row, list) or tuple(map(type, row)) != (str, int, str):
            raise TypeError(f"another row: {str(row)[:60]}")
        f"{row[0]}{row[2]}".encode()  # a ValueError for half of a surrogate pair, which no file can hold
        entries.append((row[0], row[1], row[2]))
    return entries


def _written(path: Path, contents: dict[str, Any]) -> bool:
    try:
        write_json(path, contents)
    except GramError as error:
        print(f"Note: {error}; the few-shot data stays in memory")
        return False
    print(f"Saving preprocessed few-shot data to {path}")
    return True


def _sample(entries: list[Entry], shots: int, draw: Any) -> list[Entry]:
    """Draw `shots` entries of each label (all, if it has fewer), labels in the order of their first entry."""
    by_label: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_label[entry[1]].append(entry)
    drawn: list[Entry] = []
    for group in by_label.values():
        drawn.extend(draw.sample(group, shots) if len(group) >= shots else group)
    return drawn


def _same_images(found: dict[str, list[Record]], drawn: Splits) -> bool:
    """Return whether a pickle has these images in this order, in any folder."""
    if {part: len(records) for part, records in found.items()} != {part: len(rows) for part, rows in drawn.items()}:
        return False
    pairs = [pair for part in drawn for pair in zip(found[part], drawn[part], strict=True)]
    return all(old[1] == entry[1] and relative_to(old[0], {entry[0]}) is not None for old, entry in pairs)
