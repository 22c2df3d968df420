"""CoOp, CoCoOp and ProMetaR in their own checkouts beside this project: one training step and one full test pass.

    git clone https://github.com/KaiyangZhou/CoOp
    git clone https://github.com/mlvlab/ProMetaR
    git clone https://github.com/learnables/learn2learn     # ProMetaR needs two files of it
    python scripts/bench/checkouts.py --coop CoOp --prometar ProMetaR --learn2learn learn2learn --data DATA

docs/results/benchmarks.md explains what is measured. Without --data, images are made up; without a checkout, its
trainers are left out. No file of a checkout is changed.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import contestant
import numpy as np
import torch
from PIL import Image

from gram_meta.backbone.clip import RUN_PRECISIONS, load_backbone
from gram_meta.errors import GramError

TITLES = {
    "step": "training step",
    "step_with_loader": "training step, with decoding and augmenting",
    "test": "test pass",
    "test_with_loader": "test pass, with decoding and resizing",
    "tower": "image tower alone, training batch",
    "tower_of_test": "image tower alone, test batches",
    "loader": "decoding and augmenting alone, training batch",
    "loader_of_test": "decoding and resizing alone, test images",
}
PER_STEP = ("step", "step_with_loader", "tower", "loader")
WITH_PEAK = ("step", "step_with_loader", "test", "test_with_loader")
DATASET = "caltech101"


@dataclass(frozen=True)
class Entry:
    """A trainer of this project, or of a checkout ("coop" or "prometar"); its options are TRAINER.<node>."""

    trainer: str
    node: str
    config: str
    checkout: str = ""

    @property
    def name(self) -> str:
        return f"{self.trainer}, {'its checkout' if self.checkout else 'this project'}"


C4 = "vit_b16_c4_ep10_batch32_ctxv1"
C4_ONE = "vit_b16_c4_ep10_batch1_ctxv1"
GROUPS = {
    "coop": (Entry("CoOp", "COOP", "vit_b16", "coop"), Entry("CoOp", "COOP", C4), Entry("CoOpGRAM", "COOP", C4)),
    "cocoop": (
        Entry("CoCoOp", "COCOOP", C4_ONE, "coop"),
        Entry("CoCoOp", "COCOOP", C4_ONE),
        Entry("CoCoOpGRAM", "COCOOP", C4_ONE),
    ),
    "prometar": (  # its method is another: numbers are not compared; its image tower learns and cannot be run alone
        Entry("ProMetaR", "PROMETAR", "vit_b16_c2_ep10_batch4_4+4ctx", "prometar"),
        Entry("UniGRAM", "JOINT", "vit_b16_c2+2_ep10_batch32_ctxv1"),
        Entry("CoOpGRAM", "COOP", C4),
    ),
}
BATCHES = {"coop": 32, "cocoop": 1, "prometar": 4}


class Process:
    """A contestant's process."""

    def __init__(self, spec: argparse.Namespace) -> None:
        self.spec, self.name = spec, spec.entry.name
        spec.folder.mkdir()
        self.pool = common.own_process(contestant.begin, spec.folder, "real" if spec.dassl else "builtin")
        self.pool.submit(contestant.answer, spec, "facts")  # it is built while the others are

    def ask(self, what: str, *words: Any) -> Any:
        """Return what a method of the contestant returns; raise GramError if the contestant fails."""
        try:
            return self.pool.submit(contestant.answer, self.spec, what, *words).result()
        except GramError as error:
            raise GramError(f"{self.name}: left out, it stopped with {error}") from None
        except BrokenProcessPool:
            raise GramError(f"{self.name}: left out, its process ended (perhaps for lack of memory)") from None


def mirrored(data: Path, folder: Path) -> Path:
    """Make a root with links to the contents of `data`, so that trainers write nothing into the user's folders."""
    if not data.is_dir():
        raise GramError(f"--data {data}: expected the folder that holds the datasets' folders, found no such folder")
    root = folder / "data"
    for item in data.glob("*/*"):
        if item.name != "split_fewshot":
            link = root / item.parent.name / item.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(item.resolve())
    return root


def made_up(classes: int, batch: int, tests: int, folder: Path) -> Path:
    """Make a root with Caltech101's layout: ImageNet's class names, and JPEG files of smooth noise."""
    root, random = folder / "data", np.random.default_rng(0)
    images = root / "caltech-101" / "101_ObjectCategories"
    images.mkdir(parents=True)
    names = common.class_names(classes)

    def draw(part: str, count: int) -> list[list[Any]]:
        rows = [[f"{part}_{index}.jpg", index % classes, names[index % classes]] for index in range(count)]
        for file, _, _ in rows:
            pixels = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(images / file, quality=90)
        return rows

    counts = {"train": max(classes, 4 * batch), "val": classes, "test": tests}  # every class occurs in training
    split = {part: draw(part, count) for part, count in counts.items()}
    (images.parent / "split_zhou_Caltech101.json").write_text(json.dumps(split), encoding="utf-8")
    return root


class Bench:
    """What all groups share: weights, data, and where the checkouts are."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.failed = args, folder, False
        self.checkouts = {"coop": args.coop, "prometar": args.prometar}
        for name, path in self.checkouts.items():
            if path and not (path / "train.py").is_file():
                raise GramError(f"--{name} {path}: expected a checkout with a train.py, found none")
        if args.dassl:
            sys.path.append(str(args.dassl.resolve()))  # a new process has this path, too
        self.weights = folder / "weights.pt"
        model = load_backbone(args.backbone).model
        torch.save({key: value.half() for key, value in model.state_dict().items()}, self.weights)  # CoOp loads fp16
        self.backbone = load_backbone(str(self.weights))  # rounded: its fingerprint is the one that trainers see
        if args.data:
            self.root = mirrored(args.data, folder)
        else:
            batch = args.batch or max(BATCHES[name] for name in args.groups)
            self.root = made_up(args.classes, batch, args.test_images or 100, folder)

    def start(self, entry: Entry, batch: int, folder: Path) -> Process:
        size, node = self.backbone.image_size, f"TRAINER.{entry.node}"
        options: dict[str, Any] = {
            "INPUT.SIZE": f"({size}, {size})",
            "DATALOADER.NUM_WORKERS": 0,  # decoding and augmenting count where they are asked for
            "DATALOADER.TRAIN_X.BATCH_SIZE": batch,
            "DATALOADER.TEST.BATCH_SIZE": 100,
            "OPTIM.WARMUP_EPOCH": -1,  # steps that move the prompts
            "USE_CUDA": self.args.device == "cuda",
            f"{node}.PREC": self.args.precision,
        }
        if entry.node in ("COOP", "COCOOP"):
            options |= {f"{node}.N_CTX": 4, f"{node}.CTX_INIT": "a photo of a"}
        if entry.trainer.endswith("GRAM"):
            tokens = (2, 2) if entry.node == "JOINT" else (4, 0)
            meta = folder.with_suffix(".safetensors")  # R^phi; prompts start as in the other contestants
            meta = common.save_start(meta, self.backbone, *tokens, conditional=entry.node == "COCOOP")
            options |= {"TRAINER.GRAM.CHECKPOINT": meta, "TRAINER.GRAM.INIT": False}
        spec = argparse.Namespace(**vars(self.args))
        spec.entry, spec.folder, spec.root, spec.weights = entry, folder, self.root, self.weights
        spec.opts = [word for pair in options.items() for word in pair]
        spec.checkout, spec.config, spec.dataset = None, entry.config, DATASET
        spec.learn2learn = self.args.learn2learn and self.args.learn2learn.resolve()
        if entry.checkout:
            spec.checkout = self.checkouts[entry.checkout].resolve()
            configs = spec.checkout / "configs"
            spec.config = configs / "trainers" / entry.trainer / f"{entry.config}.yaml"
            spec.dataset = configs / "datasets" / f"{DATASET}.yaml"
        return Process(spec)

    def run(self, name: str) -> dict[str, Any]:
        """Run one group; return the answers of every contestant."""
        left_out, batch = {}, self.args.batch or BATCHES[name]
        with contextlib.ExitStack() as stack:
            started, processes, built, checks = [], [], {}, {}
            for index, entry in enumerate(GROUPS[name]):
                if entry.checkout and not self.checkouts[entry.checkout]:
                    left_out[entry.name] = f"{entry.name}: left out, as there is no --{entry.checkout}"
                else:
                    started.append(self.start(entry, batch, self.folder / f"{name}_{index}"))
                    stack.enter_context(started[-1].pool)
            for process in started:
                try:
                    built[process.name], checks[process.name] = process.ask("facts"), process.ask("check")
                    processes.append(process)
                except GramError as error:
                    left_out[process.name], self.failed = str(error), True
            same_batches(built)
            measures = [one for one in self.args.measures if not (name == "prometar" and one.startswith("tower"))]
            rows = self._measure(processes, measures)
        rows = {name: row | {"built": built[name]} for name, row in rows.items()}
        equal = {} if name == "prometar" else compare([process.spec.entry for process in processes], checks)
        return {"group": name, "left_out": left_out, "contestants": rows, "equal": equal}

    def _measure(self, processes: Sequence[Process], measures: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the times of every round, and then, once everything is warm, the peak memory."""
        args = self.args
        rounds: dict[str, Any] = {process.name: {measure: [] for measure in measures} for process in processes}
        for number in range(args.repeats):
            for measure in measures:
                for process in processes:
                    rounds[process.name][measure].append(process.ask("timed", measure, args.steps))
            print(f"  round {number + 1} of {args.repeats} done", file=sys.stderr, flush=True)
        with_peak = [name for name in measures if name in WITH_PEAK]
        peaks = {process.name: {name: process.ask("peak", name) for name in with_peak} for process in processes}
        return {name: {"rounds": its, "peak_mb": peaks[name]} for name, its in rounds.items()}


def same_batches(built: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise GramError unless all contestants have the same classes and pixels."""
    names = list(built)
    for name in names[1:]:
        for key, what in (("classnames_sha256", "class names"), ("sha256", "batches")):
            if built[name][key] != built[names[0]][key]:
                raise GramError(f"{name}: its {what} are not those of {names[0]}; expected the same work for all")


def compare(entries: Sequence[Entry], checks: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Return how far a contestant's first numbers are from the checkout's, relative to the largest entry."""
    if not entries or not entries[0].checkout:
        return {}
    theirs, result = checks[entries[0].name], {}
    for entry in entries[1:]:
        ours = checks[entry.name]
        if entry.trainer == entries[0].trainer and set(ours) != set(theirs):
            raise GramError(f"{entry.name}: learns {sorted(ours)}, expected {sorted(theirs)} as in the checkout")
        # a regulated gradient is another one by definition
        names = theirs if entry.trainer == entries[0].trainer else ("loss", "logits")
        apart = {name: np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in names}
        result[entry.name] = {name: float(value) for name, value in apart.items()}
    return result


def cells(row: Mapping[str, Any], first: Mapping[str, Any], measure: str, args: argparse.Namespace) -> dict[str, str]:
    """Return a contestant's times in ms (per step), the first one's time over its own by round, and its peak memory."""
    scale, clock = 1000 / (args.steps if measure in PER_STEP else 1), args.clock
    rounds, first_rounds = row["rounds"][measure], first["rounds"][measure]
    return {
        "processor time (ms)": common.spread([one["cpu"] * scale for one in rounds]),
        "wall clock (ms)": common.spread([one["wall"] * scale for one in rounds]),
        "ratio": common.spread([a[clock] / b[clock] for a, b in zip(first_rounds, rounds, strict=True)], 2),
        "peak memory (MB)": f"{row['peak_mb'][measure]:.0f}" if measure in row["peak_mb"] else "",
    }


def print_group(table: Mapping[str, Any], args: argparse.Namespace) -> None:
    contestants = table["contestants"]
    print(f"\n### {table['group']}\n")
    for reason in table["left_out"].values():
        print(f"{reason}\n")
    if not contestants:
        return
    first = next(iter(contestants.values()))
    built = first["built"]
    print(
        f"{built['classes']} classes, {built['pixels'][0]} x {built['pixels'][1]} pixels; a step on {built['batch']} "
        f"images, a test pass over {built['test_images']} in batches of 100; Dassl: {built['engine']}.\n"
    )
    for measure in first["rounds"]:
        rows = [{TITLES[measure]: name} | cells(row, first, measure, args) for name, row in contestants.items()]
        common.print_table(rows)
    for name, row in table["equal"].items():
        print(f"{name}, apart from the checkout: " + ", ".join(f"{k} {v:.1e}" for k, v in row.items()))
    for name, row in contestants.items():
        for patch in row["built"]["patches"]:
            print(f"{name}, patched: {patch}")


def commit(folder: Path) -> str:
    """Return the commit of a checkout, with a star where files differ from it; "" without git."""
    git = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return ""


def build_parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, RUN_PRECISIONS)
    parser.set_defaults(backbone="gram-small", threads=1, clock="cpu")
    add = parser.add_argument
    add("--coop", type=Path, help="a checkout of KaiyangZhou/CoOp")
    add("--prometar", type=Path, help="a checkout of mlvlab/ProMetaR")
    add("--learn2learn", type=Path, help="sources of learn2learn, where it is not installed (ProMetaR)")
    add("--dassl", type=Path, help="a checkout of KaiyangZhou/Dassl.pytorch; default: the built-in engine for all")
    add("--data", type=Path, help="the datasets' root, for Caltech101; default: made-up images and class names")
    add("--classes", type=int, default=100, help="of made-up data (%(default)s)")
    add("--batch", type=int, default=0, help="images of a training step (0: coop 32, cocoop 1, prometar 4)")
    add("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="(all)")
    add("--measures", nargs="+", choices=list(TITLES), default=list(TITLES), help="(all)")
    add("--steps", type=int, default=4, help="training steps in a row of one contestant (%(default)s)")
    add("--test-images", type=int, default=0, help="of a test pass; 0: all there are (made-up data: 100)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise GramError("--device cuda: expected a GPU that torch can use, found none")
        args.clock = "wall" if args.device == "cuda" else args.clock
        return run(args)
    except GramError as error:
        print(f"checkouts.py: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Run all groups, and write the JSON file after each; return 1 if a contestant stopped."""
    places = {"this project": Path(__file__).parent, "CoOp": args.coop, "ProMetaR": args.prometar, "Dassl": args.dassl}
    places["learn2learn"] = args.learn2learn
    torch.set_num_threads(args.threads or torch.get_num_threads())
    report = common.report(args) | {"tables": []}
    report["facts"]["commits"] = {name: commit(place) for name, place in places.items() if place}
    print(common.environment(args))
    with tempfile.TemporaryDirectory(prefix="checkouts-") as folder:
        bench = Bench(args, Path(folder))
        for name in args.groups:
            table = bench.run(name)
            print_group(table, args)
            sys.stdout.flush()
            report["tables"].append(table)
            common.write_report(args, report)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
