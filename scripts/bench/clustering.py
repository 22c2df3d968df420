"""Measure `gram cluster` and other ways on 10^4 to 3.1 * 10^6 pairs of generated features with known topics.

    python scripts/bench/clustering.py make 100000 FOLDER/100k        # a pair store with its truth, nothing to download
    python scripts/bench/clustering.py gram FOLDER/100k               # gram cluster in a process of its own, measured
    python scripts/bench/clustering.py gram FOLDER/100k CHC.TOPICS.SAMPLE 0           # with other settings
    python scripts/bench/clustering.py bertopic FOLDER/100k           # BERTopic's own pipeline on the same features
    python scripts/bench/clustering.py topics FOLDER/100k evoc        # ways to find topics: evoc, umap+fast-hdbscan, ...
    python scripts/bench/clustering.py rules FOLDER/100k 30000 transform   # ways to assign pairs to topics of a sample
    python scripts/bench/clustering.py table FOLDER                   # all rows so far, in Markdown

Each prints a row of JSON, also added to FOLDER/results.jsonl. Time is wall clock and processor time of the process
and all its threads; memory is the high-water mark of the resident set (VmHWM), which counts pages of the memory-mapped
features that the system may drop at any time, and beside it the highest seen of the process's own pages (RssAnon).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

SENTENCE, CLIP = 384, 512  # all-MiniLM-L6-v2, ViT-B/16
CHUNK = 50_000  # pairs that are generated at once
NOISE, COPIES = 0.2, 0.02  # shares of pairs that belong to no topic, and of captions repeated word for word

# --- generated pairs with a known truth -------------------------------------------------------------------------------


class World:
    """Topics and how their pairs look, for about `pairs` pairs: sqrt(pairs) topics with power-law sizes.

    Squared lengths of the parts of a sentence feature, in the manner of all-MiniLM-L6-v2 on 15,000 captions of
    photographs (within a topic that HDBSCAN finds there, cosines of 0.36 to 0.61; 0.08 between any two captions; the
    nearest other caption at 0.64 to 0.90; 72 % of the variance in 60 directions):
    0.06 common to all, 0.12 to a family of four topics on average (near neighbours), 0.10 to 0.34 to the topic (loose and
    tight ones), 0.16 to one of its one to six sub-topics; the rest is the caption's own. How much a caption is about its
    topic varies too, down to nothing, so that no sharp line separates topics from noise. Captions of no topic are one
    half mixtures of two topics, one half about a family and nothing else.
    """

    def __init__(self, pairs: int, seed: int) -> None:
        random = np.random.default_rng([seed, pairs])
        self.topics = topics = max(int(round(pairs**0.5)), 12)
        families = max(topics // 4, 3)
        sizes = np.arange(1, topics + 1) ** -0.8
        self.share = sizes / sizes.sum()
        self.family = random.integers(0, families, topics)
        self.subs = random.integers(1, 7, topics)
        self.tight = random.uniform(0.10, 0.34, topics)
        self.spectrum = (1 + np.arange(SENTENCE) / 12)[random.permutation(SENTENCE)] ** -0.8
        self.spectrum /= np.linalg.norm(self.spectrum)
        self.common = self.direction(random, 1)[0]
        self.of_family = self.direction(random, families)
        self.of_topic = self.direction(random, topics)
        self.of_sub = self.direction(random, 6 * topics)
        # Pictures: something common to all, a topic, one of three looks of it (half of the look is the same everywhere).
        self.looks = random.dirichlet([3, 2, 1.5], topics)  # their sizes
        clip = random.standard_normal((1 + topics + 3 + 3 * topics, CLIP)).astype(np.float32)
        clip /= np.linalg.norm(clip, axis=1, keepdims=True)
        self.clip_common, self.clip_topic = clip[0], clip[1 : 1 + topics]
        self.clip_style, self.clip_look = clip[1 + topics : 4 + topics], clip[4 + topics :]
        words = made_up_words(random, 2000 + families + topics + 6 * topics)
        self.filler, self.family_word = words[:2000], words[2000 : 2000 + families]
        self.topic_word = words[2000 + families : 2000 + families + topics]
        self.sub_word = words[2000 + families + topics :]

    def direction(self, random: np.random.Generator, rows: int) -> np.ndarray:
        """Unit vectors with the decaying spectrum of sentence features."""
        x = random.standard_normal((rows, SENTENCE), np.float32) * self.spectrum.astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def draw(self, rows: int, random: np.random.Generator) -> dict[str, Any]:
        """`rows` pairs: topic (-1: noise), domain, captions, sentence and image features, similarity."""
        topic = random.choice(self.topics, rows, p=self.share)
        sub = 6 * topic + random.integers(0, self.subs[topic])
        noise = random.random(rows) < NOISE
        mixed = noise & (random.random(rows) < 0.5)
        about = 1 - random.beta(1.5, 2.5, rows)  # how much the caption is about its topic
        shares = {
            "common": np.full(rows, 0.06),
            "family": np.full(rows, 0.12),
            "topic": np.where(noise, np.where(mixed, 0.1, 0), self.tight[topic] * about),
            "other": np.where(noise, np.where(mixed, 0.1, 0), 0.15 * (1 - about)),
            "sub": np.where(noise, 0, 0.16 * about),
        }
        shares["own"] = 1 - sum(shares.values())
        weight = {name: (share**0.5).astype(np.float32)[:, None] for name, share in shares.items()}
        x = weight["common"] * self.common + weight["family"] * self.of_family[self.family[topic]]
        x += weight["topic"] * self.of_topic[topic] + weight["sub"] * self.of_sub[sub]
        other = random.choice(self.topics, rows, p=self.share)
        x += weight["other"] * self.of_topic[other]
        x += weight["own"] * self.direction(random, rows)
        x /= np.linalg.norm(x, axis=1, keepdims=True)

        captions = [
            " ".join(self.caption(*facts, random_words))
            for *facts, random_words in zip(
                topic.tolist(),
                sub.tolist(),
                noise.tolist(),
                (random.random((rows, 3)) < (0.8, 0.5, 0.4)).tolist(),
                (2000 * random.random((rows, 5)) ** 2).astype(int).tolist(),
                strict=True,
            )
        ]
        copy = np.flatnonzero(random.random(rows) < COPIES)
        of = random.integers(0, rows, len(copy))
        for to, source in zip(copy.tolist(), of.tolist(), strict=True):
            captions[to], x[to], topic[to], noise[to] = (captions[source], x[source], topic[source], noise[source])

        domain = (random.random(rows)[:, None] > np.cumsum(self.looks[topic], axis=1)[:, :2]).sum(1)
        y = 0.6 * self.clip_common + 0.45 * self.clip_topic[topic] + 0.25 * self.clip_style[domain]
        y += 0.25 * self.clip_look[3 * topic + domain]
        y += random.standard_normal((rows, CLIP), np.float32) * np.float32(0.55 / CLIP**0.5)
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        return {
            "topic": np.where(noise, -1, topic).astype(np.int32),
            "domain": domain.astype(np.int8),
            "captions": captions,
            "sentence": x.astype(np.float16),
            "image": y.astype(np.float16),
            "similarity": random.normal(0.3, 0.03, rows).astype(np.float32),
        }

    def caption(self, topic: int, sub: int, noise: bool, shows: list[bool], filler: list[int]) -> list[str]:
        words = [self.filler[word] for word in filler]
        if noise:
            return words
        about = (self.topic_word[topic], self.sub_word[sub], self.family_word[self.family[topic]])
        return [*words[:2], *(word for word, shown in zip(about, shows, strict=True) if shown), *words[2:]]


def made_up_words(random: np.random.Generator, count: int) -> list[str]:
    """Different pronounceable words of four to eight letters."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(syllables[i] for i in random.integers(0, len(syllables), random.integers(2, 5)))] = None
    return list(words)


def make(pairs: int, folder: Path, seed: int) -> None:
    """Write a pair store with `truth.npz` (topic, domain) beside its files, in chunks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gram_meta.corpus.store import store_fingerprint

    folder.mkdir(parents=True, exist_ok=True)
    world = World(pairs, seed)
    files = {"sentence_features": (SENTENCE, np.float16), "image_features": (CLIP, np.float16)}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (pairs, width))
        for name, (width, dtype) in files.items()
    }
    topic, domain = np.empty(pairs, np.int32), np.empty(pairs, np.int8)
    similarity = np.empty(pairs, np.float32)
    caption_schema = pa.schema([("image", pa.int64()), ("caption", pa.string())])
    image_schema = pa.schema([("location", pa.string()), ("digest", pa.string())])
    with (
        pq.ParquetWriter(folder / "captions.parquet", caption_schema) as captions,
        pq.ParquetWriter(folder / "images.parquet", image_schema) as images,
    ):
        for start in range(0, pairs, CHUNK):
            rows = np.arange(start, min(start + CHUNK, pairs))
            part = world.draw(len(rows), np.random.default_rng([seed, pairs, start]))
            arrays["sentence_features"][rows], arrays["image_features"][rows] = (part["sentence"], part["image"])
            topic[rows], domain[rows] = part["topic"], part["domain"]
            similarity[rows] = part["similarity"]
            captions.write_table(pa.table([rows, part["captions"]], caption_schema))
            places = [f"{row // 10_000:05d}/{row:09d}.jpg" for row in rows.tolist()]
            images.write_table(pa.table([places, ["0" * 64] * len(rows)], image_schema))
    for array in arrays.values():
        array.flush()
    np.save(folder / "similarity.npy", similarity)
    np.savez(folder / "truth.npz", topic=topic, domain=domain)
    settings = {
        "source": {"kind": "generated", "image_root": str(folder), "pairs": pairs, "seed": seed},
        "clip": {"name": "generated", "fingerprint": "0" * 64, "width": CLIP},
        "sentence_model": {"name": "generated", "fingerprint": "1" * 64, "width": SENTENCE},
    }
    counts = {"rows": pairs, "pairs": pairs, "images": pairs}
    manifest = {
        "kind": "pair store",
        "format": 1,
        "finished": True,
        "fingerprint": store_fingerprint(settings, counts, [f"{pairs} {seed}"]),
        "settings": settings,
        "counts": counts,
        "skipped": {},
        "skipped_images": {},
        "shortened_for_clip": 0,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(command: list[str], limit: float) -> dict[str, Any]:
    """Run a command in its own process; return seconds, memory in GB, and its lines with their times."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines: list[tuple[float, str]] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            text = line.rstrip().split("\r")[-1]
            lines.append((round(time.perf_counter() - start, 1), text))
            print(f"{lines[-1][0]:8.1f} s  {text}", file=sys.stderr, flush=True)

    listener = threading.Thread(target=listen)
    listener.start()
    peak = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    status = Path(f"/proc/{process.pid}/status")
    while (done := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        try:
            for line in status.read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peak:
                    peak[name] = max(peak[name], int(value.split()[0]))
        except OSError:
            pass
        if time.perf_counter() - start > limit:
            process.kill()
        time.sleep(0.2)
    listener.join()
    usage = done[2]
    return {
        "rc": os.waitstatus_to_exitcode(done[1]),
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(max(usage.ru_maxrss, peak["VmHWM"]) * 1024 / 1e9, 2),
        "own_gb": round(peak["RssAnon"] * 1024 / 1e9, 2),
        "load": os.getloadavg()[1],
        "lines": lines,
    }


def judged(label: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compare topics (-1: noise) with the true ones."""
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

    both, noise = (label >= 0) & (truth >= 0), label < 0
    return {
        "topics": int(label.max(initial=-1)) + 1,
        "noise": round(float(noise.mean()), 4),
        "ami": round(float(adjusted_mutual_info_score(truth[both], label[both])), 4),
        "ari": round(float(adjusted_rand_score(truth[both], label[both])), 4),
        "noise_precision": round(float((truth[noise] < 0).mean()), 4) if noise.any() else 0.0,
        "noise_recall": round(float(noise[truth < 0].mean()), 4),
    }


def alike(label: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return how far two clusterings agree: the AMI on pairs that are noise in neither, the AMI with noise as one more
    topic, and the share of pairs on which they agree whether it is noise."""
    from sklearn.metrics import adjusted_mutual_info_score

    both = (label >= 0) & (other >= 0)
    return {
        "ami": round(float(adjusted_mutual_info_score(other[both], label[both])), 4),
        "ami_with_noise": round(float(adjusted_mutual_info_score(other, label)), 4),
        "noise_agreement": round(float(((label < 0) == (other < 0)).mean()), 4),
    }


def truth_of(store: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(store / "truth.npz") as truth:
        return truth["topic"], truth["domain"]


def labels_of(hierarchy: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the topic of each pair (-1: noise, or dropped later), its domain, and whether it reached clustering."""
    from gram_meta.clustering.hierarchy import FILTERED, Hierarchy

    found = Hierarchy.open(hierarchy)
    topic, domain = np.full(len(found.fates), -1), np.full(len(found.fates), -1)
    topic[found.pair], domain[found.pair] = found.topic, found.domain
    return topic, domain, found.fates != FILTERED


def domain_agreement(topic: np.ndarray, domain: np.ndarray, truth: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the mean over topics, weighted by pairs, of the AMI of domains with those of the topic's main true topic."""
    from sklearn.metrics import adjusted_mutual_info_score

    order = np.argsort(topic, kind="stable")
    start = np.searchsorted(topic[order], np.arange(topic.max() + 2))
    total = weight = 0.0
    for first, last in zip(start[:-1], start[1:], strict=True):
        rows = order[first:last]
        known = truth[0][rows]
        if not (known >= 0).any():
            continue
        rows = rows[known == np.bincount(known[known >= 0]).argmax()]
        if len(np.unique(truth[1][rows])) > 1:
            total += len(rows) * adjusted_mutual_info_score(truth[1][rows], domain[rows])
            weight += len(rows)
    return round(total / weight, 4) if weight else 0.0


def gram(store: Path, opts: list[str], limit: float) -> dict[str, Any]:
    """Run `gram cluster` on a store; measure it and compare it with the truth."""
    name = "-".join(["hierarchy", *(opt.rsplit(".", 1)[-1].lower() for opt in opts)])
    out = store / name
    command = [sys.executable, "-m", "gram_meta", "cluster", str(store), "-o", str(out), *opts]
    row = {"what": "gram cluster", "store": store.name, "opts": opts, **measured(command, limit)}
    if row["rc"] == 0:
        topic, domain, seen = labels_of(out)
        truth = truth_of(store)
        row.update(judged(topic[seen], truth[0][seen]))
        row["domain_ami"] = domain_agreement(topic, domain, truth)
        row["sample"] = json.loads((out / "topics.json").read_text()).get("sample")
    return row


# --- BERTopic, and other ways to find topics --------------------------------------------------------------------------


def in_a_process(what: str, store: Path, opts: list[str], limit: float) -> dict[str, Any]:
    """Measure `bertopic` or `topics` in its own process, which writes its labels into a file; return the row."""
    with tempfile.TemporaryDirectory() as folder:
        labels = Path(folder) / "labels.npz"
        command = [sys.executable, __file__, f"_{what}", str(store), str(labels), *opts]
        row = {"what": what, "store": store.name, "opts": opts, **measured(command, limit)}
        if row["rc"] == 0:
            with np.load(labels) as found:
                label, seen, seconds = found["label"], found["seen"], found["seconds"]
            row["finding_cpu_s"], row["finding_wall_s"] = (round(float(seconds[0]), 1), round(float(seconds[1]), 1))
            if (store / "truth.npz").is_file():
                row.update(judged(label, truth_of(store)[0][seen]))
            unsampled = store / "unsampled.npz"
            if unsampled.is_file():
                with np.load(unsampled) as other:
                    row["unsampled"] = alike(label, other["label"][seen])
    return row


def run_bertopic(store: Path, labels: Path, opts: list[str]) -> None:
    """Run BERTopic's defaults on the embeddings of all pairs, without a filter. `opts`: its min_topic_size."""
    from bertopic import BERTopic

    from gram_meta.corpus.store import PairStore

    pairs = PairStore.open(store)
    captions, features = list(pairs.captions), np.asarray(pairs.sentence_features, np.float32)
    cpu, wall = time.process_time(), time.perf_counter()
    model = BERTopic(min_topic_size=int(opts[0]) if opts else 10, calculate_probabilities=False)
    label, _ = model.fit_transform(captions, features)
    seconds = (time.process_time() - cpu, time.perf_counter() - wall)
    np.savez(labels, label=np.asarray(label), seen=np.arange(len(label)), seconds=seconds)


WAYS = ("umap+hdbscan", "umap+fast-hdbscan", "evoc")


def run_topics(store: Path, labels: Path, opts: list[str]) -> None:
    """Find topics on all pairs of a store in one of WAYS, without a filter; `opts`: the way, and the number of pairs."""
    from gram_meta.clustering.settings import ChcSettings
    from gram_meta.clustering.topics import reducer, topics_of
    from gram_meta.config import load_meta_config
    from gram_meta.corpus.store import PairStore

    settings = ChcSettings.from_config(load_meta_config())
    pairs = PairStore.open(store)
    seen = np.arange(min(int(opts[1]) if len(opts) > 1 else len(pairs), len(pairs)))
    features = np.asarray(pairs.sentence_features[seen], np.float32)
    cpu, wall = time.process_time(), time.perf_counter()
    size, samples = settings.min_cluster_size, settings.min_samples
    if opts[0] == "umap+hdbscan":
        label = topics_of(features, settings)
    elif opts[0] == "umap+fast-hdbscan":
        import fast_hdbscan

        way = fast_hdbscan.HDBSCAN(min_cluster_size=size, min_samples=samples, reproducible=True)
        label = way.fit_predict(np.ascontiguousarray(reducer(settings, len(features)).fit_transform(features)))
    else:
        from evoc import EVoC

        way = EVoC(base_min_cluster_size=size, min_samples=samples, random_state=settings.seed)
        label = way.fit_predict(features)
        layers = [(int(layer.max()) + 1, round(float((layer < 0).mean()), 3)) for layer in way.cluster_layers_]
        print("layers of EVoC (topics, noise):", layers, file=sys.stderr)
    seconds = (time.process_time() - cpu, time.perf_counter() - wall)
    np.savez(labels, label=np.asarray(label, np.int64), seen=seen, seconds=seconds)


# --- rules ------------------------------------------------------------------------------------------------------------


def rules(store: Path, opts: list[str]) -> list[dict[str, Any]]:
    """Compare ways to assign pairs outside a sample to topics with un-sampled clustering, and with the truth if known.

    `opts`: pairs of the sample; "transform" adds UMAP's own transform and HDBSCAN's approximate_predict.
    """
    from gram_meta.clustering import sample
    from gram_meta.clustering.settings import ChcSettings
    from gram_meta.clustering.topics import topics_of
    from gram_meta.config import load_meta_config
    from gram_meta.corpus.store import PairStore

    settings = ChcSettings.from_config(load_meta_config())
    features = np.asarray(PairStore.open(store).sentence_features, np.float32)
    truth = truth_of(store)[0] if (store / "truth.npz").is_file() else None
    kept = store / "unsampled.npz"
    if not kept.is_file():
        np.savez(kept, label=topics_of(features, settings))
    with np.load(kept) as file:
        unsampled = file["label"]
    chosen = sample.draw(len(features), int(opts[0]), settings.seed)
    rest = np.setdiff1d(np.arange(len(features)), chosen)
    rest = np.sort(np.random.default_rng(0).permutation(rest)[:20_000])
    inside, outside = features[chosen], features[rest]
    label = topics_of(inside, settings)
    rows: list[dict[str, Any]] = []

    def add(name: str, found: np.ndarray, seconds: float, of: np.ndarray = rest) -> None:
        row = {"what": "rules", "store": store.name, "opts": opts, "rule": name}
        row["noise"] = round(float((found < 0).mean()), 4)
        row["ms_per_pair"] = round(1000 * seconds / len(of), 3)
        row["unsampled"] = alike(found, unsampled[of])
        if truth is not None:
            row["truth"] = judged(found, truth[of])
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    add("(un-sampled clustering itself)", unsampled[rest], 0)
    add("(clustering of the sample, on the sample)", label, 0, chosen)
    rule = sample.Rule.learn(inside, label, settings.seed)
    rule.assign(outside[:100])  # compiled
    start = time.process_time()
    ours = rule.assign(outside)
    seconds = time.process_time() - start
    add("votes of 15 neighbours, a threshold for each topic (ours)", ours, seconds)
    rows[-1]["held_out"] = rule.held_out
    near, distance = rule.index.query(outside, k=sample.NEIGHBOURS, epsilon=sample.SEARCH)
    voted = sample.vote(label[near], 1 - distance)
    inside_near, inside_similarity = sample._others(rule.index, inside, np.arange(len(inside)))
    own = sample.vote(label[inside_near], inside_similarity)
    common = np.full(len(rule.threshold), np.quantile(own[1], (label < 0).mean()))
    add("the same votes, one threshold for all", sample.verdict(*voted, common), seconds)
    add("the same votes, one half for all (a guess)", sample.verdict(*voted, np.full(len(common), 0.5)), seconds)
    add("nearest sample pair's label", label[near[:, 0]], seconds)
    start = time.process_time()
    centre = np.stack([inside[label == number].mean(0) for number in range(label.max() + 1)])
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    inner, outer = (inside @ centre.T).max(1), outside @ centre.T
    limit = np.quantile(inner, (label < 0).mean())
    nearest = np.where(outer.max(1) >= limit, outer.argmax(1), -1)
    add("nearest topic centre, one threshold for all", nearest, time.process_time() - start)
    if "transform" in opts:
        import hdbscan
        import umap

        reducer = umap.UMAP(
            n_neighbors=settings.neighbors,
            n_components=settings.components,
            min_dist=0.0,
            metric="cosine",
            random_state=settings.seed,
            n_jobs=1,
        ).fit(inside)
        clusterer = hdbscan.HDBSCAN(settings.min_cluster_size, settings.min_samples, prediction_data=True)
        clusterer.fit(reducer.embedding_.astype(np.float64))
        few = rest[:3000]
        start = time.process_time()
        low = reducer.transform(features[few])
        found, _ = hdbscan.approximate_predict(clusterer, low.astype(np.float64))
        add("UMAP's transform, HDBSCAN's approximate_predict", found, time.process_time() - start, few)
    return rows


# --- the command line -------------------------------------------------------------------------------------------------


def tables(folder: Path) -> None:
    """Print all rows of FOLDER/results.jsonl as Markdown."""
    from common import print_table  # it imports torch, which the measured processes must not

    runs, rules = [], []
    for line in (folder / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["what"] == "rules":
            other, truth = row["unsampled"], row.get("truth", {})
            store = f"{row['store']}, sample {int(row['opts'][0]):,}"
            shares = [
                f"{other['ami']:.3f}",
                f"{other['ami_with_noise']:.3f}",
                f"{100 * other['noise_agreement']:.1f} %",
            ]
            noise = f"{100 * row['noise']:.1f} %"
            rules.append([store, row["rule"], noise, *shares, truth.get("ami", ""), row["ms_per_pair"]])
            continue
        cells = [row["store"], " ".join([row["what"], *row["opts"]])]
        if row["rc"]:
            runs.append([*cells, f"ended after {row['wall_s']:.0f} s (load {row['load']:.0f})", *[""] * 10])
            continue
        cells += [f"{row[key]:,.0f} s" for key in ("wall_s", "cpu_s")]
        cells += [f"{row[key]:.2f} GB" for key in ("peak_gb", "own_gb")]
        for key in ("topics", "noise", "ami", "ari", "noise_precision", "noise_recall", "domain_ami"):
            x = row.get(key, "")
            cells.append(f"{x:.2f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else x)
        runs.append(cells)
    usage = ["wall clock", "processor time", "peak memory", "of that its own"]
    quality = ["topics", "noise", "AMI", "ARI", "noise: precision", "recall", "domains: AMI"]
    print_table(["pairs", "what", *usage, *quality], runs)
    agreement = [
        "AMI with un-sampled",
        "the same, noise a topic",
        "same verdict on noise",
        "AMI with truth",
        "ms per pair",
    ]
    print_table(["store", "rule", "noise", *agreement], rules)


def main() -> None:
    if sys.argv[1:2] in (["_bertopic"], ["_topics"]):  # the process that is measured
        run = run_bertopic if sys.argv[1] == "_bertopic" else run_topics
        return run(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("make", "gram", "bertopic", "topics", "rules", "table"))
    options.add_argument("first", help="make: pairs; table: the folder of the stores; else a store")
    options.add_argument(
        "rest", nargs="*", help="make: the folder; gram: KEY VALUE; topics: a way; rules: pairs of the sample"
    )
    options.add_argument("--seed", type=int, default=1, help="make: of the world (%(default)s)")
    options.add_argument("--limit", type=float, default=3600, help="seconds after which a run is ended (%(default)s)")
    args = options.parse_args()
    if args.what == "make":
        return make(int(args.first), Path(args.rest[0]), args.seed)
    if args.what == "table":
        return tables(Path(args.first))
    store = Path(args.first)
    if args.what == "rules":
        rows = rules(store, args.rest)
    elif args.what == "gram":
        rows = [gram(store, args.rest, args.limit)]
    else:
        rows = [in_a_process(args.what, store, args.rest, args.limit)]
    with open(store.parent / "results.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        print(json.dumps({name: value for name, value in row.items() if name != "lines"}))


if __name__ == "__main__":
    main()
