"""`gram embed`: turn image-text pairs into a store of features."""

from __future__ import annotations

import argparse

HELP = """Turn image-text pairs into a store of CLIP and Sentence-BERT features.

SOURCE is a folder (images with a same-named .txt beside them, one caption a line) or a .tsv, .csv or .parquet
file with an image column and a caption column. With --format classes it is a folder of class folders, a labelled
collection such as ImageNet: captions are the names of the classes. Rows and images that cannot be used are skipped and counted by
reason in the store's manifest.json. An interrupted run goes on where it was when the same command is given
again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, .tsv, .csv or .parquet file")
    add("-o", "--out", metavar="STORE", required=True, help="folder for the store")
    add(
        "--backbone",
        metavar="NAME",
        default="ViT-B/16",
        help="CLIP: an OpenAI name, a .pt or .safetensors file, or gram-small (default: %(default)s)",
    )
    add(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="of CLIP (default: %(default)s)",
    )
    add(
        "--sentence-model",
        metavar="NAME|PATH",
        default="all-MiniLM-L6-v2",
        help="Sentence-BERT: a name, or a folder in sentence-transformers' format (default: %(default)s)",
    )
    add(
        "--image-column",
        metavar="NAME",
        help="column of image paths (default: image, path, filename, ...); with both columns given as numbers "
        "from 1, the file has no header",
    )
    add("--caption-column", metavar="NAME", help="column of captions (default: caption, text, title, ...)")
    add("--image-root", metavar="FOLDER", help="where image paths start from (default: the file's folder)")
    add(
        "--format",
        choices=("auto", "classes", "webdataset"),
        default="auto",
        help="classes: SOURCE is a folder of class folders, perhaps below train/ (default: %(default)s)",
    )
    add(
        "--classnames",
        metavar="FILE",
        help='with --format classes: lines of "folder class name" (default: a classnames.txt in SOURCE or above it; '
        "without one the folders' names, with spaces for underscores)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="images in one pass (default: %(default)s)")
    add(
        "--part-size",
        type=int,
        default=2048,
        metavar="N",
        help="pairs per part: what an interruption can lose, and what is held in memory (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that read images (default: %(default)s, none beside the main one)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    import os
    import sys

    from gram_meta.corpus.readers import open_source

    # cheap errors come first
    source = open_source(
        args.source, args.image_column, args.caption_column, args.image_root, args.format, args.classnames
    )
    from gram_meta.corpus.embed import embed_pairs, is_finished

    settings = {
        "source": source.identity(),
        "clip": {"name": args.backbone, "precision": args.precision},
        "sentence_model": {"name": args.sentence_model},
        "batch_size": args.batch_size,
        "part_size": args.part_size,
    }
    # A name stands for its weights, so a finished run is seen before they are loaded; a file may change.
    by_name = not os.path.exists(args.backbone) and not os.path.exists(args.sentence_model)
    if is_finished(args.out, settings) and by_name:
        print(f"{args.out}: finished before, nothing to do", file=sys.stderr)
        return 0

    # the tokenizer's threads do not survive the forking of image workers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import torch

    from gram_meta.backbone import load_backbone
    from gram_meta.corpus.sentences import load_sentence_model

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(args.backbone, device, args.precision)
    sentence_model = load_sentence_model(args.sentence_model, device)
    embed_pairs(
        source,
        args.out,
        backbone,
        sentence_model,
        batch_size=args.batch_size,
        part_size=args.part_size,
        workers=args.workers,
        progress=True,
    )
    return 0
