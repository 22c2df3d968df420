"""Wrong edits of the JSON files that the commands read: one sentence, or the result as without the edit."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.edits import VALUES, places, replaced

from .processes import Process
from .trials import Lost, check_output, expect_equal, trial_folder
from .world import World

Reader = list[str] | Callable[[], object]


@dataclass(frozen=True)
class Target:
    """A file, and the commands that read it.

    Attributes:
        folder: returns what is copied for a trial.
        file: the file in it.
        readers: returns the commands for a copy of the folder.
    """

    folder: Callable[[], Path]
    file: str
    readers: Callable[[Path], list[Reader]]


class Targets:
    """Every kind of JSON file that this program writes and reads, each with its readers."""

    def __init__(self, world: World) -> None:
        self.world, self.other = world, set()  # outputs of status 0 that differ from those without the edit
        self._expected: dict[str, list[tuple[int | str, str]]] = {}
        root, made = world.root, world.made

        def store(copy: Path) -> list[Reader]:
            meta = ["--store", str(copy), "--hierarchy", str(made("cluster"))]
            out = ["-o", str(copy.parent / "new"), *world.cluster(copy)[4:]]
            return [["cluster", str(copy), *out], ["eval-meta", str(best(made("pretrain"))), *meta, "--tasks", "2"]]

        def hierarchy(copy: Path) -> list[Reader]:
            meta = ["--store", str(made("embed")), "--hierarchy", str(copy)]
            return [
                ["inspect", str(copy)],
                ["inspect", str(copy), "--json"],
                ["eval-meta", str(best(made("pretrain"))), *meta, "--tasks", "2"],
            ]

        def meta(copy: Path) -> list[Reader]:
            return [world.pretrain(copy), ["report", str(copy)], ["report", str(copy), "--format", "json"]]

        def checkpoint(copy: Path) -> list[Reader]:
            file, new = str(best(copy)), str(copy.parent / "new")
            tasks = ("--store", str(made("embed")), "--hierarchy", str(made("cluster")))
            return [["interpret", file], ["eval-meta", file, *tasks, "--tasks", "2"], ["export", file, "-o", new]]

        def run(copy: Path) -> list[Reader]:
            pictures = str(root / "data" / "emoji_food" / "images")
            predict = ["predict", pictures, "--model-dir", str(copy), "--format", "json"]
            collect = ["report", str(copy), "--collect", str(copy.parent / "all.json")]
            return [world.train(copy), predict, ["interpret", str(copy)], ["report", str(copy)], collect]

        def data(copy: Path) -> list[Reader]:
            argv = world.train(copy.parent / "new")
            argv[argv.index("--root") + 1] = str(copy)
            return [["check-data", str(copy), "--datasets", "emoji_food"], argv]

        def without_plan(copy: Path) -> list[Reader]:
            (copy / "parts" / "plan.json").unlink()  # it is made of the indices, which are read only then
            return [world.embed(copy)]

        def made_of(command: str, file: str, readers: Callable[[Path], list[Reader]]) -> Target:
            return Target(lambda: made(command), file, readers)

        few_shot = "emoji_food/split_fewshot/shot_2-seed_1.json"
        self.targets = {
            "store's manifest.json": made_of("embed", "manifest.json", store),
            "plan.json of an embedding": Target(self._half, "parts/plan.json", lambda copy: [world.embed(copy)]),
            "index of an embedding": Target(self._half, "parts/index/*.json", without_plan),
            "hierarchy's topics.json": made_of("cluster", "topics.json", hierarchy),
            "run.json of a meta-training": made_of("pretrain", "run.json", meta),
            "log.jsonl": made_of("pretrain", "log.jsonl", meta),
            "metadata of a meta-checkpoint": made_of("pretrain", "best.safetensors", checkpoint),
            "results.json": made_of("train", "results.json", run),
            "run.json": made_of("train", "run.json", run),
            "collected results": Target(self._collected, "all.json", lambda copy: [["report", str(copy / "all.json")]]),
            "bench.json": made_of("bench", "bench.json", lambda copy: [world.bench(copy)]),
            "demo.json": Target(self._demo, "demo.json", lambda copy: [lambda: _read_demo(copy / "demo.json")]),
            "split of a dataset": Target(self._data, "emoji_food/split_zhou_EmojiFood.json", data),
            "few-shot file": Target(self._data, few_shot, data),
        }

    def _collected(self) -> Path:
        """Return a folder with collected results."""
        folder = self.world.root / "collected"
        if not folder.exists():
            folder.mkdir()
            argv = ["report", str(self.world.made("train")), str(self.world.made("pretrain"))]
            process = Process([*argv, "--collect", str(folder / "all.json")], folder.parent)
            assert process.wait() == 0, process.printed()
        return folder

    def _demo(self) -> Path:
        """Return a folder with the memory of a demo."""
        folder = self.world.root / "demo"
        folder.mkdir(exist_ok=True)
        stages = {"embed": {"key": "k", "finished": True}, "world": {"key": "w", "finished": False}}
        (folder / "demo.json").write_text(json.dumps({"format": 2, "run": "r", "stages": stages}))
        return folder

    def _data(self) -> Path:
        """Return the datasets, with a few-shot file."""
        self.world.made("train")
        return self.world.root / "data"

    def _half(self) -> Path:
        """Return an embedding that was killed."""
        folder = self.world.root / "half"
        if not folder.exists():
            process = Process(self.world.embed(folder), folder.parent)
            while len(list((folder / "parts").glob("0*.npz"))) < 2 and process.process.is_alive():
                process.join(0.01)
            process.kill_after(0)
            assert process.killed
        return folder

    def expected(self, name: str) -> list[tuple[int | str, str]]:
        """Return status and output of each reader of a target that was not edited."""
        if name not in self._expected:
            target = self.targets[name]
            with trial_folder(self.world) as folder:
                copy = shutil.copytree(target.folder(), folder / "copy")
                found = [self._read(reader, folder) for reader in target.readers(copy)]
            assert all(status in (0, 1) for status, _ in found), f"{name}, not edited: {found}"
            self._expected[name] = found
        return self._expected[name]

    def trial(self, world: World, name: str, draw: random.Random) -> bool:
        """Edit the file of a target once; run its readers. Returns whether one of them refused the edit."""
        target, refused = self.targets[name], False
        expected = self.expected(name)
        with trial_folder(world) as folder:
            copy = shutil.copytree(target.folder(), folder / "copy")
            what = edit(draw.choice(sorted(copy.glob(target.file))), draw)
            for reader, (before, wanted) in zip(target.readers(copy), expected, strict=True):
                status, text = self._read(reader, folder)
                command = "soak" if callable(reader) else reader[0]
                try:
                    check_output(status, text, command)
                    if command == "embed" and status == 0:
                        expect_equal(world, command, copy)
                except Lost as lost:
                    raise Lost(f"{what}: {command}: {lost}") from None
                refused |= status == 2
                if status == before and text != wanted:
                    self.other.add(f"{what}: {command}: {text[-600:]}")
        return refused

    def _read(self, reader: Reader, folder: Path) -> tuple[int | str, str]:
        process = Process(reader, folder)
        status = process.wait()
        text = process.printed().replace(str(folder), "TRIAL")
        return status, re.sub(r"\d+\.\d+ ?s|\d\d:\d\d:\d\d|time [\d.]+ \([\d.]+\)|data [\d.]+ \([\d.]+\)", "TIME", text)


def best(folder: Path) -> Path:
    return folder / "best.safetensors"


def _read_demo(path: Path) -> None:
    from gram_meta.demo.run import Memory

    memory = Memory(path)
    print(memory.run, memory.finished("embed", "k"), memory.finished("world", "w"))


def edit(file: Path, draw: random.Random) -> str:
    """Edit a file: cut it off, or replace or remove one value; return what was done."""
    if draw.random() < 0.15:
        content = file.read_bytes()
        count = draw.randrange(len(content))
        file.write_bytes(content[:count] + draw.choice([b"", b"\xff", b"}"]))
        return f"{file.name} cut off after {count} of {len(content)} bytes"
    if file.suffix == ".safetensors":
        return _edit_metadata(file, draw)
    if file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        number = draw.randrange(len(lines))
        value, what = _edited(json.loads(lines[number]), draw)
        lines[number] = json.dumps(value)
        file.write_text("\n".join(lines) + "\n")
        return f"{file.name}, line {number + 1}: {what}"
    value, what = _edited(json.loads(file.read_text()), draw)
    file.write_text(json.dumps(value))
    return f"{file.name}: {what}"


def _edited(value: Any, draw: random.Random) -> tuple[Any, str]:
    path = draw.choice(list(places(value)))
    if path and isinstance(path[-1], str) and draw.random() < 0.2:
        node = edited = replaced(value, path, None)
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
        return edited, f"{path} removed"
    old = value
    for key in path:
        old = old[key]
    new = draw.choice([new for new in VALUES if not (isinstance(new, dict | list) and type(new) is type(old))])
    return replaced(value, path, new), f"{path} = {str(new)[:20]}"


def _edit_metadata(file: Path, draw: random.Random) -> str:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as opened:
        facts, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    value, what = _edited(json.loads(facts["gram-meta"]), draw)
    save_file(tensors, file, metadata={"gram-meta": json.dumps(value)})
    return f"{file.name}: {what}"
