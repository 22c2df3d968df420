"""Measure `gram cluster` and other ways on 10^4 to 3.1 * 10^6 pairs of generated features with known topics.

    python scripts/bench/clustering.py make 100000 FOLDER/100k        # a pair store with its truth, nothing to download
    python scripts/bench/clustering.py gram FOLDER/100k [KEY VALUE...]
    python scripts/bench/clustering.py bertopic FOLDER/100k [MIN_TOPIC_SIZE]
    python scripts/bench/clustering.py topics FOLDER/100k evoc        # evoc, umap+hdbscan or umap+fast-hdbscan
    python scripts/bench/clustering.py rules FOLDER/100k 30000        # ways to assign pairs to topics
    python scripts/bench/clustering.py table FOLDER                   # all rows so far, in Markdown

Each prints a row of JSON, also added to FOLDER/results.jsonl. Times and memory are those of a process of its own.
"""

import hashlib
import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, precision_score, recall_score

from gram_meta import cli
from gram_meta.clustering import sample
from gram_meta.clustering.hierarchy import FILTERED, Hierarchy
from gram_meta.clustering.settings import ChcSettings
from gram_meta.clustering.topics import reducer, topics_of
from gram_meta.config import load_meta_config
from gram_meta.corpus.store import PairStore, store_fingerprint
from gram_meta.files import read_arrays, write_arrays, write_json

SENTENCE, CLIP = 384, 512  # all-MiniLM-L6-v2, ViT-B/16
CHUNK = 50_000  # pairs that are generated at once
NOISE, COPIES = 0.2, 0.02  # shares of pairs that belong to no topic, and of captions repeated word for word


class World:
    """Topics and how their pairs look, for about `pairs` pairs: sqrt(pairs) topics with power-law sizes.

    A sentence feature is a sum of parts, whose squared lengths follow all-MiniLM-L6-v2 on captions of photographs.
    docs/results/clustering.md describes the pairs.
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
        # Pictures: something common to all, a topic, one of its three looks (half of a look is common to all topics).
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
        """Return unit vectors with the decaying spectrum of sentence features."""
        x = random.standard_normal((rows, SENTENCE), np.float32) * self.spectrum.astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def draw(self, rows: int, random: np.random.Generator) -> dict[str, Any]:
        """Return `rows` pairs: topic (-1: noise), domain, captions, sentence and image features, similarity."""
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

        shows = (random.random((rows, 3)) < (0.8, 0.5, 0.4)).tolist()
        filler = (2000 * random.random((rows, 5)) ** 2).astype(int).tolist()
        facts = zip(topic.tolist(), sub.tolist(), noise.tolist(), shows, filler, strict=True)
        captions = [" ".join(self.caption(*each)) for each in facts]
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
            "topic": np.where(noise, -1, topic),
            "domain": domain,
            "captions": captions,
            "sentence_features": x,
            "image_features": y,
            "similarity": random.normal(0.3, 0.03, rows),
        }

    def caption(self, topic: int, sub: int, noise: bool, shows: list[bool], filler: list[int]) -> list[str]:
        """Return the words of a caption: filler, with those about the topic that it shows in the middle."""
        words = [self.filler[word] for word in filler]
        if noise:
            return words
        about = (self.topic_word[topic], self.sub_word[sub], self.family_word[self.family[topic]])
        return [*words[:2], *(word for word, shown in zip(about, shows, strict=True) if shown), *words[2:]]


def made_up_words(random: np.random.Generator, count: int) -> list[str]:
    """Return different pronounceable words of four to eight letters."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(syllables[i] for i in random.integers(0, len(syllables), random.integers(2, 5)))] = None
    return list(words)


def make(pairs: int, folder: Path, seed: int) -> None:
    """Write a pair store with the truth (topic.npy, domain.npy) beside its files, in chunks."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World(pairs, seed)
    types = {
        "sentence_features": (np.float16, (pairs, SENTENCE)),
        "image_features": (np.float16, (pairs, CLIP)),
        "similarity": (np.float32, (pairs,)),
        "topic": (np.int32, (pairs,)),
        "domain": (np.int8, (pairs,)),
    }
    arrays = {name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", *type) for name, type in types.items()}
    caption_schema = pa.schema([("image", pa.int64()), ("caption", pa.string())])
    image_schema = pa.schema([("location", pa.string()), ("digest", pa.string())])
    with (
        pq.ParquetWriter(folder / "captions.parquet", caption_schema) as captions,
        pq.ParquetWriter(folder / "images.parquet", image_schema) as images,
    ):
        for start in range(0, pairs, CHUNK):
            rows = np.arange(start, min(start + CHUNK, pairs))
            part = world.draw(len(rows), np.random.default_rng([seed, pairs, start]))
            for name, array in arrays.items():
                array[rows] = part[name]
            captions.write_table(pa.table([rows, part["captions"]], caption_schema))
            places = [f"{row // 10_000:05d}/{row:09d}.jpg" for row in rows.tolist()]
            images.write_table(pa.table([places, ["0" * 64] * len(rows)], image_schema))
    settings = {
        "source": {"kind": "generated", "image_root": str(folder), "pairs": pairs, "seed": seed},
        "clip": {"name": "generated", "fingerprint": "0" * 64, "width": CLIP},
        "sentence_model": {"name": "generated", "fingerprint": "1" * 64, "width": SENTENCE},
    }
    counts = {"rows": pairs, "pairs": pairs, "images": pairs}
    manifest = {"kind": "pair store", "format": 1, "finished": True, "settings": settings, "counts": counts}
    manifest |= {"skipped": {}, "skipped_images": {}, "shortened_for_clip": 0}
    manifest["fingerprint"] = store_fingerprint(settings, counts, [f"{pairs} {seed}"])
    write_json(folder / "manifest.json", manifest)


Row = dict[str, Any]  # of a table, by column


def in_own_process(function: Callable[..., Any], *words: Any) -> tuple[Row, Any]:
    """Call a function in a new process; return what it took, and its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured_call, function, *words).result()


def measured_call(function: Callable[..., Any], *words: Any) -> tuple[Row, Any]:
    """Call a function in this process; return what it took, and its result."""
    own, start, ended = [0.0], time.perf_counter(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            own.append(memory("RssAnon"))

    threading.Thread(target=watch).start()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    try:
        result = function(*words)
    finally:
        ended.set()
    times = {"wall clock (s)": time.perf_counter() - start, "processor time (s)": time.process_time()}
    sizes = {"peak memory (GB)": memory("VmHWM"), "of that its own (GB)": max(own)}
    return {name: round(value, 2) for name, value in (times | sizes).items()}, result


def memory(field: str) -> float:
    """Return GB from this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(field))


def ami(truth: np.ndarray, found: np.ndarray) -> float:
    """Return the adjusted mutual information of two labellings."""
    return round(float(adjusted_mutual_info_score(truth, found)), 4)


def judged(label: np.ndarray, truth: np.ndarray) -> Row:
    both, noise, true_noise = (label >= 0) & (truth >= 0), label < 0, truth < 0
    scores = {
        "noise": noise.mean(),
        "AMI": ami(truth[both], label[both]),
        "ARI": adjusted_rand_score(truth[both], label[both]),
        "noise: precision": precision_score(true_noise, noise, zero_division=0),
        "recall": recall_score(true_noise, noise),
    }
    return {"topics": int(label.max(initial=-1)) + 1} | {name: round(float(score), 4) for name, score in scores.items()}


def truth_of(store: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the true topic (-1: noise) and domain of each pair."""
    return np.load(store / "topic.npy"), np.load(store / "domain.npy")


def domain_agreement(topic: np.ndarray, domain: np.ndarray, truth: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the AMI of domains with those of a topic's main true topic: the mean over topics, weighted by pairs."""
    import pandas  # not in the measured processes

    frame = pandas.DataFrame({"topic": topic, "domain": domain, "true": truth[0], "look": truth[1]})
    scores, weights = [0.0], [0]
    for _, rows in frame[(frame.topic >= 0) & (frame.true >= 0)].groupby("topic"):
        main = rows[rows.true == rows.true.mode()[0]]
        if main.look.nunique() > 1:
            scores.append(ami(main.look, main.domain))
            weights.append(len(main))
    return round(float(np.average(scores, weights=weights)), 4) if sum(weights) else 0.0


def gram(store: Path, opts: list[str]) -> Row:
    """Run `gram cluster` on a store; measure it and compare it with the truth."""
    out = store / "-".join(["hierarchy", *(opt.rsplit(".", 1)[-1].lower() for opt in opts)])
    row, status = in_own_process(cli.main, ["cluster", str(store), "-o", str(out), "--force", *opts])
    if status:
        raise SystemExit(f"gram cluster {store}: ended with status {status}")
    found, (true_topic, true_domain) = Hierarchy.open(out), truth_of(store)
    topic, domain = np.full((2, len(found.fates)), -1)
    topic[found.pair], domain[found.pair] = found.topic, found.domain
    seen = found.fates != FILTERED
    row |= judged(topic[seen], true_topic[seen])
    row["domains: AMI"] = domain_agreement(topic, domain, (true_topic, true_domain))
    return row | {"sample": json.loads((out / "topics.json").read_text()).get("sample")}


def find(store: Path, way: str, opts: list[str]) -> np.ndarray:
    """Find topics on all pairs of a store, without a filter; return a label for each (-1: noise)."""
    settings, pairs = chc_settings([] if way == "bertopic" else opts), PairStore.open(store)
    features = np.asarray(pairs.sentence_features, np.float32)
    size, samples = settings.min_cluster_size, settings.min_samples
    if way == "bertopic":
        from bertopic import BERTopic

        model = BERTopic(min_topic_size=int(opts[0]) if opts else 10, calculate_probabilities=False)
        label, _ = model.fit_transform(list(pairs.captions), features)
    elif way == "umap+hdbscan":
        label = topics_of(features, settings)
    elif way == "umap+fast-hdbscan":
        import fast_hdbscan

        model = fast_hdbscan.HDBSCAN(min_cluster_size=size, min_samples=samples, reproducible=True)
        label = model.fit_predict(np.ascontiguousarray(reducer(settings, len(features)).fit_transform(features)))
    elif way == "evoc":
        from evoc import EVoC

        label = EVoC(base_min_cluster_size=size, min_samples=samples, random_state=settings.seed).fit_predict(features)
    else:
        raise SystemExit(f"topics: expected umap+hdbscan, umap+fast-hdbscan or evoc, found {way}")
    return np.asarray(label)


def chc_settings(opts: list[str]) -> Any:
    return ChcSettings.from_config(load_meta_config([], opts))


def unsampled_topics(store: Path, features: np.ndarray, settings: ChcSettings) -> np.ndarray:
    """Return the topic of each pair (-1: noise) by clustering all of them; kept in the store, by the settings."""
    digest = hashlib.sha256(json.dumps(settings.recorded["CHC"], sort_keys=True).encode()).hexdigest()
    path = store / f"unsampled-{digest[:12]}.npz"
    if "label" not in (kept := read_arrays(path)):
        kept = {"label": topics_of(features, settings)}
        write_arrays(path, kept)
    return kept["label"]


def rules(store: Path, count: int, opts: list[str]) -> list[Row]:
    """Compare ways to assign pairs outside a sample to topics with un-sampled clustering and with the truth."""
    settings, truth = chc_settings(opts), truth_of(store)[0]
    features = np.asarray(PairStore.open(store).sentence_features, np.float32)
    unsampled = unsampled_topics(store, features, settings)
    chosen = sample.draw(len(features), count, settings.seed)
    rest = np.setdiff1d(np.arange(len(features)), chosen)
    rest = np.sort(np.random.default_rng(0).permutation(rest)[:20_000])
    inside, outside = features[chosen], features[rest]
    label = topics_of(inside, settings)
    noise = (label < 0).mean()
    rows: list[Row] = []

    def add(name: str, found: np.ndarray, seconds: float, of: np.ndarray = rest) -> None:
        """Add a row: AMI of pairs that are noise in neither, and with noise as one more topic; who is called noise."""
        other = unsampled[of]
        both = (found >= 0) & (other >= 0)
        row: Row = {"what": "rules", "store": f"{store.name}, sample {count:,}", "rule": name}
        row["noise"] = f"{(found < 0).mean():.1%}"
        row["AMI with un-sampled"] = ami(other[both], found[both])
        row["the same, noise a topic"] = ami(other, found)
        row["same verdict on noise"] = f"{((found < 0) == (other < 0)).mean():.1%}"
        row["AMI with truth"] = judged(found, truth[of])["AMI"]
        rows.append(row | {"ms per pair": round(1000 * seconds / len(of), 3)})

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
    for name, threshold in (("threshold", np.quantile(own[1], noise)), ("half", 0.5)):
        verdict = sample.verdict(*voted, np.full(len(rule.threshold), threshold))
        add(f"the same votes, one {name} for all" + " (a guess)" * (name == "half"), verdict, seconds)
    add("nearest sample pair's label", label[near[:, 0]], seconds)
    start = time.process_time()
    centre = np.stack([inside[label == number].mean(0) for number in range(label.max() + 1)])
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    inner, outer = (inside @ centre.T).max(1), outside @ centre.T
    nearest = np.where(outer.max(1) >= np.quantile(inner, noise), outer.argmax(1), -1)
    add("nearest topic centre, one threshold for all", nearest, time.process_time() - start)
    return rows


def main() -> None:
    import common  # it imports torch, which the measured processes must not

    options = common.plain_parser(__doc__)
    options.add_argument("what", choices=("make", "gram", "bertopic", "topics", "rules", "table"))
    options.add_argument("first", help="make: pairs; table: the folder of the stores; else a store")
    rest_help = "make: the folder; gram: KEY VALUE; topics: a way; rules: pairs of the sample"
    options.add_argument("rest", nargs="*", help=rest_help)
    options.add_argument("--seed", type=int, default=1, help="make: of the world (%(default)s)")
    args = options.parse_args()
    store, opts = Path(args.first), args.rest
    if args.what == "make":
        make(int(args.first), Path(opts[0]), args.seed)
    elif args.what == "table":
        rows = [json.loads(line) for line in (store / "results.jsonl").read_text().splitlines()]
        for kind in (False, True):
            table = [row for row in rows if (row["what"] == "rules") == kind]
            common.print_table([{k: v for k, v in row.items() if not isinstance(v, dict)} for row in table])
    else:
        with open(store.parent / "results.jsonl", "a") as file:
            for row in measured(args.what, store, opts):
                print(json.dumps(row))
                print(json.dumps(row), file=file)


def measured(what: str, store: Path, opts: list[str]) -> list[Row]:
    if what == "rules":
        return rules(store, int(opts[0]), opts[1:])
    way, *words = opts if what == "topics" else [what, *opts]
    if what == "gram":
        row = gram(store, opts)
    else:
        row, label = in_own_process(find, store, way, words)
        row |= judged(label, truth_of(store)[0])
    return [{"what": " ".join([what, *opts]), "store": store.name} | row]


if __name__ == "__main__":
    main()
