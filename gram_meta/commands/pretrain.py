"""`gram pretrain`: meta-learn a prompt and a gradient regulator."""

from __future__ import annotations

import argparse

HELP = """Meta-learn a prompt initialisation and a gradient regulator from a hierarchy (Algorithm 1).

Writes to OUT: best.safetensors, the meta-checkpoint with the lowest query loss after adaptation on held-out topics (for
TRAINER.GRAM.CHECKPOINT); last.safetensors; log.jsonl, the held-out scores; TensorBoard scalars; the state for --resume.

  gram pretrain --store STORE --hierarchy HIERARCHY --config configs/gram_meta/coop_vit_b16.yaml -o OUT
  gram pretrain --store STORE --hierarchy HIERARCHY -o OUT BACKBONE.NAME ViT-B/32 OUTER.STEPS 5000
  gram pretrain --store STORE --hierarchy HIERARCHY -o OUT SEEDS "(1, 2, 3)"        # OUT/seed1, OUT/seed2, OUT/seed3
  torchrun --nproc_per_node 8 -m gram_meta pretrain --store ...     # the tasks of each step shared among 8 processes

SIGTERM (Slurm sends it before a job's time is up) ends it after the step under way, with the state saved and exit
status 143; the same command with --resume goes on, with any number of processes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, help="pair store, from `gram embed`")
    parser.add_argument("--hierarchy", required=True, help="hierarchy, from `gram cluster`")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for what is learned")
    parser.add_argument(
        "--config", "--config-file", action="append", default=[], metavar="YAML", help="settings; may be repeated"
    )
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="take N steps, say where their time goes (OUT/profile.json), and end",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings that override the files'")


def run(args: argparse.Namespace) -> int:
    import sys

    from gram_meta.config import load_meta_config
    from gram_meta.method.meta_run import Stopped
    from gram_meta.method.profiling import profile_steps
    from gram_meta.method.together import open_trainer, open_trainers
    from gram_meta.processes import device_for, process_group

    config = load_meta_config(args.config, args.opts)
    with process_group(args.device or "auto") as group:
        inputs = args.store, args.hierarchy, args.output, config, device_for(group, args.device)
        try:
            if args.profile:
                done = [profile_steps(open_trainer(*inputs, group=group), args.profile)]
            elif config.SEEDS:
                done = open_trainers(*inputs, group=group).run(args.resume)
            else:
                done = [open_trainer(*inputs, group=group).run(args.resume)]
        except Stopped as stopped:
            if group.is_first:
                print(f"gram pretrain: {stopped}", file=sys.stderr)
            return 143
        if group.is_first:
            for path in done:
                print(f"{'profile' if args.profile else 'meta-checkpoint'}: {path}")
    return 0
