"""`gram bench`: many trainers, datasets and seeds over a protocol."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gram_meta.config import COMMAND_BOUNDS, check_bounds
from gram_meta.errors import GramError

if TYPE_CHECKING:
    from gram_meta.bench.matrix import BenchSettings

HELP = """Run many trainers on many datasets and seeds over the paper's protocols, by several processes.

  base2new  train on the base classes of each dataset, test on the base and on the new ones
  xd        train on the source (imagenet), test on the ten other datasets
  dg        train on the source (imagenet), test on its four variants; shares the trainings of xd

Finished runs are skipped, unfinished ones resume, a run that fails is reported and the others continue: give the same
command again after an interruption. GRAM trainers start from META_DIR/<META>/best.safetensors, where META is named in
their config file; with --store and --hierarchy it is meta-trained first if it is not there. The folders are CoOp's.

  gram bench --protocol base2new --trainers CoOp CoOpGRAM UniGRAM --root DATA --gpus 0 1 2 3
  gram bench --protocol xd dg --trainers CoOp UniGRAM --root DATA --store STORE --hierarchy HIERARCHY
  gram bench --emoji DIR --trainers UniGRAM UniGRAM:gram_small_c2+2_ep10_batch32_ctxv1_no_regulator
  gram bench --trainers CoOp UniGRAM --root DATA --slurm bench.sbatch --slurm-options "partition=gpu time=02:00:00"

KEY VALUE pairs at the end go to every `gram train`. See docs/guide/bench.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gram_meta.bench.matrix import BACKBONES, PROTOCOLS

    add = parser.add_argument
    protocols = "base2new, xd, dg, or several of them (default: base2new)"
    add("--protocol", nargs="+", choices=PROTOCOLS, default=["base2new"], metavar="NAME", help=protocols)
    trainers = "with the default config for the backbone, or with another one, by its bare name"
    add("--trainers", nargs="+", required=True, metavar="TRAINER[:CFG]", help=trainers)
    add("--datasets", nargs="+", metavar="NAME", help="names of dataset configs (default: those of the protocol)")
    add("--source", metavar="NAME", help="dataset that is trained on in xd and dg (default: imagenet)")
    add("--seeds", nargs="+", default=["1", "2", "3"], metavar="N", help="default: 1 2 3")
    add("--shots", type=int, default=16, metavar="N", help="images per class to train on (default: %(default)s)")
    prefixes = f"beginning of the default configs' names: {', '.join(BACKBONES)} (default: vit_b16)"
    add("--backbone", choices=BACKBONES, metavar="PREFIX", help=prefixes)
    add("--root", metavar="DATA", help="folder that holds the datasets' folders")
    add("--output", metavar="DIR", help="folder for all runs (default: output)")
    add("--meta-dir", metavar="DIR", help="folder of the meta-trainings' folders (default: OUTPUT/meta)")
    add("--store", default="", help="pair store to meta-train from, where a checkpoint is not there")
    add("--hierarchy", default="", help="its hierarchy")
    add("--labelled-store", default="", metavar="STORE", help="the same for meta configs with CHC.LABELLED")
    add("--labelled-hierarchy", default="", metavar="HIERARCHY", help="its hierarchy")
    add("--meta-opts", nargs="+", default=[], metavar="KEY VALUE", help="settings for the meta-trainings")
    add(
        "--emoji",
        metavar="DIR",
        help="everything on the emoji world in DIR, which is made where it is not there: pictures, store, hierarchy; "
        "backbone gram_small, source emoji_travel",
    )
    workers = parser.add_mutually_exclusive_group()
    jobs = "worker processes, which share the cores (default: 1; with --emoji one per core, up to 4)"
    workers.add_argument("--jobs", type=int, metavar="N", help=jobs)
    gpus = "a worker for each GPU; a GPU named twice has two"
    workers.add_argument("--gpus", nargs="+", metavar="N", help=gpus)
    array = "write the runs that are not finished as a job array of SLURM, a script for sbatch, and run nothing here"
    workers.add_argument("--slurm", metavar="FILE", help=array)
    groups = "with --slurm: put trainings with their tests into a task until it has N runs (default: 1)"
    add("--runs-per-task", type=int, metavar="N", help=groups)
    sbatch = 'with --slurm: "partition=gpu time=02:00:00 array=%%4"; the defaults are "gres=gpu:1 cpus-per-task=8"'
    add("--slurm-options", metavar="TEXT", help=sbatch)
    add("--only", nargs="+", metavar="FOLDER", help="run only what fills these folders: a task of --slurm")
    add("--dry-run", action="store_true", help="print the commands; finished ones are comments")
    add("opts", nargs="*", metavar="KEY VALUE", help="options for every `gram train`")


def run(args: argparse.Namespace) -> int:
    """List the runs, then print or start them; return the exit status."""
    from gram_meta.bench import emoji, matrix, pool, runner, slurm
    from gram_meta.commands.lists import give_back_options

    check_slurm(args)
    give_back_options(args, "trainers", "datasets", "seeds", "gpus")
    settings = read_settings(args)
    jobs = emoji.bench_runs(settings, Path(args.emoji)) if args.emoji else matrix.bench_runs(settings)
    jobs = matrix.only(jobs, args.only) if args.only else jobs
    count = args.jobs if args.jobs is not None else min(pool.cores(), 4) if args.emoji else 1
    check_bounds({"--jobs": count, "--runs-per-task": args.runs_per_task}, COMMAND_BOUNDS)
    environments = pool.places(count, args.gpus or ())
    if args.dry_run:
        runner.show(jobs, settings, environments)
        return 0
    if not args.emoji and not Path(settings.root).is_dir():
        raise GramError(f"--root {settings.root}: expected the folder of the datasets, found no folder")
    if args.slurm:
        words = without_slurm(args.argv)
        slurm.write(jobs, settings, Path(args.slurm), words, args.slurm_options or "", args.runs_per_task or 1)
        return 0
    return runner.run(jobs, settings, environments, part=bool(args.only))


def check_slurm(args: argparse.Namespace) -> None:
    """Refuse options that mean nothing together."""
    if args.slurm and args.dry_run:
        raise GramError("--slurm and --dry-run: expected one of them, found both; --slurm runs nothing either")
    for name, value in (("--slurm-options", args.slurm_options), ("--runs-per-task", args.runs_per_task)):
        if value is not None and not args.slurm:
            raise GramError(f"{name}: expected --slurm FILE beside it, found none")


def without_slurm(argv: Sequence[str]) -> list[str]:
    """Return a command line without the options that write a job array."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("--slurm", "--slurm-options", "--runs-per-task"):
        parser.add_argument(name)
    return parser.parse_known_args(argv)[1]


def read_settings(args: argparse.Namespace) -> BenchSettings:
    """Return the settings of a bench; --emoji has defaults of its own."""
    from gram_meta.bench import emoji, matrix

    if args.emoji:
        return emoji.settings(args)
    if not args.root:
        raise GramError("--root: expected the folder of the datasets, found nothing; or give --emoji DIR")
    return matrix.common_settings(args, Path("output"), backbone="vit_b16", datasets=matrix.DATASETS)
