"""CoOp's train.py, as a function: flags, order of merging, log lines and folders are CoOp's.

    python train.py --root DATA --seed 1 --trainer CoOpGRAM \\
        --dataset-config-file configs/datasets/emoji_animals.yaml \\
        --config-file configs/trainers/CoOpGRAM/gram_small_c4_ep10_batch32_ctxv1.yaml \\
        --output-dir output/animals/seed1 DATASET.NUM_SHOTS 16 TRAINER.GRAM.CHECKPOINT output/meta/best.safetensors

What differs: `--seed 0` counts; an unknown key, trainer, dataset or config file is one sentence with the nearest name;
a folder that holds another run is refused; a finished run is not repeated and an unfinished one goes on, in the same
log.txt. Can be called many times in one process. Light at import: torch comes with the first run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, Any

from gram_meta.config import as_dict, find_config, merge_file, merge_opts, nearest
from gram_meta.errors import GramError
from gram_meta.files import read_json, sha256_file, write_json

RUN_FILE = "run.json"  # which run an output folder belongs to

# Options that do not make another run of it
INCIDENTAL = {
    "OUTPUT_DIR",
    "RESUME",
    "VERBOSE",
    "DATASET.ROOT",
    "DATALOADER.NUM_WORKERS",
    "TRAIN.PRINT_FREQ",
    "TRAIN.CHECKPOINT_FREQ",
    "TRAINER.GRAM.META",
}


# ------------------------------------------------------------------------------------------------------ command line


def build_parser(prog: str = "train.py") -> argparse.ArgumentParser:
    """A parser with CoOp's flags."""
    parser = argparse.ArgumentParser(prog=prog, description="Train or evaluate a trainer on a dataset.")
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """CoOp's flags, all of them, with CoOp's defaults."""
    add = parser.add_argument
    add("--root", default="", help="folder that holds the datasets' folders")
    add("--output-dir", default="", help="where log.txt, checkpoints and results.json go")
    add("--resume", default="", help="folder of an earlier run from which training goes on")
    add("--seed", type=int, default=-1, help="0 or more: fixed; the default is a different one every time")
    add("--source-domains", nargs="+", help="source domains for DA/DG")
    add("--target-domains", nargs="+", help="target domains for DA/DG")
    add("--transforms", nargs="+", help="data augmentation methods")
    add("--config-file", default="", help="the trainer's YAML file; found in the package when it is not here")
    add("--dataset-config-file", default="", help="the dataset's YAML file; found in the package likewise")
    add("--trainer", default="", help="name of the trainer: ZeroshotCLIP, CoOp, CoOpGRAM, ...")
    add("--backbone", default="", help="name of the backbone")
    add("--head", default="", help="name of the head")
    add(
        "--eval-only",
        action="store_true",
        help="evaluate only; without --model-dir, the prompts to start from",
    )
    add("--model-dir", default="", help="run whose prompts are evaluated")
    add(
        "--load-epoch",
        type=int,
        help="epoch of these prompts; default: the best by validation, else the last",
    )
    add("--no-train", action="store_true", help="build everything, do not train")
    add("opts", default=None, nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the configuration")


def main(argv: Sequence[str] | None = None) -> int:
    """`train.py`: the exit status; bad input is one line on stderr and status 2."""
    try:
        run(build_parser().parse_args(argv))
    except GramError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------------ configuration


def setup_cfg(args: argparse.Namespace) -> Any:
    """Defaults, dataset file, trainer file, flags, KEY VALUE pairs: merged in this order, then frozen."""
    from gram_meta import engine
    from gram_meta.engine.options import extend_cfg

    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    if args.dataset_config_file:
        merge_file(cfg, find_config(args.dataset_config_file, "datasets"))
    if args.config_file:
        merge_file(
            cfg, find_config(args.config_file, f"trainers/{args.trainer}" if args.trainer else "trainers")
        )
    reset_cfg(cfg, args)
    merge_opts(cfg, args.opts or [])
    cfg.freeze()
    return cfg


def reset_cfg(cfg: Any, args: argparse.Namespace) -> None:
    """Flags that were given replace what the files say."""
    targets = {
        "root": (cfg.DATASET, "ROOT"),
        "output_dir": (cfg, "OUTPUT_DIR"),
        "resume": (cfg, "RESUME"),
        "source_domains": (cfg.DATASET, "SOURCE_DOMAINS"),
        "target_domains": (cfg.DATASET, "TARGET_DOMAINS"),
        "transforms": (cfg.INPUT, "TRANSFORMS"),
        "trainer": (cfg.TRAINER, "NAME"),
        "backbone": (cfg.MODEL.BACKBONE, "NAME"),
        "head": (cfg.MODEL.HEAD, "NAME"),
    }
    for flag, (node, key) in targets.items():
        if value := getattr(args, flag):
            node[key] = value
    if args.seed >= 0:  # CoOp asks `if args.seed`, which loses seed 0
        cfg.SEED = args.seed


# --------------------------------------------------------------------------------------------------------------- run


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the flags say; the contents of results.json, or {} for a run that evaluates nothing.

    Raises:
        GramError: bad input, or an output folder that belongs to another run.
    """
    if args.trainer:
        _check_names(trainer=args.trainer)  # before its config file is looked for
    cfg = setup_cfg(args)
    _check_names(trainer=cfg.TRAINER.NAME, dataset=cfg.DATASET.NAME)
    folder = OutputFolder(cfg, args)
    if folder.finished:
        print(f"This run is finished: {folder.results_path}; remove the folder to run it again")
        return folder.results()
    with folder.log() as log:
        _start(cfg, args)
        from gram_meta.engine import build_trainer

        trainer = build_trainer(cfg)
        if args.eval_only:
            trainer.load_model(args.model_dir, epoch=args.load_epoch)
        elif hasattr(trainer, "check_training"):
            trainer.check_training()
        if args.no_train:
            return {}
        folder.claim()
        log.keep()
        if args.eval_only:
            trainer.test()
        else:
            trainer.train()
        folder.finish()
    return folder.results()


def train(argv: Sequence[str], quiet: bool = False) -> dict[str, Any]:
    """The same from a list of arguments, for use in a program. `quiet`: print to log.txt alone.

    train(["--trainer", "CoOp", "--root", "data", ...])["metrics"]["accuracy"]
    """
    args = build_parser().parse_args(list(argv))
    if not quiet:
        return run(args)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        return run(args)


def _start(cfg: Any, args: argparse.Namespace) -> None:
    """Seed, and say what is run: arguments, configuration, environment."""
    import torch

    from gram_meta import engine

    if cfg.SEED >= 0:
        print(f"Setting fixed seed: {cfg.SEED}")
        engine.set_random_seed(cfg.SEED)
    if torch.cuda.is_available() and cfg.USE_CUDA:
        torch.backends.cudnn.benchmark = True
    print("***************\n** Arguments **\n***************")
    for key in sorted(vars(build_parser().parse_args([]))):
        print(f"{key}: {getattr(args, key)}")
    print("************\n** Config **\n************")
    print(cfg)
    print(f"** System info **\n{engine.collect_env_info()}\nDassl: {engine.room()}\n")


def _check_names(**names: str) -> None:
    """Refuse an unknown trainer or dataset, naming the nearest."""
    import gram_meta.plugin  # noqa: F401, fills the registries
    from gram_meta.engine import DATASET_REGISTRY, TRAINER_REGISTRY

    registries = {"trainer": ("--trainer", TRAINER_REGISTRY), "dataset": ("DATASET.NAME", DATASET_REGISTRY)}
    for what, name in names.items():
        key, registry = registries[what]
        known = registry.registered_names()
        if name not in known:
            guess = nearest(name, known)
            hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(sorted(known))}"
            raise GramError(f"{key} is {name!r}, which is no known {what}; {hint}")


# ------------------------------------------------------------------------------------------------------ output folder


class OutputFolder:
    """One folder, one run: refuses a folder of another run, knows whether this one is finished."""

    def __init__(self, cfg: Any, args: argparse.Namespace) -> None:
        self.path = Path(cfg.OUTPUT_DIR)
        self.results_path = self.path / "results.json"
        self.run_path = self.path / RUN_FILE
        self.identity = _identity(cfg, args)
        self.finished = False
        self.goes_on = False  # an unfinished run of the same identity is here
        if args.no_train:
            return
        if self.run_path.is_file():
            stored = read_json(self.run_path)
            self._compare(stored.get("run", {}))
            self.finished = bool(stored.get("finished"))
            self.goes_on = not self.finished
        elif (self.path / "log.txt").is_file():
            raise GramError(
                f"{self.path}: expected an empty folder or this same run, found the log.txt of a run without "
                f"{RUN_FILE}; choose another --output-dir"
            )

    def _compare(self, stored: dict[str, Any]) -> None:
        unset = _defaults() if set(self.identity) - set(stored) else {}
        for key in sorted(set(stored) | set(self.identity)):
            there, here = stored.get(key, unset.get(key)), self.identity.get(key)
            if there != here and not (key == "--model-dir" and _same_model(there, here)):
                raise GramError(
                    f"{self.path}: holds another run ({key} is {there!r} there and {here!r} here); "
                    "choose another --output-dir or remove the folder"
                )

    def claim(self) -> None:
        """From now on the folder is this run's."""
        write_json(self.run_path, {"finished": False, "run": self.identity})

    def finish(self) -> None:
        write_json(self.run_path, {"finished": True, "run": self.identity})

    def results(self) -> dict[str, Any]:
        return read_json(self.results_path) if self.results_path.is_file() else {}

    @contextmanager
    def log(self) -> Iterator[Tee]:
        """What is printed goes to log.txt too; a run that goes on adds to its log."""
        tee = Tee(sys.stdout, self.path / "log.txt", "a" if self.goes_on else "w")
        try:
            with redirect_stdout(tee):  # type: ignore[type-var]
                yield tee
        finally:
            tee.close()


class Tee:
    """Writes to the console and, once `keep` was called, to a file, beginning with what came before.

    A run that cannot be built (a typing error in an option) so leaves no folder behind.
    """

    def __init__(self, console: IO[str], path: Path, mode: str) -> None:
        self.console, self.path, self.mode = console, path, mode
        self.file: IO[str] | None = None
        self.before: list[str] = []

    def keep(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, self.mode, encoding="utf-8", buffering=1)  # noqa: SIM115, closed by close()
        self.file.write("".join(self.before))
        self.before.clear()

    def write(self, text: str) -> int:
        self.console.write(text)
        if self.file is None:
            self.before.append(text)
        else:
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        self.console.flush()
        if self.file is not None:
            self.file.flush()

    def isatty(self) -> bool:
        return self.console.isatty()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _identity(cfg: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What makes a run this run: every option that matters, what is evaluated, and the contents of the files it starts from."""
    identity = {key: value for key, value in _flat(as_dict(cfg)) if key not in INCIDENTAL}
    identity |= {
        "--eval-only": args.eval_only,
        "--model-dir": args.model_dir,
        "--load-epoch": args.load_epoch,
    }
    for key in ("TRAINER.GRAM.CHECKPOINT", "MODEL.INIT_WEIGHTS"):
        path = identity.get(key)
        if path and os.path.isfile(path):
            identity[key] = f"SHA-256 {sha256_file(path)}"  # a file may move, or change
    if args.model_dir:  # what was trained anew there has to be evaluated anew
        files = sorted(Path(args.model_dir).glob("*/model*.pth.tar*"))
        hashes = (f"{file.name} {sha256_file(file)}" for file in files)
        identity["--model-dir"] = [os.path.abspath(args.model_dir), *hashes]
    return identity


def _same_model(there: Any, here: Any) -> bool:
    """Two entries of --model-dir, folder and contents: the contents decide, as a folder may be named anew or move."""
    if not (isinstance(there, list) and isinstance(here, list)):
        return False
    if len(there) > 1 or len(here) > 1:
        return there[1:] == here[1:]
    return os.path.realpath(there[0]) == os.path.realpath(here[0])


def _defaults() -> dict[str, Any]:
    """Every option where nothing sets it: what an option that is newer than a run was in that run."""
    from gram_meta import engine
    from gram_meta.engine.options import extend_cfg

    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    return dict(_flat(as_dict(cfg)))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
