"""Settings of an experiment: one yacs tree for clustering, tasks and meta-training.

Defaults that the paper does not give are our choice; docs/reference/defaults.md lists them with their reasons.
"""

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode as CN

from gram_meta.errors import GramError, in_one_line
from gram_meta.files import PathLike, expand_home, read_text

# Nodes that do not change the result of a run
INCIDENTAL = ("LOADER", "MEMORY")

# The paper's eleven datasets, the source of xd and dg first, and the four shifted test sets of ImageNet.
ELEVEN = (
    *("imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft"),
    *("sun397", "dtd", "eurosat", "ucf101"),
)
BASE = "_BASE_"  # in a YAML file of meta-training: the file that it builds on
VISUAL_STARTS = ("random", "class_token")
CROP_ON = ("images", "tensors", "device")  # what resizes and crops: Pillow, torch, torch on the towers' device
SHIFTED = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")

# Keys of version 0.1 and today's names. Files, options and stored configurations may still have the old ones.
RENAMED = {
    "TRAINER.MEMORY.CHECKPOINT": "TRAINER.MEMORY.CHECKPOINTING",
    "TRAINER.MEMORY.CLASS_CHUNK": "TRAINER.MEMORY.CLASSES",
    "TRAINER.MEMORY.TEXT_GB": "TRAINER.MEMORY.TEXT_BUDGET",
    "TRAINER.MEMORY.IMAGE_GB": "TRAINER.MEMORY.IMAGE_BUDGET",
}


def get_meta_config() -> CN:
    """Return the default settings, not frozen."""
    c = CN()
    c.SEED = 1
    c.SEEDS = ()  # meta-trainings of several seeds at once, in OUT/seed1, OUT/seed2, ...; (): one, of SEED

    c.BACKBONE = CN()
    c.BACKBONE.NAME = "ViT-B/16"
    c.BACKBONE.PRECISION = "fp32"  # of the frozen towers: fp32, tf32, bf16, fp16
    c.BACKBONE.LOSS_SCALE = 0.0  # factor of losses before gradients are taken; 0: 256 for fp16, else 1

    # Cross-modal hierarchical clustering, Sec. 3.2
    c.CHC = CN()
    c.CHC.LABELLED = False  # True: captions are class names, and the classes are the topics (Table 6, row 4)
    c.CHC.SEED = 1  # >= 0: reproducible, UMAP on one thread; -1: UMAP on all threads, different every time
    c.CHC.FILTER = CN()
    c.CHC.FILTER.KEEP = 0.9  # share of pairs to keep, by CLIP image-text similarity
    c.CHC.FILTER.THRESHOLD = -1.0  # a similarity to require instead; -1: use KEEP
    c.CHC.TOPICS = CN()
    c.CHC.TOPICS.REDUCTION = "umap"  # umap, as in the paper; pca: exact and quick, for trying things
    c.CHC.TOPICS.NEIGHBORS = 15  # UMAP
    c.CHC.TOPICS.COMPONENTS = 5  # UMAP
    c.CHC.TOPICS.MIN_CLUSTER_SIZE = 30  # HDBSCAN, pairs
    c.CHC.TOPICS.MIN_SAMPLES = 5  # HDBSCAN
    c.CHC.TOPICS.SELECTION = "eom"  # HDBSCAN: eom, its own default, or leaf: more and smaller topics
    c.CHC.TOPICS.SAMPLE = 100_000  # pairs that UMAP and HDBSCAN see; of more pairs, the others are assigned; 0: all
    c.CHC.WORDS = CN()
    c.CHC.WORDS.TOKENIZER = "words"  # what cuts captions into words: words, characters, or a function to import
    c.CHC.DOMAINS = CN()
    c.CHC.DOMAINS.K = 3  # U of Sec. 3.2: k-means clusters in each topic; fewer where one would be too small for a task
    c.CHC.DOMAINS.STARTS = 10  # k-means runs, of which the best is taken
    c.CHC.DOMAINS.SAMPLE = 10_000  # images of a topic that k-means sees; others go to the nearest centre; 0: all

    # Meta-training tasks, Sec. 3.3
    c.TASKS = CN()
    c.TASKS.WAYS = 5  # K_t
    c.TASKS.SUPPORT_SHOTS = 4  # images per topic, of one domain
    c.TASKS.QUERY_SHOTS = 12  # images per topic, over all its domains
    c.TASKS.DOMAIN_SHIFT = True  # False: support from all domains too (Table 6, row 1)
    c.TASKS.TOPICS = "random"  # near: topics whose images are alike; varied: more often those whose images differ
    c.TASKS.HELD_OUT = 0.15  # share of topics kept for choosing the checkpoint

    c.PROMPT = CN()
    c.PROMPT.TEXT_TOKENS = 4
    c.PROMPT.VISUAL_TOKENS = 0
    c.PROMPT.WORDS = "a photo of a"  # start of the text prompt; "": random
    c.PROMPT.TEMPLATE = "a photo of a {}."  # class prompt if there is no text prompt
    c.PROMPT.CONDITIONAL = False  # True: a meta-net shifts the text prompt for each image, as in CoCoOp
    c.PROMPT.VISUAL_START = "random"  # of visual tokens; class_token: copies of the class token
    c.PROMPT.VISUAL_SIZE = 0.0  # root mean square that every visual token is held at; 0: free (it grows)
    c.PROMPT.FAMILY = "independent"  # independent, or maple: visual tokens are linear functions of the text tokens
    c.PROMPT.TEXT_DEPTH = 1  # layers of the text tower with a prompt of their own
    c.PROMPT.VISUAL_DEPTH = 1  # the same of the image tower
    c.PROMPT.FIXED_WORDS = ""  # words between the text prompt and the class name, not learned; MaPLe's: "of a"

    # Images are read only for visual prompts; all others use the features of a store
    c.LOADER = CN()
    c.LOADER.WORKERS = -1  # processes that decode ahead, for each process of meta-training; -1: as cores, up to 8
    c.LOADER.PREFETCH = 2  # batches of tasks that each of them keeps ready
    c.LOADER.IMAGE_ROOT = ""  # folder that the images' locations are relative to; "": where `gram embed` read them

    # The part of a batch in one pass through the towers: the same gradients to rounding, in less memory
    c.MEMORY = CN()
    c.MEMORY.SECOND_ORDER = "auto"  # whole: all in one graph; lean: one graph at a time; auto: whole if it fits
    c.MEMORY.TASKS = 0  # tasks in one pass; 0: as many as fit
    c.MEMORY.IMAGES = 0  # lean, visual prompts: images of one side of a task in one pass; 0: as many as fit
    c.MEMORY.CHECKPOINTING = False  # keep only the inputs of layers, and recompute the rest in backward passes
    c.MEMORY.BUDGET = 0.0  # GB that each process may fill; 0: half of the device's memory
    c.MEMORY.CUDA_GRAPHS = True  # on a GPU, record a step once for each shape of its tasks, and replay it

    # R^phi, Eq. 5 and 6
    c.REGULATOR = CN()
    c.REGULATOR.ENABLED = True  # False: raw gradients, plain MAML (Table 6, row 2)
    c.REGULATOR.START = "gate"  # gate: W = 0, b_beta = 0, gamma = GAMMA; random: as Algorithm 1, line 1
    c.REGULATOR.GAMMA = 0.9
    c.REGULATOR.INPUT = "raw"  # raw: g, as in Eq. 5; normalised: g / rms(g)
    c.REGULATOR.BETA = "absolute"  # absolute: as in Eq. 6; relative: beta * rms(g); none: 0

    # Inner loop, Eq. 7
    c.INNER = CN()
    c.INNER.ALPHA = 0.01
    c.INNER.STEPS = 1
    c.INNER.DETACHED = 0  # steps taken before those, which the meta-gradient passes over
    c.INNER.FIRST_ORDER = False  # True: treat the support gradient as a constant

    # Outer loop, Eq. 8 and 9
    c.OUTER = CN()
    c.OUTER.META = True  # False: no inner loop, plain prompt pre-training on the topics (Table 6, row 3)
    c.OUTER.OPTIMIZER = "adam"  # adam or sgd
    c.OUTER.LR_PROMPT = 1e-3  # lambda_1
    c.OUTER.LR_VISUAL = 0.0  # lambda_1 of the visual prompt; 0: LR_PROMPT
    c.OUTER.LR_REGULATOR = 1e-4  # lambda_2
    c.OUTER.BATCH = 4  # B, tasks per update
    c.OUTER.STEPS = 2000
    c.OUTER.CLIP_NORM = 1.0  # of the meta-gradient of theta and of phi, each; 0: off
    c.OUTER.TEMPERATURE = 1.0  # the query loss divides logits by it; above 1 for an overconfident CLIP
    c.OUTER.COSINE = True  # learning rates fall to zero along a cosine

    # Evaluation on fixed tasks from held-out topics
    c.EVAL = CN()
    c.EVAL.EVERY = 50  # steps
    c.EVAL.TASKS = 64
    c.CHECKPOINT = CN()
    c.CHECKPOINT.EVERY = 200  # steps between resumable states
    return c


# ------------------------------------------------------------------------------------------------------------- bounds


class Bound(NamedTuple):
    """What the value of a key may be: whether a value is fine, and how a message says it."""

    is_fine: Callable[[Any], bool]
    expected: str


def _numbers(
    low: float, high: float = 10**9, also: float | None = None, above: bool = False, below: bool = False
) -> Bound:
    """Bound of numbers (of a tuple: each), and of `also`; `above` and `below` leave out `low` and `high` themselves."""

    def is_fine(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return all(map(is_fine, value))
        if not isinstance(value, (int, float)) or not low <= value <= high:
            return value == also
        return not (above and value == low) and not (below and value == high)

    words = f"{'more than' if above else 'at least'} {low:,} and {'less than' if below else 'at most'} {high:,}"
    return Bound(is_fine, words if also is None else f"{also}, or {words}")


def _whole(high: int) -> Bound:
    """Bound of a tuple of different whole numbers from 0."""
    return Bound(
        lambda values: (
            all(type(value) is int and 0 <= value <= high for value in values) and len(set(values)) == len(values)
        ),
        f"whole numbers from 0 to {high:,}, each once, such as (0, 1, 5)",
    )


def _names(*names: str) -> Bound:
    return Bound(lambda value: value in names, f"{', '.join(names[:-1])} or {names[-1]}")


def _is_template(value: str) -> bool:
    return value.count("{}") == 1 and not set("{}") & set(value.replace("{}", ""))


def _is_size(value: Any) -> bool:
    return len(value) == 2 and all(type(side) is int and 1 <= side <= 10_000 for side in value)


def _is_range(value: Any) -> bool:
    return len(value) == 2 and all(isinstance(end, int | float) for end in value) and 0 < value[0] <= value[1] <= 1


def _colour(low: float, above: bool = False) -> Bound:
    """Bound of three numbers, of red, green and blue."""
    number = _numbers(low, 1000, above=above)
    return Bound(lambda value: len(value) == 3 and number.is_fine(value), f"{number.expected}, for red, green and blue")


_COUNT, _AT_LEAST_2, _FROM_0, _SHARE = _numbers(1), _numbers(2), _numbers(0), _numbers(0, 1)
_WORKERS = _numbers(0, 512, also=-1)  # far more processes than cores only fill the memory
_SEED, _RATE, _DECAY = _numbers(0, 2**32 - 1), _numbers(0, 1000), _numbers(0, 1, below=True)
_PREC = _names("fp32", "tf32", "fp16", "bf16", "amp")

# What a key may be, for meta-training and clustering, and for few-shot runs: each line a bound and its keys.
META_BOUNDS = {
    key: bound
    for bound, keys in (
        (_COUNT, "INNER.STEPS OUTER.STEPS OUTER.BATCH EVAL.EVERY EVAL.TASKS CHECKPOINT.EVERY LOADER.PREFETCH"),
        (_COUNT, "TASKS.SUPPORT_SHOTS TASKS.QUERY_SHOTS CHC.TOPICS.MIN_SAMPLES CHC.DOMAINS.STARTS"),
        (_COUNT, "PROMPT.TEXT_DEPTH PROMPT.VISUAL_DEPTH"),
        (_AT_LEAST_2, "TASKS.WAYS CHC.TOPICS.NEIGHBORS CHC.TOPICS.COMPONENTS CHC.TOPICS.MIN_CLUSTER_SIZE"),
        (_AT_LEAST_2, "CHC.DOMAINS.K"),
        (_FROM_0, "PROMPT.TEXT_TOKENS MEMORY.TASKS MEMORY.IMAGES MEMORY.BUDGET"),
        (_WORKERS, "LOADER.WORKERS"),
        (_numbers(0, 1000), "PROMPT.VISUAL_TOKENS"),  # attention grows with their square
        (_FROM_0, "PROMPT.VISUAL_SIZE OUTER.LR_VISUAL OUTER.CLIP_NORM INNER.DETACHED"),
        (_SEED, "SEED"),
        (_whole(2**32 - 1), "SEEDS"),
        (_numbers(0, 2**32 - 1, also=-1), "CHC.SEED"),
        (_RATE, "INNER.ALPHA OUTER.LR_PROMPT OUTER.LR_REGULATOR OUTER.TEMPERATURE"),
        (_DECAY, "TASKS.HELD_OUT"),
        (_numbers(0, 1, above=True), "CHC.FILTER.KEEP"),
        (_numbers(-1, 1), "CHC.FILTER.THRESHOLD"),
        (_numbers(100, also=0), "CHC.TOPICS.SAMPLE CHC.DOMAINS.SAMPLE"),  # a smaller sample has too few neighbours
        (_numbers(-1, 1, above=True, below=True), "REGULATOR.GAMMA"),
        (_numbers(0, 2**16), "BACKBONE.LOSS_SCALE"),
        (_names("fp32", "tf32", "bf16", "fp16", "fp64"), "BACKBONE.PRECISION"),
        (_names("umap", "pca"), "CHC.TOPICS.REDUCTION"),
        (_names("eom", "leaf"), "CHC.TOPICS.SELECTION"),
        (_names("random", "near", "varied"), "TASKS.TOPICS"),
        (_names("gate", "random"), "REGULATOR.START"),
        (_names("raw", "normalised"), "REGULATOR.INPUT"),
        (_names("absolute", "relative", "none"), "REGULATOR.BETA"),
        (_names("adam", "sgd"), "OUTER.OPTIMIZER"),
        (_names("independent", "maple"), "PROMPT.FAMILY"),
        (_names(*VISUAL_STARTS), "PROMPT.VISUAL_START"),
        (_names("auto", "whole", "lean"), "MEMORY.SECOND_ORDER"),
        (Bound(_is_template, "words with {} where the class name stands"), "PROMPT.TEMPLATE"),
    )
    for key in keys.split()
}
RUN_BOUNDS = {
    key: bound
    for bound, keys in (
        (_COUNT, "OPTIM.MAX_EPOCH TRAIN.PRINT_FREQ DATALOADER.TRAIN_X.BATCH_SIZE DATALOADER.TRAIN_U.BATCH_SIZE"),
        (_COUNT, "DATALOADER.TEST.BATCH_SIZE DATALOADER.K_TRANSFORMS"),
        (_COUNT, "TRAINER.COOP.N_CTX TRAINER.COCOOP.N_CTX TRAINER.JOINT.N_CTX_TEXT"),
        (_numbers(1, 1000), "TRAINER.JOINT.N_CTX_VISION TRAINER.VPT.N_CTX_VISION"),
        (_names(*VISUAL_STARTS), "TRAINER.JOINT.VISUAL_INIT TRAINER.VPT.VISUAL_INIT"),
        (_WORKERS, "DATALOADER.NUM_WORKERS"),
        (_FROM_0, "TRAINER.MEMORY.CLASSES TRAINER.MEMORY.TEXT_BUDGET"),
        (_FROM_0, "TRAINER.MEMORY.IMAGE_BUDGET TRAINER.MEMORY.KEPT_IMAGES"),
        (_FROM_0, "INPUT.CROP_PADDING INPUT.CUTOUT_N INPUT.CUTOUT_LEN INPUT.GN_STD DATALOADER.TRAIN_X.N_DOMAIN"),
        (_FROM_0, "INPUT.COLORJITTER_B INPUT.COLORJITTER_C INPUT.COLORJITTER_S DATALOADER.TRAIN_U.N_DOMAIN"),
        (_COUNT, "DATALOADER.TRAIN_X.N_INS DATALOADER.TRAIN_U.N_INS"),
        (_whole(10**9), "TEST.AT_STEPS"),
        (_numbers(-1), "DATASET.NUM_SHOTS OPTIM.WARMUP_EPOCH TRAIN.CHECKPOINT_FREQ"),  # -1: all images, none, never
        (_numbers(-(2**32), 2**32 - 1), "SEED"),  # negative: another one every time
        (_RATE, "OPTIM.LR OPTIM.WARMUP_CONS_LR OPTIM.WARMUP_MIN_LR OPTIM.WEIGHT_DECAY OPTIM.GAMMA OPTIM.BASE_LR_MULT"),
        (_RATE, "TRAINER.GRAM.STEP_SCALE"),
        (_DECAY, "OPTIM.MOMENTUM OPTIM.ADAM_BETA1 OPTIM.ADAM_BETA2 OPTIM.RMSPROP_ALPHA"),
        (_SHARE, "INPUT.RGS_P INPUT.GB_P"),
        (Bound(_is_range, "(low, high), more than 0 and at most 1"), "INPUT.RRCROP_SCALE"),
        (_colour(-1000), "INPUT.PIXEL_MEAN"),
        (_colour(0, above=True), "INPUT.PIXEL_STD"),
        (Bound(lambda value: not value, "False, as a trainer needs tensors"), "INPUT.NO_TRANSFORM"),
        (Bound(_is_size, "(height, width) of at least 1 pixel"), "INPUT.SIZE"),
        (_names("bilinear", "bicubic", "nearest"), "INPUT.INTERPOLATION"),
        (_names(*CROP_ON), "INPUT.CROP_ON"),
        (_names("val", "test"), "TEST.SPLIT"),
        (_names("last_step", "best_val"), "TEST.FINAL_MODEL"),
        (_PREC, "TRAINER.COOP.PREC TRAINER.COCOOP.PREC TRAINER.VPT.PREC TRAINER.JOINT.PREC"),
        (_names("end", "middle", "front"), "TRAINER.COOP.CLASS_TOKEN_POSITION"),
        (_names("auto", "always", "never"), "TRAINER.MEMORY.CHECKPOINTING"),
    )
    for key in keys.split()
}


COMMAND_BOUNDS = {
    **dict.fromkeys(("batch size", "part size", "--neighbours", "--runs-per-task"), _COUNT),
    **dict.fromkeys(("--workers", "--jobs"), _numbers(1, 512)),
    "workers": _numbers(0, 512),
    **dict.fromkeys(("epochs", "batch_size"), _COUNT),
    "lr": _RATE,
    "seed": _SEED,
}


def check_bounds(config: Mapping[str, Any], bounds: Mapping[str, Bound]) -> None:
    """Raise a `GramError` for the first value in a tree of settings that is out of its bounds; absent keys are fine,
    and None where it is a default."""
    for key, value in flatten(config).items():
        if key in bounds and not bounds[key].is_fine(value):
            raise GramError(f"{key}: expected {bounds[key].expected}, found {value!r}")


def load_meta_config(files: Sequence[str | Path] = (), opts: Sequence[str] = ()) -> CN:
    """Merge defaults, YAML files in order and KEY VALUE pairs, and return the frozen settings.

    Raises `GramError` for an unknown key, a value of another type or out of its bounds, or an unreadable file.
    """
    config = get_meta_config()
    for file in files:
        merge_file(config, find_config(str(file), "gram_meta"))
    return _finished(config, opts)


def stored_config(values: Mapping[str, Any], opts: Sequence[str] = ()) -> CN:
    """Return the settings in a meta-checkpoint, without keys unknown to this version, with KEY VALUE pairs merged."""
    config = get_meta_config()
    known = flatten(config)
    _merge(config, {key: value for key, value in flatten(values).items() if key in known}, "meta-checkpoint")
    return _finished(config, opts)


def _finished(config: CN, opts: Sequence[str]) -> CN:
    merge_opts(config, opts)
    check_bounds(config, META_BOUNDS)
    config.freeze()
    return config


def find_config(name: str, folder: str, project: PathLike = ".") -> Path:
    """Return a YAML file: as a path, or by that path or its bare name in configs/ of `project`, then of the package.

    Raises `GramError` if there is none, with the nearest name in the package.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = _packaged_configs()
    relative = name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    for configs in (Path(project, "configs"), packaged):
        for candidate in (relative, f"{folder}/{relative}"):
            for path in (configs / f"{candidate}.yaml", configs / f"{candidate}.yml"):
                if path.is_file():
                    return path
    known = [p.relative_to(packaged).with_suffix("").as_posix() for p in packaged.rglob("*.yaml")]
    wanted = relative if "/" in relative else f"{folder}/{relative}"
    raise GramError(f"{name}: expected a YAML file, here or in the package, found none{did_you_mean(wanted, known)}")


def _packaged_configs() -> Path:
    """Return the folder `configs/`: installed as gram_meta.configs, or at the top of a clone."""
    spec = importlib.util.find_spec("gram_meta.configs")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parents[1] / "configs"


def merge_file(config: CN, path: PathLike, above: Sequence[Path] = ()) -> None:
    """Merge a YAML file into `config`, after the file that its `_BASE_` names, from its own folder.

    Args:
        above: the files that build on it.

    Raises:
        GramError: an unknown key, with the nearest known one, or a `_BASE_` that cannot be read.
    """
    tree, above = _read_tree(path), (*above, Path(path).resolve())
    base = tree.pop(BASE, None)
    if base is not None:
        file = Path(path).parent / str(base)
        if not file.is_file() or file.resolve() in above:
            expected = "a YAML file, seen from this one's folder, that does not build on this one"
            raise GramError(f"{path}: {BASE}: expected {expected}, found {base!r}")
        merge_file(config, file, above)
    _merge(config, flatten(tree), str(path))


def _read_tree(path: PathLike) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise GramError(f"{path}: expected YAML, found {in_one_line(error)}") from None
    if not isinstance(values, dict):
        raise GramError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def merge_opts(config: CN, opts: Sequence[str]) -> None:
    """Merge `KEY VALUE KEY VALUE ...` into `config`; same errors as `merge_file`."""
    refuse_flags(opts)
    if len(opts) % 2:
        raise GramError(f"options: expected KEY VALUE pairs, found {opts[-1]!r} without a value")
    pairs = zip(opts[::2], opts[1::2], strict=True)
    _merge(config, {key: CN._decode_cfg_value(value) for key, value in pairs}, "options")


def refuse_flags(opts: Sequence[str]) -> None:
    """Refuse flags among KEY VALUE pairs: argparse puts all that stands behind the first KEY there."""
    late = next((word for word in opts if word.startswith("--")), None)
    if late is not None:
        raise GramError(f"{late} stands behind KEY VALUE pairs; expected flags before them")


def check_known(key: str, what: str, name: str, known: Iterable[str]) -> None:
    """Refuse an unknown name of a trainer or dataset (`what`), and name the nearest known one, or all."""
    if name not in known:
        hint = did_you_mean(name, known) or f"; known: {', '.join(sorted(known))}"
        raise GramError(f"{key} is {name!r}, which is no known {what}{hint}")


def current_key(key: str) -> str:
    """Return today's name of a key, and print a note if `key` is an old one."""
    if key not in RENAMED:
        return key
    print(f"Note: {key} is now called {RENAMED[key]}")
    return RENAMED[key]


def rename_old_keys(tree: dict[str, Any]) -> None:
    """Rename the old keys of a tree of nested dicts, in place."""
    for old in RENAMED:
        *nodes, name = old.split(".")
        node: Any = tree
        for each in nodes:
            node = node.get(each) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node:
            node[current_key(old).rpartition(".")[2]] = node.pop(name)


def expand_homes(tree: dict[str, Any]) -> None:
    """Put the home folder for the `~` of paths in a tree of nested dicts, in place."""
    for key, value in tree.items():
        if isinstance(value, dict):
            expand_homes(value)
        else:
            tree[key] = expand_home(value)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of `names`, or None if none is similar."""
    known = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return known[close[0]] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"`, or "" if no name is similar."""
    guess = nearest(name, names)
    return f"; did you mean {guess!r}?" if guess else ""


def as_dict(config: CN) -> dict[str, Any]:
    """Return plain nested dicts, as JSON values."""
    return {key: as_dict(value) if isinstance(value, CN) else value for key, value in config.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by full keys: {"OPTIM": {"LR": 0.002}} -> {"OPTIM.LR": 0.002}; tuples become lists."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _merge(config: CN, pairs: Mapping[str, Any], source: str) -> None:
    known = flatten(config)
    for key, value in pairs.items():
        key, value = current_key(key), expand_home(value)
        if key not in known:
            raise GramError(f"{source}: unknown key {key!r}{did_you_mean(key, known)}")
        if isinstance(value, int) and isinstance(_get(config, key), float):
            value = float(value)  # YAML reads 1 as an integer
        try:
            if value is None:  # yacs takes it for any type
                raise ValueError
            config.merge_from_list([key, value])
        except ValueError:
            expected = type(_get(config, key)).__name__
            raise GramError(f"{source}: {key}: expected {expected}, found {value!r}") from None


def _get(config: CN, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
