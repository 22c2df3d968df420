"""A tiny world, and the commands that the soak disturbs in it."""

from __future__ import annotations

import io
import json
import os
import random
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from helpers.emoji_food import write_emoji_food
from PIL import Image

from .processes import Process

WORDS = ("cat", "dog", "house", "tree", "boat", "lamp")
OTHERS = "red blue old new small large dark light soft hard wet dry near far left right".split()
SHARDS, PER_SHARD = 4, 30
ALL = 10**9  # progress of a command that has found its own result finished

CLUSTER = (
    *("CHC.TOPICS.REDUCTION", "pca", "CHC.TOPICS.MIN_CLUSTER_SIZE", "5", "CHC.TOPICS.SAMPLE", "100"),
    *("CHC.FILTER.KEEP", "1.0", "CHC.DOMAINS.K", "2", "TASKS.SUPPORT_SHOTS", "2", "TASKS.QUERY_SHOTS", "4"),
)
META = (
    *("BACKBONE.NAME", "random-tiny", "TASKS.WAYS", "3", "TASKS.HELD_OUT", "0.5", "TASKS.SUPPORT_SHOTS", "2"),
    *("TASKS.QUERY_SHOTS", "4", "EVAL.EVERY", "4", "EVAL.TASKS", "2", "OUTER.STEPS", "12", "OUTER.BATCH", "2"),
    *("CHECKPOINT.EVERY", "2", "LOADER.WORKERS", "0", "OUTER.LR_PROMPT", "0.05", "OUTER.LR_REGULATOR", "0.02"),
)
RUN = (
    *("MODEL.BACKBONE.NAME", "random-tiny", "INPUT.SIZE", "(32,32)", "DATALOADER.TRAIN_X.BATCH_SIZE", "2"),
    *("DATALOADER.NUM_WORKERS", "0", "TRAIN.CHECKPOINT_FREQ", "1", "TRAIN.DETERMINISTIC", "True"),
)


@dataclass(frozen=True)
class Command:
    """A command of `gram` that writes to a folder.

    Attributes:
        argv: returns the arguments for an output folder.
        progress: returns how much a folder holds that a further start must not do again.
        resumed: returns how much a further start has found, from what it printed.
        products: returns what two runs must have in common, by name.
        fresh: start it in a new interpreter, not in a fork of this one.
        bytes: how much it writes into the folder, at most.
    """

    name: str
    argv: Callable[[Path], list[str]]
    progress: Callable[[Path], int]
    resumed: Callable[[str], int]
    products: Callable[[Path], dict[str, Any]]
    fresh: bool = False
    bytes: int = 300_000


class World:
    """Shards, a store, a hierarchy, a meta-checkpoint and a dataset below `root`, and each command undisturbed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        _write_shards(root / "shards")
        write_emoji_food(root / "data" / "emoji_food")
        self.commands = {
            command.name: command
            for command in (
                Command("embed", self.embed, _parts, _embed_resumed, _files, bytes=400_000),
                Command("cluster", self.cluster, _steps, _cluster_resumed, _files, bytes=30_000),
                Command("pretrain", self.pretrain, _meta_step, _pretrain_resumed, _meta_files),
                Command("train", self.train, _epoch, _train_resumed, _run_files, bytes=150_000),
                Command("bench", self.bench, _finished_runs, _bench_resumed, _bench_files, fresh=True),
            )
        }
        self._undisturbed: dict[str, tuple[dict[str, Any], float]] = {}

    def made(self, name: str) -> Path:
        """Return the folder of the undisturbed run of a command, which is made when it is first asked for."""
        out = self.root / "made" / name
        if name not in self._undisturbed:
            if name == "cluster":
                _compile_search()
            command = self.commands[name]
            process = Process(command.argv(out), self.root, fresh=command.fresh)
            status = process.wait()
            assert status == 0, f"{name}, undisturbed: status {status}\n{process.printed()}"
            self._undisturbed[name] = command.products(out), process.seconds
        return out

    def expected(self, name: str) -> dict[str, Any]:
        """Return the products of the undisturbed run of a command."""
        self.made(name)
        return self._undisturbed[name][0]

    def seconds(self, name: str) -> float:
        """Return how long the undisturbed run of a command took."""
        self.made(name)
        return self._undisturbed[name][1]

    def embed(self, out: Path) -> list[str]:
        options = (
            "--backbone",
            "random-tiny",
            "--sentence-model",
            "hash:64",
            "--batch-size",
            "10",
            "--part-size",
            "10",
        )
        return ["embed", str(self.root / "shards"), "-o", str(out), *options, "--device", "cpu"]

    def cluster(self, out: Path) -> list[str]:
        return ["cluster", str(self.made("embed")), "-o", str(out), *CLUSTER]

    def pretrain(self, out: Path) -> list[str]:
        tasks = ("--store", str(self.made("embed")), "--hierarchy", str(self.made("cluster")), "--device", "cpu")
        return ["pretrain", *tasks, "-o", str(out), "--resume", *META]

    def train(self, out: Path) -> list[str]:
        flags = ("--root", str(self.root / "data"), "--seed", "1", "--trainer", "CoOpGRAM")
        configs = ("--dataset-config-file", "emoji_food", "--config-file", "gram_small_c4_ep10_batch32_ctxv1")
        start = ("TRAINER.GRAM.CHECKPOINT", str(self.made("pretrain") / "best.safetensors"))
        opts = ("DATASET.NUM_SHOTS", "2", "OPTIM.MAX_EPOCH", "4", "TEST.PER_EPOCH", "True", *start)
        return ["train", *flags, *configs, "--output-dir", str(out), *RUN, *opts]

    def bench(self, out: Path) -> list[str]:
        what = ("--trainers", "CoOp", "--datasets", "emoji_food", "--seeds", "1", "--shots", "2")
        where = ("--root", str(self.root / "data"), "--output", str(out), "--backbone", "gram_small", "--jobs", "1")
        return ["bench", *what, *where, *RUN, "OPTIM.MAX_EPOCH", "2"]


def _compile_search() -> None:
    """Let numba compile pynndescent in this process, so that a fork has it."""
    from gram_meta.clustering.sample import nearest_index

    nearest_index(np.eye(64, dtype=np.float32), 1).query(np.eye(64, dtype=np.float32), k=5)


def _write_shards(folder: Path) -> None:
    """Write tars of pictures of six words in two brightnesses; every 19th image is broken."""
    folder.mkdir(parents=True)
    draw, pixels = random.Random(0), np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(PER_SHARD):
                word = WORDS[number % len(WORDS)]
                noise = pixels.integers(0, 100, (32, 32, 3)) + (100 if number % 4 < 2 else 0)
                file = io.BytesIO()
                Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
                image = file.getvalue()[: 40 if number % 19 == 7 else None]
                caption = " ".join([*[word] * 4, draw.choice(OTHERS), draw.choice(OTHERS)])
                for suffix, content in (("png", image), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


# --- progress, and what a further start printed of it -----------------------------------------------------------------


def _parts(out: Path) -> int:
    if (out / "manifest.json").is_file() and json.loads((out / "manifest.json").read_text())["finished"]:
        return ALL
    return len(list((out / "parts").glob("0*.npz")))


def _embed_resumed(text: str) -> int:
    return _finished_or(text, r"going on after (\d+) of")


def _steps(out: Path) -> int:
    return ALL if (out / "topics.json").is_file() else len([*out.glob(".*.npz")])


def _cluster_resumed(text: str) -> int:
    return ALL if "finished before" in text else text.count("found by an earlier run")


def _meta_step(out: Path) -> int:
    from gram_meta.engine.checkpoints import read_checkpoint

    return read_checkpoint(out / "state.pt")["step"] if (out / "state.pt").is_file() else 0


def _pretrain_resumed(text: str) -> int:
    return _finished_or(text, r"soak: goes on after step (\d+)")


def _epoch(out: Path) -> int:
    if (out / "run.json").is_file() and json.loads((out / "run.json").read_text())["finished"]:
        return ALL
    pointer = out / "prompt_learner" / "checkpoint"
    return int(pointer.read_text().rpartition("-")[2]) if pointer.is_file() else 0


def _train_resumed(text: str) -> int:
    if "This run is finished" in text:
        return ALL
    return max(_finished_or(text, r"will resume training from epoch (\d+)") - 1, 0)


def _finished_runs(out: Path) -> int:
    folders = [
        Path(folder) for folder, _, files in os.walk(out) if "run.json" in files
    ]  # workers may still remove some
    return sum(json.loads((folder / "run.json").read_text())["finished"] for folder in folders)


def _bench_resumed(text: str) -> int:
    return _finished_or(text, r"(\d+) finished before")


def _finished_or(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else ALL if "finished before" in text else 0


# --- what is compared ------------------------------------------------------------------------------------------------


def _files(out: Path) -> dict[str, bytes]:
    """Return all files, byte for byte."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def _meta_files(out: Path) -> dict[str, bytes]:
    """Return all files but TensorBoard's, which have times, and the state, which torch packs with its file's name."""
    left_out = ("tensorboard/", "state.pt")
    return {name: content for name, content in _files(out).items() if not name.startswith(left_out)}


def _run_files(out: Path) -> dict[str, Any]:
    """Return a run's learned tensors, its results without times and versions, the names of its files, and what CoOp's
    parser takes from its log: the last accuracy."""
    from gram_meta.engine.checkpoints import read_checkpoint

    results = json.loads((out / "results.json").read_text())
    found = {key: results[key] for key in ("metrics", "curve", "regulator", "classnames", "epoch") if key in results}
    for path in sorted((out / "prompt_learner").glob("model.pth.tar-*")):
        state = read_checkpoint(path)["state_dict"]
        found[path.name] = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
    names = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    found["files"] = sorted(name for name in names if "tensorboard/" not in name)
    found["log"] = re.findall(r"^\* accuracy: .*", (out / "log.txt").read_text(), re.MULTILINE)[-1:]
    return found


def _bench_files(out: Path) -> dict[str, Any]:
    folders = sorted(file.parent for file in out.rglob("results.json"))
    logs = {path.name: path.read_text() for path in out.glob("bench_logs/*")}
    return {str(folder.relative_to(out)): _run_files(folder) for folder in folders} | {"logs": logs}
