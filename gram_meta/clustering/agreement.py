"""The agreement of a hierarchy with a table of known facts."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gram_meta.clustering.hierarchy import EXCLUDED, FILTERED, NOISE, Hierarchy
from gram_meta.corpus.sources.format import read_rows
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import PathLike

OF_TOPICS = ("concept", "group", "subgroup", "style", "source")
OF_DOMAINS = ("style", "source", "concept")
WRONG = "caption_is_wrong"
_YES, _NO = ("1", "true", "yes"), ("0", "false", "no", "")

Report = dict[str, Any]


def read_truth(path: PathLike) -> dict[str, list[str]]:
    """Read the columns, as strings, of a TSV or CSV file of known facts.

    It has a column `image` (locations in the corpus), any of `concept`, `group`, `subgroup`, `style`, `source` and
    `caption_is_wrong`, and optionally `caption`: with it the facts are about pairs, else about images.

    Raises:
        GramError: no such file, no column `image`, or no column of facts.
    """
    path = Path(path)
    try:
        rows = read_rows(path)
    except OSError as error:
        raise GramError(f"{path}: expected a table of known facts, found none ({error.strerror or error})") from None
    whole = [row for row in rows if len(row) == len(rows[0])]
    columns = {name: list(column) for name, *column in zip(*whole, strict=True)}
    facts = [name for name in columns if name in {*OF_TOPICS, WRONG}]
    if "image" not in columns or not facts:
        wanted, found = ", ".join(OF_TOPICS), ", ".join(columns) or "no columns"
        raise GramError(f"{path}: expected a column image and any of {wanted} and {WRONG}, found {found}")
    return {name: columns[name] for name in ("image", "caption", *facts) if name in columns}


def agreement(hierarchy: Hierarchy, store: PairStore, truth: Mapping[str, Sequence[str]]) -> Report:
    """Compare a hierarchy with a truth from `read_truth`.

    Returns:
        topics: for each fact, its adjusted mutual information (1: the same partition, 0: chance) with the topics, over
            the pairs in topics (`all`) and over those with right captions (`right captions`).
        domains: for each fact, its adjusted mutual information with the domains inside a topic: the mean over the
            topics in which the fact varies (their number is `topics`), weighted by images.
        noise: share of noise among the pairs that passed the filter. in_topics: share of all pairs that are in topics.
        filter: numbers of wrong and of dropped captions, precision and recall of the filter on wrong captions, the
            share of right captions that passed, the share of wrong captions among pairs in topics.
        matched: pairs of the store that the truth has.
    """
    row = _rows(store, truth)
    known = row >= 0
    if not known.any():
        raise GramError(
            f"truth: expected images (and captions) of {store.path}, found none of them; its images look "
            f"like {store.locations[0]!r}, those of the truth like {truth['image'][0] if truth['image'] else ''!r}"
        )
    wrong = _is_wrong(truth)[row] & known if WRONG in truth else np.zeros(len(row), bool)
    report: Report = {"matched": int(known.sum()), "topics": {}, "domains": {}}

    member = known[hierarchy.pair]
    right = member & ~wrong[hierarchy.pair]
    for name in OF_TOPICS:
        if name in truth:
            label = _codes(truth[name])[row[hierarchy.pair]]
            report["topics"][name] = {
                "all": _ami(label[member], hierarchy.topic[member]),
                "right captions": _ami(label[right], hierarchy.topic[right]),
            }
    for name in OF_DOMAINS:
        if name in truth:
            report["domains"][name] = _domain_agreement(hierarchy, member, _codes(truth[name])[row[hierarchy.pair]])

    passed = int((~np.isin(hierarchy.fates, (FILTERED, EXCLUDED))).sum())
    report["noise"] = float((hierarchy.fates == NOISE).sum() / max(passed, 1))
    report["in_topics"] = float(len(hierarchy.pair) / max(len(store), 1))
    if WRONG in truth:
        report["filter"] = _filter_quality(hierarchy.fates[known] == FILTERED, wrong[known])
        report["filter"]["wrong in topics"] = float(wrong[hierarchy.pair].mean()) if len(hierarchy.pair) else 0.0
    return report


def _rows(store: PairStore, truth: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Return for each pair of the store its row of the truth, or -1."""
    images = [os.path.normpath(image) for image in truth["image"]]
    of_image = store.locations.take(store.image)
    if "caption" in truth:
        captions = [" ".join(caption.split()) for caption in truth["caption"]]
        keys: list[Any] = list(zip(images, captions, strict=True))
        wanted: list[Any] = list(zip(of_image, store.captions, strict=True))
    else:
        keys, wanted = list(images), list(of_image)
        if WRONG in truth and len(set(keys)) < len(keys):
            raise GramError(f"truth: expected a column caption beside {WRONG}, found none, and images in several rows")
    row = {key: number for number, key in reversed(list(enumerate(keys)))}  # of several rows, the first
    return np.array([row.get(key, -1) for key in wanted], np.int64)


def _is_wrong(truth: Mapping[str, Sequence[str]]) -> np.ndarray:
    values = [value.strip().lower() for value in truth[WRONG]]
    if unknown := [value for value in values if value not in _YES + _NO]:
        raise GramError(f"truth: expected 0 or 1 (false or true) in column {WRONG}, found {unknown[0]!r}")
    return np.array([value in _YES for value in values], bool)


def _codes(values: Sequence[str]) -> np.ndarray:
    return np.unique(np.asarray(values, dtype=str), return_inverse=True)[1]


def _ami(truth: np.ndarray, found: np.ndarray) -> float:
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(truth, found)) if len(truth) else 0.0


def _domain_agreement(hierarchy: Hierarchy, member: np.ndarray, label: np.ndarray) -> Report:
    total, images, topics = 0.0, 0, 0
    for number in range(len(hierarchy.topics)):
        rows = np.flatnonzero((hierarchy.topic == number) & member)
        rows = rows[np.unique(hierarchy.image[rows], return_index=True)[1]]  # an image counts once
        if len(np.unique(label[rows])) < 2:
            continue  # the fact does not vary
        total += len(rows) * _ami(label[rows], hierarchy.domain[rows])
        images += len(rows)
        topics += 1
    return {"mean": total / images if images else 0.0, "topics": topics}


def _filter_quality(dropped: np.ndarray, wrong: np.ndarray) -> Report:
    hit = int((dropped & wrong).sum())
    return {
        "wrong": int(wrong.sum()),
        "dropped": int(dropped.sum()),
        "wrong and dropped": hit,
        "precision": hit / max(int(dropped.sum()), 1),
        "recall": hit / max(int(wrong.sum()), 1),
        "right captions kept": float((~dropped & ~wrong).sum() / max(int((~wrong).sum()), 1)),
    }
