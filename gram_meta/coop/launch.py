"""CoOp's train.py, as a function: flags, order of merging, log lines and folders are CoOp's.

Differences: `--seed 0` fixes the seed; an unknown key, trainer, dataset or config file is an error of one sentence with
the nearest name; a folder that holds another run is refused; a finished run is not repeated, and an unfinished one is
resumed in the same log.txt. `run` may be called many times in one process. The first call imports torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from gram_meta.config import check_known, find_config, merge_file, merge_opts
from gram_meta.errors import GramError, exit_status
from gram_meta.files import expand_home
from gram_meta.locks import only_writer, tidy
from gram_meta.runs.folder import open_folder
from gram_meta.runs.layout import checkpoint_to_resume, choose_checkpoint, options_of

__all__ = ["add_flags", "build_parser", "find_config", "main", "run", "setup_cfg", "train"]


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with CoOp's flags."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train or evaluate a trainer on a dataset.")
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add CoOp's flags, all of them, with CoOp's defaults."""
    add = parser.add_argument
    add("--root", default="", help="folder that holds the datasets' folders")
    add("--output-dir", default="", help="where log.txt, checkpoints and results.json go")
    add("--resume", default="", help="folder of an earlier run to resume")
    add("--seed", type=int, default=-1, help="0 or more: fixed; the default is a different one every time")
    add("--source-domains", nargs="+", help="source domains for DA/DG")
    add("--target-domains", nargs="+", help="target domains for DA/DG")
    add("--transforms", nargs="+", help="data augmentation methods")
    add("--config-file", default="", help="the trainer's YAML file; found in the package when it is not here")
    add("--dataset-config-file", default="", help="the dataset's YAML file; found in the package likewise")
    add("--trainer", default="", help="name of the trainer: ZeroshotCLIP, CoOp, CoOpGRAM, ...")
    add("--backbone", default="", help="name of the backbone")
    add("--head", default="", help="name of the head")
    add("--eval-only", action="store_true", help="evaluate only; without --model-dir, the prompts to start from")
    add("--model-dir", default="", help="run whose prompts are evaluated")
    add(
        "--load-epoch",
        type=int,
        help="epoch of these prompts; default: the last, or the best where the run was to end with its best",
    )
    add("--no-train", action="store_true", help="build everything, do not train")
    add("opts", default=None, nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the configuration")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `train.py` and return the exit status; bad input is one line on stderr and status 2."""
    args = build_parser().parse_args(expand_home(list(sys.argv[1:] if argv is None else argv)))

    def start() -> int:
        run(args)
        return 0

    return exit_status("train.py", start)


def setup_cfg(args: argparse.Namespace) -> Any:
    """Merge defaults, dataset file, trainer file, flags and KEY VALUE pairs in this order; return the frozen tree."""
    from gram_meta import engine
    from gram_meta.engine.options import extend_cfg

    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    if args.dataset_config_file:
        merge_file(cfg, find_config(args.dataset_config_file, "datasets"))
    if args.config_file:
        merge_file(cfg, find_config(args.config_file, f"trainers/{args.trainer}" if args.trainer else "trainers"))
    reset_cfg(cfg, args)
    merge_opts(cfg, args.opts or [])
    cfg.freeze()
    return cfg


def reset_cfg(cfg: Any, args: argparse.Namespace) -> None:
    """Let the flags that were given replace the files' values."""
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate as the flags say; return the contents of results.json, {} for a run that evaluates nothing."""
    _check_flags(args)
    if args.trainer:
        _check_names(trainer=args.trainer)  # before its config file is looked for
    cfg = setup_cfg(args)
    _check_names(trainer=cfg.TRAINER.NAME, dataset=cfg.DATASET.NAME)
    for run_folder in filter(None, (args.model_dir, cfg.RESUME)):
        _check_backbone(cfg.MODEL.BACKBONE.NAME, run_folder)
    if args.no_train or open_folder(cfg, args).finished:
        tidy(cfg.OUTPUT_DIR)
        return _run(cfg, args)
    with only_writer(cfg.OUTPUT_DIR):
        return _run(cfg, args)


def _run(cfg: Any, args: argparse.Namespace) -> dict[str, Any]:
    folder = open_folder(cfg, args)
    if folder.finished:
        print(folder.already())
        return folder.results()
    from gram_meta.engine import build_trainer
    from gram_meta.random_state import kept_determinism

    with folder.log() as log, kept_determinism():
        _start(cfg, args)
        _check_checkpoint(cfg, args)
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
    """Call `run` with a list of arguments, for use in a program. `quiet`: print to log.txt alone.

    train(["--trainer", "CoOp", "--root", "data", ...])["metrics"]["accuracy"]
    """
    args = build_parser().parse_args(expand_home(list(argv)))
    if not quiet:
        return run(args)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        return run(args)


def _start(cfg: Any, args: argparse.Namespace) -> None:
    """Seed, and print arguments, configuration and environment as CoOp does."""
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
    print(f"** System info **\n{engine.collect_env_info()}\nDassl: {engine.backend()}\n")


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect."""
    if args.model_dir and not args.eval_only:
        raise GramError(
            "--model-dir names the run whose prompts are evaluated; expected --eval-only with it, or, to start a "
            "training from them, the checkpoint as MODEL.INIT_WEIGHTS"
        )
    if args.load_epoch is not None and not args.model_dir:
        raise GramError(f"--load-epoch {args.load_epoch}: expected --model-dir with it, found none")


def _check_backbone(name: str, folder: str) -> None:
    """Refuse another CLIP than that of the prompts in a run's folder, before it is loaded or downloaded."""
    if name and (made_with := options_of(Path(folder)).get("MODEL.BACKBONE.NAME")):
        from gram_meta.backbone.clip import check_name

        check_name(folder, made_with, name, {})


def _check_checkpoint(cfg: Any, args: argparse.Namespace) -> None:
    """Look for the prompts to evaluate, or to go on from, before data and CLIP are loaded."""
    from gram_meta.engine import TRAINER_REGISTRY

    if hasattr(TRAINER_REGISTRY.get(cfg.TRAINER.NAME), "check_loaded"):  # this project's, and it learns prompts
        if args.model_dir:
            choose_checkpoint(args.model_dir, args.load_epoch)
        if cfg.RESUME:
            checkpoint_to_resume(cfg.RESUME)


def _check_names(**names: str) -> None:
    """Refuse an unknown trainer or dataset, naming the nearest."""
    from gram_meta.coop.register import install
    from gram_meta.engine import DATASET_REGISTRY, TRAINER_REGISTRY

    install()
    registries = {"trainer": ("--trainer", TRAINER_REGISTRY), "dataset": ("DATASET.NAME", DATASET_REGISTRY)}
    for what, name in names.items():
        key, registry = registries[what]
        check_known(key, what, name, registry.registered_names())
        if hasattr(found := registry.get(name), "checkout_class"):
            found.checkout_class()  # refuses a trainer of a checkout outside of it
