"""`gram pretrain`: meta-learn a prompt and a gradient regulator."""

import argparse
import sys

HELP = """Meta-learn a prompt initialisation and a gradient regulator from a hierarchy (Algorithm 1).

Writes to OUT: best.safetensors, the meta-checkpoint with the lowest query loss after adaptation on held-out topics (for
TRAINER.GRAM.CHECKPOINT); last.safetensors; log.jsonl, the held-out scores; TensorBoard scalars; the state for --resume.

  gram pretrain --store STORE --hierarchy HIERARCHY --config configs/gram_meta/coop_vit_b16.yaml -o OUT
  gram pretrain --store STORE --hierarchy HIERARCHY -o OUT SEEDS "(1, 2, 3)"        # OUT/seed1, OUT/seed2, OUT/seed3
  torchrun --nproc_per_node 8 -m gram_meta pretrain --store ...     # the tasks of each step shared among 8 processes

SIGTERM (Slurm sends it before a job's time is up) ends it after the step under way, with the state saved and exit
status 143; the same command with --resume continues, with any number of processes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--store", required=True, help="pair store, from `gram embed`")
    add("--hierarchy", required=True, help="hierarchy, from `gram cluster`")
    add("-o", "--output", required=True, metavar="OUT", help="folder for what is learned")
    add("--config", "--config-file", action="append", default=[], metavar="YAML", help="settings; may be repeated")
    add("--device", default="", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--resume", action="store_true", help="continue the run in OUT")
    profile = "take N steps, write where their time goes to OUT/profile.json, and end"
    add("--profile", type=int, default=0, metavar="N", help=profile)
    add("opts", nargs="*", metavar="KEY VALUE", help="settings that override the files'")


def run(args: argparse.Namespace) -> int:
    from gram_meta.config import load_meta_config
    from gram_meta.method.meta_run import Stopped
    from gram_meta.method.profiling import profile_steps
    from gram_meta.method.together import MetaTrainer, SeedsTrainer, open_trainer
    from gram_meta.processes import device_for, process_group

    config = load_meta_config(args.config, args.opts)
    with process_group(args.device or "auto") as group:
        inputs = args.store, args.hierarchy, args.output, config, device_for(group, args.device)
        try:
            if config.SEEDS and not args.profile:
                done = open_trainer(SeedsTrainer, *inputs, group=group).run(args.resume)
            else:
                trainer = open_trainer(MetaTrainer, *inputs, group=group)
                done = [profile_steps(trainer, args.profile) if args.profile else trainer.run(args.resume)]
        except Stopped as stopped:
            if group.is_first:
                print(f"gram pretrain: {stopped}", file=sys.stderr)
            return 143
        if group.is_first:
            for path in done:
                print(f"{'profile' if args.profile else 'meta-checkpoint'}: {path}")
    return 0
