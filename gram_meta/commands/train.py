"""`gram train`: CoOp's train.py with this project's trainers and datasets."""

import argparse

from gram_meta.coop import launch

HELP = """Train or evaluate a trainer on a dataset: CoOp's train.py, flag by flag. In a CoOp-style checkout, a folder
whose train.py imports Dassl, the command runs that train.py with these trainers, options and config files added; the
checkout's own trainers and datasets replace those of the same name (docs/guide/checkout.md).

  baselines  ZeroshotCLIP, CoOp, CoCoOp, VPT, JointPrompt
  with GRAM  CoOpGRAM, CoCoOpGRAM, VPTGRAM, UniGRAM: start from TRAINER.GRAM.CHECKPOINT, made by `gram pretrain`
             MaPLeGRAM, PromptSRCGRAM, KgCoOpGRAM: the same, in a checkout that has MaPLe, PromptSRC or KgCoOp

Config files are found by name in the package when there is no such file here. A finished run is not run again, an
unfinished one resumes, and a folder that holds another run is refused.

  gram train --root DATA --seed 1 --trainer CoOpGRAM --dataset-config-file dtd \\
      --config-file vit_b16_c4_ep10_batch32_ctxv1 --output-dir OUT \\
      DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base TRAINER.GRAM.CHECKPOINT META/best.safetensors
  then, with another --output-dir: --eval-only --model-dir OUT ... DATASET.SUBSAMPLE_CLASSES new"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action="help", help="show this help message and exit")
    launch.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    launch.run(args)
    return 0
