"""`gram embed`: turn image-text pairs into a store of features."""

import argparse

HELP = """Turn image-text pairs into a store of CLIP and Sentence-BERT features.

SOURCE is one of

  shards/                    WebDataset tars (KEY.jpg, KEY.txt, KEY.json), as img2dataset writes them; or some of them:
  '{00000..00331}.tar'       by braces or wildcards, in quotes
  parquets/                  Parquet files with images inside, as Hugging Face's; or one, or 'train-*.parquet'
  images/                    a folder of images with a same-named .txt beside each, one caption a line
  pairs.tsv, .csv, .jsonl, .parquet
                             an image column and a caption column
  captions_train2017.json    COCO's captions
  dataset_coco.json          Karpathy's splits of COCO, Flickr8k or Flickr30k
  Flickr8k.token.txt, captions.txt
  Train_GCC-training.tsv     CC3M's captions and URLs, with --image-root FOLDER of what was downloaded
  classes/                   with --format classes: a labelled collection such as ImageNet; captions are class names

The format is detected from the contents of SOURCE and printed; --format NAME overrides the detection. Rows and images
that cannot be used are skipped, and counted by reason in the store's manifest.json. The same command continues an
interrupted run. Several processes, also on several machines, share the work:
torchrun --nproc_per_node 8 -m gram_meta embed ... See docs/guide/corpus.md."""

# Where the pairs are in SOURCE.
NAMES = {
    "--image-column NAME": "column of image paths (default: image, path, filename, ...); with both columns given as "
    "numbers from 1, the file has no header",
    "--caption-column NAME": "column of captions (default: caption, text, title, ...); in tars the suffix of a text "
    "member, or a key of the .json (default: .txt, then caption in .json)",
    "--image-root FOLDER": "where image paths start from (default: the file's folder; for captions in JSON also "
    "folders beside it, such as train2017)",
    "--image-name RULE": "how CC3M's images are called, such as 'train/{row:08d}.jpg' or '{crc32}' (default: found out "
    "by looking)",
    "--split NAMES": "of Karpathy's JSON or Hugging Face's Parquet files: train, val, ..., several with commas, or all "
    "(default: train, and COCO's restval, where there are splits)",
}
# of the command, and of `gram_meta.api.embed`
OPTIONS = (
    *("backbone", "precision", "sentence_model", "batch_size", "part_size", "workers", "crop_on", "device", "format"),
    *("image_column", "caption_column", "image_root", "image_name", "classnames", "split"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gram_meta.config import CROP_ON
    from gram_meta.corpus.sources import FORMATS

    formats = ["auto", *(known.name for known in FORMATS)]
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, file or pattern: see above")
    add("-o", "--out", metavar="STORE", required=True, help="folder for the store")
    clip = "CLIP: an OpenAI name, a .pt or .safetensors file, or gram-small (default: %(default)s)"
    add("--backbone", metavar="NAME", default="ViT-B/16", help=clip)
    add("--precision", choices=("fp32", "tf32", "fp16", "bf16"), default="fp32", help="of CLIP (default: %(default)s)")
    bert = "Sentence-BERT: a name, or a folder in sentence-transformers' format (default: %(default)s)"
    add("--sentence-model", metavar="NAME|PATH", default="all-MiniLM-L6-v2", help=bert)
    for flag, text in NAMES.items():
        add(flag.split()[0], metavar=flag.split()[1], help=text)
    listed = (
        f"the format of SOURCE: {', '.join(formats)} (default: %(default)s, which detects it; classes must be named)"
    )
    add("--format", choices=formats, default="auto", metavar="NAME", help=listed)
    add(
        "--classnames",
        metavar="FILE",
        help='with --format classes: lines of "folder class name" (default: a classnames.txt in SOURCE or above it; '
        "without one the folders' names, with spaces for underscores)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="images in one pass (default: %(default)s)")
    held = "pairs per part: what an interruption can lose, and what is held in memory (default: %(default)s)"
    add("--part-size", type=int, default=2048, metavar="N", help=held)
    beside = "processes that read images (default: one for each core, up to 8, on a GPU; none on a CPU)"
    add("--workers", type=int, metavar="N", help=beside)
    crop = "what workers resize: images (Pillow's; the default), tensors (2 to 3 times as fast for large photographs;"
    crop += " pixels differ by at most 1 of 255), or device: on --device, which decodes JPEG files, too"
    add("--crop-on", choices=CROP_ON, default=CROP_ON[0], help=crop)
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    from gram_meta.api import embed

    embed(args.source, args.out, **{name: getattr(args, name) for name in OPTIONS})
    return 0
