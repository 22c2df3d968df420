"""The runs of a bench: protocols, trainers, datasets and seeds as commands of `gram`, in CoOp's folders."""

import argparse
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

import yaml

from gram_meta.clustering.hierarchy import TOPICS
from gram_meta.config import ELEVEN, INCIDENTAL, SHIFTED, find_config, flatten, load_meta_config, nearest
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import read_json
from gram_meta.method import meta_files
from gram_meta.runs.schemas import MetaRunFile

PROTOCOLS = ("base2new", "xd", "dg")
BACKBONES = ("gram_small", "vit_b16", "vit_b32", "vit_l14")  # prefixes of config files

ZERO_SHOT = "ZeroshotCLIP"  # trains nothing and draws nothing: one evaluation counts for all seeds
CONFIGS = {ZERO_SHOT: "{bb}"}
CONFIGS |= dict.fromkeys(("CoOp", "CoOpGRAM", "VPT", "VPTGRAM"), "{bb}_c4_ep10_batch32_ctxv1")
CONFIGS |= dict.fromkeys(("CoCoOp", "CoCoOpGRAM"), "{bb}_c4_ep10_batch1_ctxv1")
CONFIGS |= dict.fromkeys(("JointPrompt", "UniGRAM"), "{bb}_c2+2_ep10_batch32_ctxv1")

SOURCE = ELEVEN[0]
DATASETS = {"base2new": ELEVEN, "xd": ELEVEN[1:], "dg": SHIFTED}


@dataclass(frozen=True)
class BenchSettings:
    """The options of a bench. `datasets`: per protocol, those trained on in base2new, the targets in xd and dg."""

    protocols: tuple[str, ...]
    trainers: tuple[str, ...]  # TRAINER or TRAINER:CFG
    backbone: str
    root: str
    output: Path
    datasets: dict[str, tuple[str, ...]]
    source: str = SOURCE
    seeds: tuple[int, ...] = (1, 2, 3)
    shots: int = 16
    meta_dir: Path = Path("output/meta")
    store: str = ""
    hierarchy: str = ""
    labelled_store: str = ""
    labelled_hierarchy: str = ""
    opts: tuple[str, ...] = ()  # KEY VALUE for `gram train`
    meta_opts: tuple[str, ...] = ()  # KEY VALUE for `gram pretrain`


@dataclass(frozen=True)
class Entry:
    """A trainer with its config file."""

    trainer: str
    config: str  # bare name, or the path of a YAML file
    plain: bool  # the trainer's default config
    meta: str  # name of the meta config, or "" for a trainer without one
    checkpoint: str  # that a GRAM trainer starts from

    @property
    def name(self) -> str:
        """Return the config's name in folders."""
        return Path(self.config).stem if self.config.endswith((".yaml", ".yml")) else self.config

    @property
    def file(self) -> str:
        return self.config if self.name != self.config else f"configs/trainers/{self.trainer}/{self.config}.yaml"

    @property
    def label(self) -> str:
        return self.trainer if self.plain else f"{self.trainer}:{self.name}"


@dataclass(frozen=True)
class BenchRun:
    """One command, the folder that it fills, and the folders that it needs."""

    argv: tuple[str, ...]  # of `gram`; or "python", "-c", code
    folder: Path
    title: str
    pace: tuple[str, ...]  # runs of equal pace take about equally long; fewer equal parts: a worse guess
    after: tuple[Path, ...] = ()
    leaves: tuple[Path, ...] = ()  # the files that a command of Python has written when it has finished

    @property
    def line(self) -> str:
        """Return the command as a user types it."""
        return shlex.join(self.command if self.argv[0] == "python" else ("gram", *self.command))

    @property
    def command(self) -> tuple[str, ...]:
        """Return `argv`, with --resume for a meta-training that was begun."""
        if self.argv[0] == "pretrain" and (self.folder / meta_files.FACTS).exists():
            return (self.argv[0], "--resume", *self.argv[1:])
        return self.argv


def common_settings(args: argparse.Namespace, output: Path, **defaults: Any) -> BenchSettings:
    """Return the settings of `gram bench`: its parsed options, and `defaults` for those that were not given."""
    protocols = tuple(dict.fromkeys(args.protocol))
    if args.datasets and len(protocols) > 1:
        raise GramError(f"--datasets: expected one protocol beside it, found {', '.join(protocols)}")
    if bad := [seed for seed in args.seeds if not seed.isdecimal()]:
        raise GramError(f"--seeds: expected numbers from 0 on, found {bad[0]!r}")
    given = {field.name: getattr(args, field.name, None) for field in fields(BenchSettings)}
    chosen = defaults | {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x}
    datasets = {protocols[0]: args.datasets} if args.datasets else defaults["datasets"]
    output = Path(args.output or output)
    chosen |= {
        "protocols": protocols,
        "datasets": {protocol: tuple(dict.fromkeys(datasets[protocol])) for protocol in protocols},
        "output": output,
        "meta_dir": Path(args.meta_dir or output / "meta"),
        "seeds": tuple(map(int, args.seeds)),
        "shots": args.shots,
    }
    return BenchSettings(**chosen)


def bench_runs(settings: BenchSettings) -> list[BenchRun]:
    """Return every run in order: meta-trainings, then seed by seed, so that whole seeds are finished first."""
    check(settings)
    entries = [read_entry(text, settings) for text in dict.fromkeys(settings.trainers)]
    _check_names(entries)
    jobs = [*meta_jobs(entries, settings)]
    for seed in settings.seeds:
        for protocol in settings.protocols:
            runs_of = _base2new if protocol == "base2new" else _transfer
            jobs += runs_of(entries, settings, seed, settings.datasets[protocol])
    unique: dict[Path, BenchRun] = {}
    for job in jobs:
        unique.setdefault(job.folder, job)  # xd and dg share their training
    return list(unique.values())


def only(jobs: Sequence[BenchRun], folders: Sequence[str]) -> list[BenchRun]:
    """Return the runs that fill these folders, in order."""
    wanted = {Path(folder) for folder in folders}
    if unknown := wanted - {job.folder for job in jobs}:
        raise GramError(f"--only {min(unknown)}: expected the folder of a run of this bench, found another")
    return [job for job in jobs if job.folder in wanted]


def check(settings: BenchSettings) -> None:
    """Refuse settings that are wrong before a config file is read."""
    if len(set(settings.seeds)) < len(settings.seeds) or min(settings.seeds, default=-1) < 0:
        raise GramError(f"--seeds: expected different numbers from 0 on, found {' '.join(map(str, settings.seeds))}")
    if settings.shots < 1:
        raise GramError(f"--shots: expected a number from 1 on, found {settings.shots}")
    used = {name for protocol in settings.protocols for name in settings.datasets[protocol]}
    if set(settings.protocols) - {"base2new"}:
        used.add(settings.source)
    for name in sorted(used):
        find_config(name, "datasets")
    for one, other in (("store", "hierarchy"), ("labelled_store", "labelled_hierarchy")):
        if bool(getattr(settings, one)) != bool(getattr(settings, other)):
            raise GramError(f"--{one} and --{other} belong together: expected both or neither".replace("_", "-"))


def read_entry(text: str, settings: BenchSettings) -> Entry:
    """Parse TRAINER or TRAINER:CFG."""
    trainer, _, config = text.partition(":")
    plain = CONFIGS.get(trainer, "").format(bb=settings.backbone)
    if not plain and not config:
        guess = nearest(trainer, CONFIGS)
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(CONFIGS)}; or give TRAINER:CFG"
        raise GramError(f"--trainers {text}: expected a trainer with a default config, found none; {hint}")
    config = config or plain
    path = find_config(config, f"trainers/{trainer}")
    meta = checkpoint = ""
    if trainer.endswith("GRAM"):
        gram = _gram_options(path, settings.opts)
        meta, checkpoint = gram.get("META") or "", gram.get("CHECKPOINT") or ""
        if checkpoint:  # named by the user
            meta = ""
        elif meta:
            checkpoint = str(settings.meta_dir / meta / meta_files.BEST)
        else:
            raise GramError(
                f"{path}: expected the name of a meta config as TRAINER.GRAM.META, found none; "
                "give it, or TRAINER.GRAM.CHECKPOINT FILE, at the end of the command"
            )
    return Entry(trainer, config, config == plain, meta, checkpoint)


def _check_names(entries: Iterable[Entry]) -> None:
    """Refuse two configs of a trainer with one name, which would share folders."""
    first: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        other = first.setdefault((entry.trainer, entry.name), entry)
        one, two = (find_config(each.file, f"trainers/{entry.trainer}").resolve() for each in (other, entry))
        if one != two:
            found = f"found {entry.trainer}:{other.config} and {entry.trainer}:{entry.config}"
            raise GramError(f"--trainers: expected configs of different names, which their folders have, {found}")


def _gram_options(path: Path, opts: Sequence[str]) -> dict[str, str]:
    """Return TRAINER.GRAM of a config file and of KEY VALUE pairs; `runner.look` checks the keys."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GramError(f"{path}: expected YAML, found {in_one_line(error)}") from None
    gram = dict((tree.get("TRAINER") or {}).get("GRAM") or {})
    for key, value in zip(opts[::2], opts[1::2], strict=False):
        if key.startswith("TRAINER.GRAM."):
            gram[key.removeprefix("TRAINER.GRAM.")] = value
    return gram


# ------------------------------------------------------------------------------------------------------ meta-training


def meta_jobs(entries: Iterable[Entry], settings: BenchSettings) -> Iterator[BenchRun]:
    """Yield the meta-trainings that the trainers need; raise `GramError` for one that lacks a store to make it from."""
    for name, entry in {entry.meta: entry for entry in entries if entry.meta}.items():
        config = _meta_config(name, settings.meta_opts)
        kind = "labelled_" if config.CHC.get("LABELLED", False) else ""
        store, hierarchy = getattr(settings, f"{kind}store"), getattr(settings, f"{kind}hierarchy")
        flags = [f"--{kind}{what}".replace("_", "-") for what in ("store", "hierarchy")]
        given = (store or f"{kind}store".upper(), hierarchy or f"{kind}hierarchy".upper())
        folder = settings.meta_dir / name
        if hierarchy:
            check_hierarchy(Path(hierarchy), config, _asked(settings.meta_opts))
        job = BenchRun(
            argv=(
                *("pretrain", "--store", given[0], "--hierarchy", given[1]),
                *("--config", f"configs/gram_meta/{name}.yaml", "-o", str(folder), *settings.meta_opts),
            ),
            folder=folder,
            title=f"meta-training {name}",
            pace=("pretrain", name),
            after=(Path(store), Path(hierarchy)) if store else (),
        )
        state = meta_state(folder, settings.meta_opts)
        if store or state == "finished":
            yield job
        else:
            begun = "a meta-training that is not finished; go on with", "no such file; make it with"
            raise GramError(
                f"{folder / meta_files.BEST}: expected the meta-checkpoint for {entry.label}, found "
                f"{begun[state == 'new']} `{job.line}`, or give {' and '.join(flags)}"
            )


class _Topics(TypedDict, total=False):
    """What is read here from topics.json."""

    config: dict[str, Any]


def check_hierarchy(folder: Path, config: Any, keys: Iterable[str]) -> None:
    """Refuse a hierarchy that was made with another value of one of these settings than `config` has.

    No hierarchy in the folder yet, or one that does not record a setting, is accepted.
    """
    if not (folder / TOPICS).is_file():
        return
    made, wanted = flatten(read_json(folder / TOPICS, _Topics).get("config", {})), flatten(config)
    for key in keys:
        if made.get(key, wanted[key]) != wanted[key]:
            found = f"holds a hierarchy made with {key} {made[key]!r}, expected {wanted[key]!r}"
            raise GramError(f"{folder}: {found}; choose another folder, or remove this one")


def _asked(opts: Sequence[str]) -> list[str]:
    """Return the settings of the clustering among KEY VALUE pairs."""
    return [key for key in opts[::2] if key.startswith("CHC.")]


def meta_state(folder: Path, opts: Sequence[str] = ()) -> str:
    """Return `finished`, `unfinished` or `new`. A checkpoint without the files of its training (a copy) is finished.

    A folder trained with other settings than those of its meta config, which has its name, and `opts` is a `GramError`.
    Settings of the clustering count if `opts` has them: any hierarchy may be trained on.
    """
    if not (folder / meta_files.FACTS).is_file():
        return "finished" if (folder / meta_files.BEST).is_file() else "new"
    config = read_json(folder / meta_files.FACTS, MetaRunFile).get("config", {})
    stored = flatten(config)
    asked = _asked(opts)
    for key, value in flatten(_meta_config(folder.name, tuple(opts))).items():
        counts = key in asked if key.startswith("CHC.") else key.partition(".")[0] not in INCIDENTAL
        if key in stored and stored[key] != value and counts:
            raise GramError(
                f"{folder}: holds a meta-training with {key} {stored[key]!r}, expected {value!r}; "
                "choose another --meta-dir or remove the folder"
            )
    return "finished" if meta_files.is_finished(folder, config) else "unfinished"


@lru_cache(maxsize=64)
def _meta_config(name: str, opts: tuple[str, ...]) -> Any:
    return load_meta_config([name] if name else [], opts)


# ----------------------------------------------------------------------------------------------------------- protocols


def _base2new(
    entries: Sequence[Entry], settings: BenchSettings, seed: int, datasets: Sequence[str]
) -> Iterator[BenchRun]:
    """Train on the base classes of each dataset, with a test on them at the end, then test on the new ones."""
    shots = ("DATASET.NUM_SHOTS", str(settings.shots), "DATASET.SUBSAMPLE_CLASSES")
    for dataset in datasets:
        for entry in _of_seed(entries, settings, seed):
            tail = f"{dataset}/shots_{settings.shots}/{entry.trainer}/{entry.name}/seed{seed}"
            trained = settings.output / "base2new" / "train_base" / tail
            tested = settings.output / "base2new" / "test_new" / tail
            yield _run_of(entry, settings, seed, dataset, trained, (*shots, "base"), "base")
            yield _run_of(entry, settings, seed, dataset, tested, (*shots, "new"), "new", trained)


def _transfer(
    entries: Sequence[Entry], settings: BenchSettings, seed: int, targets: Sequence[str]
) -> Iterator[BenchRun]:
    """Train on all classes of the source, then test on every target: cross-dataset, and domain generalisation."""
    entries = _of_seed(entries, settings, seed)
    names = {entry: f"{entry.name}_{settings.shots}shots" for entry in entries}
    source, shots = settings.source, ("DATASET.NUM_SHOTS", str(settings.shots))
    trained = {e: settings.output / source / e.trainer / name / f"seed{seed}" for e, name in names.items()}
    for entry, folder in trained.items():
        yield _run_of(entry, settings, seed, source, folder, shots, "source")
    for target in targets:
        for entry, folder in trained.items():
            tested = settings.output / "evaluation" / entry.trainer / names[entry] / target / f"seed{seed}"
            yield _run_of(entry, settings, seed, target, tested, (), "target", folder)


def _of_seed(entries: Sequence[Entry], settings: BenchSettings, seed: int) -> list[Entry]:
    """Return the trainers that run with this seed: zero-shot runs with the first one only."""
    return [entry for entry in entries if entry.trainer != ZERO_SHOT or seed == settings.seeds[0]]


def _run_of(
    entry: Entry,
    settings: BenchSettings,
    seed: int,
    dataset: str,
    folder: Path,
    opts: Sequence[str],
    what: str,
    trained: Path | None = None,
) -> BenchRun:
    """Return a training, which tests at its end; with `trained`, a test of the model in that folder.

    A zero-shot trainer has tests alone, which need no model.
    """
    zero_shot = entry.trainer == ZERO_SHOT
    needed = (trained,) if trained and not zero_shot else ()
    flags = [*["--eval-only"] * bool(trained or zero_shot), *(["--model-dir", str(trained)] if needed else [])]
    gram = ("TRAINER.GRAM.CHECKPOINT", entry.checkpoint) if entry.meta else ()
    return BenchRun(
        argv=(
            *("train", "--root", settings.root, "--seed", str(seed), "--trainer", entry.trainer),
            *("--dataset-config-file", f"configs/datasets/{dataset}.yaml", "--config-file", entry.file),
            *("--output-dir", str(folder), *flags, *opts, *gram, *settings.opts),
        ),
        folder=folder,
        title=f"{entry.label}, {dataset}, seed {seed}, {what}",
        pace=("test" if trained else "train", entry.label, dataset),
        after=(*needed, *((settings.meta_dir / entry.meta,) if entry.meta else ()), Path(settings.root)),
    )
