"""`gram export`: a meta-checkpoint's prompt for trainers that know nothing of GRAM."""

import argparse

HELP = """Write the prompt of a meta-checkpoint as a checkpoint that Dassl's MODEL.INIT_WEIGHTS loads, so that even an
unmodified CoOp starts from it. The regulator stays behind: it acts in the GRAM trainers only.

  gram export meta/best.safetensors -o theta.pth.tar
  python train.py --trainer CoOp ... MODEL.INIT_WEIGHTS theta.pth.tar TRAINER.COOP.N_CTX 4

Dassl leaves out what does not agree in name and size and only prints that it does: give the options that are named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("meta", metavar="META.safetensors", help="meta-checkpoint, from `gram pretrain`")
    add("-o", "--output", required=True, metavar="FILE", help="checkpoint to write")
    add(
        "--trainer",
        default="",
        help="that is to start from it: CoOp, CoCoOp, VPT, JointPrompt (as here and in CoOp's checkout), or of the "
        "MaPLe family MaPLe, MaPLe/VPT, MaPLe/IVLP, PromptSRC, ProMetaR; default: by what the meta-checkpoint holds",
    )


def run(args: argparse.Namespace) -> int:
    """Write the file, and print how to use it."""
    from gram_meta.tools.export import export

    done = export(args.meta, args.output, args.trainer)
    held = ", ".join(f"{name} {shape}" for name, shape in done.shapes.items())
    print(f"{done.path}: {held}, for {done.trainer} with the backbone {done.backbone}")
    if done.left_out:
        print(f"Left out: {', '.join(done.left_out)}")
    options = " ".join(f"{key} {value}" for key, value in done.options.items())
    print(f"Options of the run: MODEL.INIT_WEIGHTS {done.path} {options}")
    return 0
