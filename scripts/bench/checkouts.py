"""CoOp, CoCoOp and ProMetaR in their own checkouts beside this project: one training step and one full test pass.

    git clone https://github.com/KaiyangZhou/CoOp
    git clone https://github.com/mlvlab/ProMetaR
    git clone https://github.com/learnables/learn2learn     # ProMetaR needs two files of it
    python scripts/bench/checkouts.py --coop CoOp --prometar ProMetaR --learn2learn learn2learn --data DATA

Every contestant runs in a process of its own (their `clip`, `trainers` and `datasets` clash), with the same weights,
classes, images, batches and precision; that the work is the same is checked in the same run: the batches' SHA-256, the
logits, the first loss and its gradients. Measures are taken in turns, A, B, C, A, B, C, ..., so that a busy machine hits
all alike. The step is the trainer's own `forward_backward`, the test pass its own `test`, on prepared batches and again
with the images decoded and augmented on the way. Processor time is that of the whole process (one thread by default).
Without --data, images are made up; without a checkout, its trainers are left out. ProMetaR is another method than GRAM:
its step does more, and stands here because its users will ask. The checkouts stay untouched: what has to be patched for
today's torch is patched at run time and named in the output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from gram_meta.backbone.clip import RUN_PRECISIONS, Backbone, load_backbone
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.prompts import META_NET, initial_meta_net, initial_prompts

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
        path = self.folder / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=environment,
        )

    def ask(self, what: str, **words: Any) -> dict[str, Any]:
        """Send an order; return the answer, or raise GramError if the contestant failed."""
        self.send(what, **words)
        answer = self.answer()
        if "error" in answer:
            raise GramError(f"{self.entry.name}, {words.get('measure', what)}: {answer['error']}")
        return answer

    def send(self, what: str, **words: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": what, **words}) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the next answer, or {"error": sentence} if the contestant failed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        log = self.folder / "log.txt"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        return {"error": f"its process ended (status {self.process.wait()}) {' '.join(last)}".strip()}

    def close(self) -> None:
        assert self.process.stdin is not None
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
    for dataset in data.iterdir():
        if dataset.is_dir():
            (root / dataset.name).mkdir(parents=True)
            for item in dataset.iterdir():
                if item.name != "split_fewshot":
                    (root / dataset.name / item.name).symlink_to(item.resolve())
    return root


def made_up(classes: int, batch: int, tests: int, folder: Path) -> Path:
    """Make a root with Caltech101's layout: made-up names, and smooth noise of a photo's size as JPEG files."""
    from PIL import Image

    root, random = folder / "data", np.random.default_rng(0)
    images = root / "caltech-101" / "101_ObjectCategories"
    images.mkdir(parents=True)
    names = common.class_names(classes)
    trains = max(classes, 4 * batch)  # every class occurs

    def draw(count: int, part: str) -> list[list[Any]]:
        rows = []
        for index in range(count):
            pixels = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            file = f"{part}_{index}.jpg"
            Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(images / file, quality=90)
            rows.append([file, index % classes, names[index % classes]])
        return rows

    split = {"train": draw(trains, "train"), "val": draw(classes, "val"), "test": draw(tests, "test")}
    (images.parent / "split_zhou_Caltech101.json").write_text(json.dumps(split), encoding="utf-8")
    return root


def save_weights(backbone: Backbone, folder: Path) -> Path:
    """Save the weights for all contestants, rounded to fp16, through which CoOp loads them."""
    path = folder / "weights.pt"
    torch.save({key: value.half() for key, value in backbone.model.state_dict().items()}, path)
    return path


def save_meta(backbone: Backbone, path: Path, text: int, visual: int, conditional: bool) -> Path:
    """Save a meta-checkpoint that fits; trainers take the regulator from it, while prompts start as in the others."""
    prompts = initial_prompts(backbone, text, visual)
    net = initial_meta_net(backbone) if conditional else {}
    meta = MetaCheckpoint(
        prompts=prompts,
        regulator=common.regulator_for(prompts),
        backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        extras={f"{META_NET}{name}": value for name, value in net.items()},
    )
    save_meta_checkpoint(path, meta)
    return path


# ---------------------------------------------------------------------------------------------------------------- run


class Bench:
    """What all groups share: weights, data, and where the checkouts are."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        original = load_backbone(args.model)
        self.weights = save_weights(original, folder)
        self.backbone = load_backbone(str(self.weights))  # rounded: its fingerprint is the one trainers will see
        self.size = original.image_size
        self.checkouts = {"coop": args.coop, "prometar": args.prometar}
        for name, path in self.checkouts.items():
            if path and not (path / "train.py").is_file():
                raise GramError(f"--{name} {path}: expected a checkout with a train.py, found none")
        if args.data:
            self.root = mirrored(args.data, folder)
        else:
            batch = max(GROUPS[name].batch for name in args.groups)
            self.root = made_up(args.classes, batch, args.test_images or 100, folder)

    def entries(self, group: Group) -> Iterator[Entry]:
        """Yield the entries whose code is available; print those that are left out."""
        for entry in group.entries:
            if not entry.checkout or self.checkouts[entry.checkout]:
                yield entry
            else:
                print(f"{entry.name}: left out, as there is no --{entry.checkout}")

    def spec(self, group: Group, entry: Entry, precision: str, folder: Path) -> dict[str, Any]:
        """Return the specification of a contestant's process."""
        args = self.args
        configs = Path()
        if entry.owner == "theirs":
            configs = self.checkouts[entry.checkout].resolve() / "configs"
        options: dict[str, Any] = {
            "INPUT.SIZE": f"({self.size}, {self.size})",
            "DATALOADER.NUM_WORKERS": 0,  # decoding and augmenting count where they are asked for
            "DATALOADER.TRAIN_X.BATCH_SIZE": group.batch,
            "DATALOADER.TEST.BATCH_SIZE": 100,
            "OPTIM.WARMUP_EPOCH": -1,  # steps that move the prompts
            "USE_CUDA": args.device == "cuda",
            f"TRAINER.{entry.node}.PREC": precision,
            **{f"TRAINER.{entry.node}.{key}": value for key, value in entry.options.items()},
        }
        if entry.trainer.endswith("GRAM"):
            text, visual = (2, 2) if entry.node == "JOINT" else (4, 0)
            path = self.folder / f"meta_{text}_{visual}_{group.conditional}.safetensors"
            if not path.is_file():
                save_meta(self.backbone, path, text, visual, group.conditional)
            options |= {"TRAINER.GRAM.CHECKPOINT": str(path), "TRAINER.GRAM.INIT": False}
        config = Path("trainers", entry.trainer, f"{entry.config}.yaml")
        dataset = Path("datasets", f"{args.dataset}.yaml")
        return {
            "owner": entry.owner,
            "trainer": entry.trainer,
            "checkout": str(configs.parent) if entry.owner == "theirs" else "",
            "config": str(configs / config) if entry.owner == "theirs" else entry.config,
            "dataset_config": str(configs / dataset) if entry.owner == "theirs" else args.dataset,
            "opts": [str(part) for pair in options.items() for part in pair],
            "root": str(self.root),
            "model": str(self.weights),
            "precision": precision,
            "device": args.device,
            "threads": args.threads,
            "test_images": args.test_images,
            "compared": 4,
            "learn2learn": str(args.learn2learn.resolve()) if args.learn2learn else "",
            "folder": str(folder),
        }

    def environment(self) -> dict[str, str]:
        """Return a contestant's environment variables: its threads, and which Dassl it uses."""
        environment = {**os.environ, "GRAM_DASSL": "builtin", "PYTHONWARNINGS": "ignore"}
        environment |= {"OMP_NUM_THREADS": str(self.args.threads)}
        paths = [str(Path(__file__).resolve().parents[2])]  # this project, installed or not; behind a checkout's folder
        if self.args.dassl:
            environment["GRAM_DASSL"] = "real"
            paths.append(str(self.args.dassl.resolve()))
        given = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join([*paths, given] if given else paths)
        return environment

    def run(self, name: str, precision: str) -> dict[str, Any]:
        """Run one group in one precision; return the answers of every contestant."""
        group = GROUPS[name]
        processes = []
        for index, entry in enumerate(self.entries(group)):
            folder = self.folder / f"{name}_{precision}_{index}"
            folder.mkdir()
            spec = self.spec(group, entry, precision, folder)
            processes.append(Process(entry, spec, self.environment()))
        try:
            return {"group": name, "precision": precision, **self._measure(group, processes)}
        finally:
            for process in processes:
                process.close()

    def _measure(self, group: Group, processes: list[Process]) -> dict[str, Any]:
        args = self.args
        for process in processes:
            process.send("build")  # side by side
        built = {process.entry.name: process.answer() for process in processes}
        failed = {name: answer["error"] for name, answer in built.items() if "error" in answer}
        running = [process for process in processes if process.entry.name not in failed]
        same_batches({p.entry.name: built[p.entry.name] for p in running})
        checks = {}
        for process in running:
            process.send("check")
            checks[process.entry.name] = process.answer()
        failed |= {name: answer["error"] for name, answer in checks.items() if "error" in answer}
        running = [process for process in running if process.entry.name not in failed]
        measures = [m for m in args.measures if group.towers or not m.startswith("tower")]
        rows: dict[str, dict[str, Any]] = {p.entry.name: {"built": built[p.entry.name]} for p in running}
        for number in range(args.rounds):
            for measure in measures:
                for process in running:
                    answer = process.ask("timed", measure=measure, count=args.steps)
                    rows[process.entry.name].setdefault("rounds", {}).setdefault(measure, []).append(answer)
            print(f"  round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
        for process in running:  # memory apart from time, and once everything is warm
            for measure in set(measures) & set(WITH_PEAK):
                peak = process.ask("peak", measure=measure, count=1)
                rows[process.entry.name].setdefault("peak_mb", {})[measure] = peak["peak_mb"]
        return {
            "batch": group.batch,
            "left_out": failed,
            "contestants": rows,
            "equal": compare([p.entry for p in running], checks),
        }


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
    for entry in entries[1:]:
        if not entry.compared:
            continue
        ours = checks[entry.name]
        with np.load(theirs["arrays"]) as a, np.load(ours["arrays"]) as b:
            row = {"loss": abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]), "logits": apart(b, a, "logits")}
            if entry.trainer == entries[0].trainer:  # a regulated gradient is another one by definition
                names = sorted(name for name in a.files if name.startswith("gradient:"))
                if names != sorted(name for name in b.files if name.startswith("gradient:")):
                    raise GramError(f"{entry.name}: learns {b.files}, expected {a.files} as in the checkout")
                row |= {name: apart(b, a, name) for name in names}
        result[entry.name] = row
    return result


def apart(ours: Any, theirs: Any, name: str) -> float:
    """Return the largest difference, relative to the largest entry."""
    return float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max())


# ------------------------------------------------------------------------------------------------------------- tables


def summary(table: Mapping[str, Any], steps: int, clock: str) -> dict[str, dict[str, Any]]:
    """Return, for every measure and contestant, median and range in ms (per step), and the first one's time over its own."""
    result: dict[str, dict[str, Any]] = {}
    names = list(table["contestants"])
    measures = table["contestants"][names[0]].get("rounds", {}) if names else {}
    for measure in measures:
        count = steps if measure in PER_STEP else 1
        rows = {name: table["contestants"][name]["rounds"][measure] for name in names}
        for name in names:
            ratios = [a[clock] / b[clock] for a, b in zip(rows[names[0]], rows[name], strict=True)]
            result.setdefault(measure, {})[name] = {
                "cpu_ms": spread([1000 * row["cpu"] / count for row in rows[name]]),
                "wall_ms": spread([1000 * row["wall"] / count for row in rows[name]]),
                "ratio": spread(ratios),
                "peak_mb": table["contestants"][name].get("peak_mb", {}).get(measure),
            }
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def print_group(table: Mapping[str, Any]) -> None:
    """Print the tables of a group as Markdown."""
    contestants = table["contestants"]
    print(f"\n### {table['group']}, {table['precision']}\n")
    for name, reason in table["left_out"].items():
        print(f"{name}: left out, it stopped with {reason}\n")
    if not contestants:
        return
    facts = next(iter(contestants.values()))["built"]
    print(
        f"{facts['classes']} classes, {facts['pixels'][0]} x {facts['pixels'][1]} pixels; a step on {facts['batch']} "
        f"images, a test pass over {facts['test_images']} in batches of 100; Dassl: {facts['engine']}.\n"
    )
    for measure, rows in table["summary"].items():
        out = []
        for name, row in rows.items():
            times = figure(row["cpu_ms"]), figure(row["wall_ms"])
            peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
            out.append([name, *times, figure(row["ratio"], 2), peak])
        header = [TITLES[measure], "processor time (ms)", "wall clock (ms)", "ratio", "peak memory (MB)"]
        common.print_table(header, out)
    for name, row in table["equal"].items():
        print(f"{name}, apart from the checkout: " + ", ".join(f"{k} {v:.1e}" for k, v in row.items()))
    for name, row in contestants.items():
        for patch in row["built"]["patches"]:
            print(f"{name}, patched: {patch}")


def figure(value: Mapping[str, float], digits: int = 0) -> str:
    """Median (least to most)."""
    median, least, most = (f"{value[key]:.{digits}f}" for key in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


# ------------------------------------------------------------------------------------------------------- command line


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return versions, commits and facts about the machine."""
    here = Path(__file__).resolve().parents[2]
    places = {"this project": here, "CoOp": args.coop, "ProMetaR": args.prometar, "Dassl": args.dassl}
    places["learn2learn"] = args.learn2learn
    return {
        "date": common.now(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commits": {name: commit(place) for name, place in places.items() if place},
        "processor": common.cpu_model(),
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg(),
        "gpu": torch.cuda.get_device_name(0) if args.device == "cuda" else None,
    }


def commit(folder: Path) -> str:
    """The commit of a checkout, with a star where files differ from it; "" without git."""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("*" if dirty.stdout.strip() else "")


def build_parser() -> argparse.ArgumentParser:
    start, _, rest = (__doc__ or "").partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="checkouts.py", description=start, epilog=rest, formatter_class=formatter)
    add = parser.add_argument
    add("--coop", type=Path, help="a checkout of KaiyangZhou/CoOp")
    add("--prometar", type=Path, help="a checkout of mlvlab/ProMetaR")
    add("--learn2learn", type=Path, help="sources of learn2learn, where it is not installed (ProMetaR)")
    add("--dassl", type=Path, help="a checkout of KaiyangZhou/Dassl.pytorch; default: the built-in engine for all")
    add("--data", type=Path, help="the datasets' root; default: made-up images and class names")
    add("--dataset", default="caltech101", help="its config file's name (%(default)s)")
    add("--classes", type=int, default=100, help="of made-up data (%(default)s)")
    add(
        "--model",
        default="gram-small",
        help="gram-small, random-ViT-B/16 (shapes alone), ViT-B/16, a weights file (%(default)s)",
    )
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
    """All groups in all precisions; the JSON file is written after each, so that an interruption loses nothing."""
    report: dict[str, Any] = {"facts": facts(args), "settings": common.settings(args), "tables": []}
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
                report["facts"]["load_average_after"] = os.getloadavg()
                common.write_report(args.output, report)


if __name__ == "__main__":
    sys.exit(main())
