"""CoOp, CoCoOp and ProMetaR in their own checkouts beside this project: one training step and one full test pass.

    git clone https://github.com/KaiyangZhou/CoOp
    git clone https://github.com/mlvlab/ProMetaR
    git clone https://github.com/learnables/learn2learn     # ProMetaR needs two files of it
    python scripts/bench/checkouts.py --coop CoOp --prometar ProMetaR --learn2learn learn2learn --data DATA

Every contestant runs in a process of its own (their `clip`, `trainers` and `datasets` clash), with the same weights,
classes, images, batches and precision; that the work is the same is checked in the same run: the batches' SHA-256, the
logits, the first loss and its gradients. Measures are taken in turns, A, B, C, A, B, C, ..., so that a busy machine
hits all alike. The step is the trainer's own `forward_backward`, the test pass its own `test`, on prepared batches and
again with the images decoded and augmented on the way. Processor time is that of the whole process (one thread by
default). Without --data, images are made up; without a checkout, its trainers are left out. ProMetaR is another method
than GRAM: its step does more, and stands here because its users will ask. The checkouts stay untouched: what has to be
patched for today's torch is patched at run time and named in the output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas
import torch
from PIL import Image

from gram_meta.backbone.clip import RUN_PRECISIONS, load_backbone
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.prompts import META_NET, initial_meta_net, initial_prompts
from gram_meta.method.regulator import GradientRegulator

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
WORKER = Path(__file__).with_name("contestant.py")
ROOT = Path(__file__).resolve().parents[2]

# -------------------------------------------------------------------------------------------------------- contestants


@dataclass(frozen=True)
class Entry:
    """A trainer, whose it is, and the options that make its work the same as the others'."""

    trainer: str
    owner: str  # "theirs" or "ours"
    node: str  # its options are TRAINER.<node>
    config: str
    checkout: str = ""  # "coop" or "prometar"
    options: Mapping[str, Any] = field(default_factory=dict)
    compared: bool = False  # with the first of the group: same method, so same numbers

    @property
    def name(self) -> str:
        return f"{self.trainer}, {'its checkout' if self.owner == 'theirs' else 'this project'}"


@dataclass(frozen=True)
class Group:
    batch: int
    entries: tuple[Entry, ...]
    conditional: bool = False
    towers: bool = True  # whether the image tower can be measured alone (not if it learns)


WORDS = {"N_CTX": 4, "CTX_INIT": "a photo of a"}
C4 = "vit_b16_c4_ep10_batch32_ctxv1"
C4_ONE = "vit_b16_c4_ep10_batch1_ctxv1"
GROUPS = {
    "coop": Group(
        32,
        (
            Entry("CoOp", "theirs", "COOP", "vit_b16", "coop", WORDS),
            Entry("CoOp", "ours", "COOP", C4, options=WORDS, compared=True),
            Entry("CoOpGRAM", "ours", "COOP", C4, options=WORDS, compared=True),
        ),
    ),
    "cocoop": Group(
        1,
        (
            Entry("CoCoOp", "theirs", "COCOOP", C4_ONE, "coop", WORDS),
            Entry("CoCoOp", "ours", "COCOOP", C4_ONE, options=WORDS, compared=True),
            Entry("CoCoOpGRAM", "ours", "COCOOP", C4_ONE, options=WORDS, compared=True),
        ),
        conditional=True,
    ),
    "prometar": Group(
        4,
        (
            Entry("ProMetaR", "theirs", "PROMETAR", "vit_b16_c2_ep10_batch4_4+4ctx", "prometar"),
            Entry("UniGRAM", "ours", "JOINT", "vit_b16_c2+2_ep10_batch32_ctxv1"),
            Entry("CoOpGRAM", "ours", "COOP", C4, options=WORDS),
        ),
        towers=False,
    ),
}


class Process:
    """A contestant's process: `ask` sends an order and waits for the answer."""

    def __init__(self, entry: Entry, spec: dict[str, Any], environment: dict[str, str]) -> None:
        self.entry, self.folder = entry, Path(spec["folder"])
        self.folder.mkdir()
        path = self.folder / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, str(WORKER), str(path)]
        self.process = subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)

    def ask(self, what: str, **words: Any) -> dict[str, Any]:
        """Send an order; return the answer, or raise GramError if the contestant failed."""
        self.send(what, **words)
        answer = self.answer()
        if "error" in answer:
            raise GramError(f"{self.entry.name}, {words.get('measure', what)}: {answer['error']}")
        return answer

    def send(self, what: str, **words: Any) -> None:
        """Send an order."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": what, **words}) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the next answer, or {"error": sentence} if the contestant failed."""
        if line := self.process.stdout.readline():
            return json.loads(line)
        log = self.folder / "log.txt"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        return {"error": f"its process ended (status {self.process.wait()}) {' '.join(last)}".strip()}

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# --------------------------------------------------------------------------------------------------------------- data


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


# ---------------------------------------------------------------------------------------------------------------- run


class Bench:
    """What all groups share: weights, data, and where the checkouts are."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.checkouts = {"coop": args.coop, "prometar": args.prometar}
        for name, path in self.checkouts.items():
            if path and not (path / "train.py").is_file():
                raise GramError(f"--{name} {path}: expected a checkout with a train.py, found none")
        self.weights = folder / "weights.pt"
        model = load_backbone(args.model).model
        torch.save({key: value.half() for key, value in model.state_dict().items()}, self.weights)  # CoOp loads fp16
        self.backbone = load_backbone(str(self.weights))  # rounded: its fingerprint is the one that trainers see
        if args.data:
            self.root = mirrored(args.data, folder)
        else:
            batch = max(GROUPS[name].batch for name in args.groups)
            self.root = made_up(args.classes, batch, args.test_images or 100, folder)

    def spec(self, group: Group, entry: Entry, precision: str, folder: Path) -> dict[str, Any]:
        """Return the specification of a contestant's process."""
        args, size = self.args, self.backbone.image_size
        checkout, config, dataset = "", entry.config, args.dataset
        if entry.owner == "theirs":
            checkout = self.checkouts[entry.checkout].resolve()
            config = checkout / "configs" / "trainers" / entry.trainer / f"{entry.config}.yaml"
            dataset = checkout / "configs" / "datasets" / f"{args.dataset}.yaml"
        options: dict[str, Any] = {
            "INPUT.SIZE": f"({size}, {size})",
            "DATALOADER.NUM_WORKERS": 0,  # decoding and augmenting count where they are asked for
            "DATALOADER.TRAIN_X.BATCH_SIZE": group.batch,
            "DATALOADER.TEST.BATCH_SIZE": 100,
            "OPTIM.WARMUP_EPOCH": -1,  # steps that move the prompts
            "USE_CUDA": args.device == "cuda",
            f"TRAINER.{entry.node}.PREC": precision,
            **{f"TRAINER.{entry.node}.{key}": value for key, value in entry.options.items()},
        }
        if entry.trainer.endswith("GRAM"):
            path = self.meta_checkpoint(*((2, 2) if entry.node == "JOINT" else (4, 0)), group.conditional)
            options |= {"TRAINER.GRAM.CHECKPOINT": path, "TRAINER.GRAM.INIT": False}
        return {
            "owner": entry.owner,
            "trainer": entry.trainer,
            "checkout": str(checkout),
            "config": str(config),
            "dataset_config": str(dataset),
            "opts": [str(part) for pair in options.items() for part in pair],
            "root": str(self.root),
            "model": str(self.weights),
            "precision": precision,
            "device": args.device,
            "threads": args.threads,
            "test_images": args.test_images,
            "learn2learn": str(args.learn2learn.resolve()) if args.learn2learn else "",
            "folder": str(folder),
        }

    def meta_checkpoint(self, text: int, visual: int, conditional: bool) -> Path:
        """Save a meta-checkpoint that fits. Trainers take R^phi from it; prompts start as in the other contestants."""
        path = self.folder / f"meta_{text}_{visual}_{conditional}.safetensors"
        if not path.is_file():
            prompts = initial_prompts(self.backbone, text, visual)
            regulator = GradientRegulator({kind: value.shape[-1] for kind, value in prompts.items()})
            net = initial_meta_net(self.backbone) if conditional else {}
            extras = {f"{META_NET}{name}": value for name, value in net.items()}
            name = {"backbone_name": self.backbone.name, "backbone_fingerprint": self.backbone.fingerprint}
            save_meta_checkpoint(path, MetaCheckpoint(prompts=prompts, regulator=regulator, extras=extras, **name))
        return path

    def environment(self) -> dict[str, str]:
        """Return a contestant's environment variables: its threads, and which Dassl it uses."""
        paths = [str(ROOT)]  # this project, installed or not; behind a checkout's folder
        if self.args.dassl:
            paths.append(str(self.args.dassl.resolve()))
        if given := os.environ.get("PYTHONPATH"):
            paths.append(given)
        return {
            **os.environ,
            "GRAM_DASSL": "real" if self.args.dassl else "builtin",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(self.args.threads),
            "PYTHONPATH": os.pathsep.join(paths),
        }

    def run(self, name: str, precision: str) -> dict[str, Any]:
        """Run one group in one precision; return the answers of every contestant."""
        group, processes = GROUPS[name], []
        for index, entry in enumerate(group.entries):
            if entry.checkout and not self.checkouts[entry.checkout]:
                print(f"{entry.name}: left out, as there is no --{entry.checkout}")
                continue
            spec = self.spec(group, entry, precision, self.folder / f"{name}_{precision}_{index}")
            processes.append(Process(entry, spec, self.environment()))
        try:
            return {"group": name, "precision": precision, "batch": group.batch, **self._measure(group, processes)}
        finally:
            for process in processes:
                process.close()

    def _measure(self, group: Group, processes: list[Process]) -> dict[str, Any]:
        args = self.args
        for process in processes:
            process.send("build")  # side by side
        built = {process.entry.name: process.answer() for process in processes}
        processes = [process for process in processes if "error" not in built[process.entry.name]]
        same_batches({process.entry.name: built[process.entry.name] for process in processes})
        checks = {}
        for process in processes:
            process.send("check")
            checks[process.entry.name] = process.answer()
        processes = [process for process in processes if "error" not in checks[process.entry.name]]
        failed = {name: answer["error"] for name, answer in (built | checks).items() if "error" in answer}
        measures = [measure for measure in args.measures if group.towers or not measure.startswith("tower")]
        rows: dict[str, dict[str, Any]] = {
            process.entry.name: {"built": built[process.entry.name], "rounds": {measure: [] for measure in measures}}
            for process in processes
        }
        for number in range(args.rounds):
            for measure in measures:
                for process in processes:
                    answer = process.ask("timed", measure=measure, count=args.steps)
                    rows[process.entry.name]["rounds"][measure].append(answer)
            print(f"  round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
        for process in processes:  # memory apart from time, and once everything is warm
            rows[process.entry.name]["peak_mb"] = {
                measure: process.ask("peak", measure=measure, count=1)["peak_mb"]
                for measure in measures
                if measure in WITH_PEAK
            }
        equal = compare([process.entry for process in processes], checks)
        return {"left_out": failed, "contestants": rows, "equal": equal}


class ProMetaRStep:
    """ProMetaR's own training step on a batch of made-up images, as a step of `common.measure` (for meta_step.py)."""

    def __init__(self, args: argparse.Namespace, folder: Path, images: int) -> None:
        flags = ["--prometar", str(args.prometar), "--model", args.backbone, "--classes", str(args.ways)]
        flags += ["--learn2learn", str(args.learn2learn)] if args.learn2learn else []
        flags += ["--device", args.device, "--threads", str(torch.get_num_threads()), "--test-images", "2"]
        group = replace(GROUPS["prometar"], batch=images)
        GROUPS["prometar"] = group  # so many images are made
        bench = Bench(build_parser().parse_args([*flags, "--groups", "prometar"]), folder)
        spec = bench.spec(group, group.entries[0], "fp32", folder / "prometar")
        self.clock, self.process = args.clock, Process(group.entries[0], spec, bench.environment())
        self.patches = self.process.ask("build")["patches"]

    def seconds(self) -> float:
        """Return the seconds of one step."""
        return self.process.ask("timed", measure="step", count=1)[self.clock]

    def with_peak(self) -> tuple[float, None]:
        """Return the peak memory of one step in MB."""
        return self.process.ask("peak", measure="step", count=1)["peak_mb"], None


def same_batches(built: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise GramError unless all contestants have the same classes and pixels."""
    names = list(built)
    for name in names[1:]:
        for key, what in (("classnames_sha256", "class names"), ("sha256", "batches")):
            if built[name][key] != built[names[0]][key]:
                raise GramError(f"{name}: its {what} are not those of {names[0]}; expected the same work for all")


def compare(entries: Sequence[Entry], checks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how far a contestant's first numbers are from those of the same method in the checkout."""
    if not entries or entries[0].owner != "theirs":
        return {}
    theirs, result = checks[entries[0].name], {}
    arrays = {entry.name: dict(np.load(checks[entry.name]["arrays"])) for entry in entries}
    for entry in entries[1:]:
        if not entry.compared:
            continue
        a, b = arrays[entries[0].name], arrays[entry.name]
        if entry.trainer != entries[0].trainer:  # a regulated gradient is another one by definition
            a, b = {"logits": a["logits"]}, {"logits": b["logits"]}
        if set(a) != set(b):
            raise GramError(f"{entry.name}: learns {sorted(b)}, expected {sorted(a)} as in the checkout")
        loss = abs(checks[entry.name]["loss"] - theirs["loss"]) / abs(theirs["loss"])
        apart = {name: float(np.abs(b[name] - a[name]).max() / np.abs(a[name]).max()) for name in a}
        result[entry.name] = {"loss": loss, **apart}
    return result


# ------------------------------------------------------------------------------------------------------------- tables


def summary(table: Mapping[str, Any], steps: int, clock: str) -> dict[str, dict[str, Any]]:
    """Return, for every measure and contestant, times in ms (per step), and the first one's time over its own."""
    result: dict[str, dict[str, Any]] = {}
    for name, row in table["contestants"].items():
        for measure, rounds in row["rounds"].items():
            first = next(iter(table["contestants"].values()))["rounds"][measure]
            times = pandas.DataFrame(rounds)[["cpu", "wall"]] * 1000 / (steps if measure in PER_STEP else 1)
            times["ratio"] = pandas.DataFrame(first)[clock] / pandas.DataFrame(rounds)[clock]
            times = times.rename(columns={"cpu": "cpu_ms", "wall": "wall_ms"})
            spread = times.agg(["median", "min", "max"]).rename({"min": "least", "max": "most"})
            result.setdefault(measure, {})[name] = spread.to_dict() | {"peak_mb": row["peak_mb"].get(measure)}
    return result


def print_group(table: Mapping[str, Any]) -> None:
    """Print the tables of a group as Markdown."""
    contestants = table["contestants"]
    print(f"\n### {table['group']}, {table['precision']}\n")
    for name, reason in table["left_out"].items():
        print(f"{name}: left out, it stopped with {reason}\n")
    if not contestants:
        return
    built = next(iter(contestants.values()))["built"]
    print(
        f"{built['classes']} classes, {built['pixels'][0]} x {built['pixels'][1]} pixels; a step on {built['batch']} "
        f"images, a test pass over {built['test_images']} in batches of 100; Dassl: {built['engine']}.\n"
    )
    for measure, rows in table["summary"].items():
        out = []
        for name, row in rows.items():
            cells = {TITLES[measure]: name, "processor time (ms)": figure(row["cpu_ms"])}
            cells |= {"wall clock (ms)": figure(row["wall_ms"]), "ratio": figure(row["ratio"], 2)}
            out.append(cells | {"peak memory (MB)": "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"})
        common.print_table(out)
    for name, row in table["equal"].items():
        print(f"{name}, apart from the checkout: " + ", ".join(f"{k} {v:.1e}" for k, v in row.items()))
    for name, row in contestants.items():
        for patch in row["built"]["patches"]:
            print(f"{name}, patched: {patch}")


def figure(value: Mapping[str, float], digits: int = 0) -> str:
    """Return "median (least to most)"."""
    return f"{value['median']:.{digits}f} ({value['least']:.{digits}f} to {value['most']:.{digits}f})"


# ------------------------------------------------------------------------------------------------------- command line


def commit(folder: Path) -> str:
    """Return the commit of a checkout, with a star where files differ from it; "" without git."""
    git = ["git", "-C", str(folder)]
    orders = (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
    try:
        head, dirty = (
            subprocess.run([*git, *order], capture_output=True, text=True, check=True).stdout.strip()
            for order in orders
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + "*" * bool(dirty)


def build_parser() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    add = parser.add_argument
    add("--coop", type=Path, help="a checkout of KaiyangZhou/CoOp")
    add("--prometar", type=Path, help="a checkout of mlvlab/ProMetaR")
    add("--learn2learn", type=Path, help="sources of learn2learn, where it is not installed (ProMetaR)")
    add("--dassl", type=Path, help="a checkout of KaiyangZhou/Dassl.pytorch; default: the built-in engine for all")
    add("--data", type=Path, help="the datasets' root; default: made-up images and class names")
    add("--dataset", default="caltech101", help="its config file's name (%(default)s)")
    add("--classes", type=int, default=100, help="of made-up data (%(default)s)")
    add("--model", default="gram-small", help="as for load_backbone; random-ViT-B/16: shapes alone (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--precision", nargs="+", choices=RUN_PRECISIONS, default=["fp32"], help="of the towers (fp32)")
    add("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="(all)")
    add("--measures", nargs="+", choices=list(TITLES), default=list(TITLES), help="(all)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--steps", type=int, default=4, help="training steps in a row of one contestant (%(default)s)")
    add("--test-images", type=int, default=0, help="of a test pass; 0: all there are (made-up data: 100)")
    add("--threads", type=int, default=1, help="processor threads of a contestant (%(default)s)")
    add("-o", "--output", type=Path, help="JSON with all numbers, round by round")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise GramError("--device cuda: expected a GPU that torch can use, found none")
        run(args)
    except GramError as error:
        print(f"checkouts.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Run all groups in all precisions; the JSON file is written after each, so that an interruption loses nothing."""
    places = {"this project": ROOT, "CoOp": args.coop, "ProMetaR": args.prometar, "Dassl": args.dassl}
    places["learn2learn"] = args.learn2learn
    report = common.report(args) | {"tables": []}
    report["facts"]["commits"] = {name: commit(place) for name, place in places.items() if place}
    with tempfile.TemporaryDirectory(prefix="checkouts-") as folder:
        bench = Bench(args, Path(folder))
        print(f"{args.model} on {args.device}; {report['facts']['processor']}; torch {torch.__version__}")
        for precision in args.precision:
            for name in args.groups:
                table = bench.run(name, precision)
                table["summary"] = summary(table, args.steps, "wall" if args.device == "cuda" else "cpu")
                print_group(table)
                sys.stdout.flush()
                report["tables"].append(table)
                common.write_report(args, report)


if __name__ == "__main__":
    sys.exit(main())
