"""Golden files: `golden.text("help.txt", found)` compares with tests/pins/golden/help.txt.

How to compare, and how to write the files anew (then read `git diff tests/pins/golden`):

    python -m pytest tests/pins
    python -m pytest tests/pins --update-golden

The fixture `made` runs the whole path on tiny inputs, through the command line alone: modules may move, it does not.
"""

import contextlib
import io
import json
import math
import os
import re
from pathlib import Path

import pytest
from helpers.emoji_food import write_emoji_food

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/pins/golden anew")


# --- golden files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def golden(request):
    return Golden(request.config.getoption("--update-golden", default=False))


class Golden:
    """Compare a value with a golden file, or write the file. A missing file is a failure, not a first run."""

    folder = GOLDEN

    def __init__(self, update: bool) -> None:
        self.update = update

    def text(self, name: str, found: str) -> None:
        if self.update:
            (GOLDEN / name).write_text(found, encoding="utf-8")
        assert found == (GOLDEN / name).read_text(encoding="utf-8")

    def json(self, name: str, found) -> None:
        """`found` equals the file's content; tuples count as lists."""
        found = json.loads(json.dumps(found))
        if self.update:
            _write_json(GOLDEN / name, found)
        assert found == json.loads((GOLDEN / name).read_text(encoding="utf-8"))

    def numbers(self, name: str, found, rel: float) -> None:
        """Nested dicts and lists of numbers: equal keys and lengths; each number differs by `rel` of its size at most.

        A list of numbers is a vector: its elements differ by `rel` of the largest of them at most. Differences below
        1e-6
        are always allowed: some numbers are zero but for rounding.
        """
        found = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.7g}"))
        if self.update:
            _write_json(GOLDEN / name, found)
        pinned = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
        assert [path for path, _ in _numbers(found)] == [path for path, _ in _numbers(pinned)]
        far = {
            path: (new, old)
            for (path, new), (_, old) in zip(_numbers(found), _numbers(pinned), strict=True)
            if len(new) != len(old)
            or any(abs(a - b) > rel * max(map(abs, old)) + 1e-6 for a, b in zip(new, old, strict=True))
        }
        assert not far, f"(found, pinned) of numbers that differ by more than {rel}"

    def pictures(self, name: str, found) -> None:
        """(N, H, W, C) uint8 next to each other in one PNG.

        Another processor may round another way, and a step (poster, halftone, contours) makes such a difference large
        in a single pixel. So the mean absolute difference of each picture may be 0.1 levels of 255, and 0.2 % of its
        bytes may differ by more than 2.
        """
        import numpy as np
        from PIL import Image

        if self.update:
            Image.fromarray(np.concatenate(found, axis=1)).save(GOLDEN / name, optimize=True)
        difference = np.abs(found.astype(int) - self.read_pictures(name))
        assert difference.mean(axis=(1, 2, 3)).max() <= 0.1
        assert (difference > 2).mean(axis=(1, 2, 3)).max() <= 0.002

    @staticmethod
    def read_pictures(name: str):
        import numpy as np
        from PIL import Image

        sheet = np.asarray(Image.open(GOLDEN / name))
        return np.stack(np.split(sheet, sheet.shape[1] // sheet.shape[0], axis=1))


def _write_json(path: Path, value) -> None:
    """Indented JSON; a list of numbers takes one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([-\d.eE+,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


def _numbers(value, path=""):
    """(path, vector) of each list of numbers and each single number."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}")
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{path}[{index}]")
    else:
        yield path, [float(number) for number in (value if isinstance(value, list) else [value])]


# --- the whole path on tiny inputs ------------------------------------------------------------------------------------

WORDS = ("cat", "dog", "house", "tree", "boat", "lamp")
CLUSTER = (
    *(
        "CHC.TOPICS.REDUCTION",
        "pca",
        "CHC.TOPICS.MIN_CLUSTER_SIZE",
        "8",
        "CHC.FILTER.KEEP",
        "1.0",
        "CHC.DOMAINS.K",
        "2",
    ),
    *("TASKS.SUPPORT_SHOTS", "2", "TASKS.QUERY_SHOTS", "4"),
)
# Learning rates are large, so that a few steps move the prompts by about their own length.
META = (
    *("BACKBONE.NAME", "random-tiny", "TASKS.WAYS", "3", "TASKS.HELD_OUT", "0.5", "TASKS.SUPPORT_SHOTS", "2"),
    *("TASKS.QUERY_SHOTS", "4", "EVAL.EVERY", "2", "EVAL.TASKS", "4", "OUTER.STEPS", "4", "OUTER.BATCH", "2"),
    *("CHECKPOINT.EVERY", "2", "LOADER.WORKERS", "0", "OUTER.LR_PROMPT", "0.05", "OUTER.LR_REGULATOR", "0.02"),
    *("OUTER.OPTIMIZER", "sgd"),
)
JOINT = ("PROMPT.TEXT_TOKENS", "2", "PROMPT.WORDS", "a photo", "PROMPT.VISUAL_TOKENS", "2")
METAS = {
    "text": (),
    "visual": ("PROMPT.TEXT_TOKENS", "0", "PROMPT.VISUAL_TOKENS", "4"),
    "joint": JOINT,
    "conditional": ("PROMPT.CONDITIONAL", "True"),
    "adam": ("OUTER.OPTIMIZER", "adam", "OUTER.LR_PROMPT", "0.01", "OUTER.COSINE", "False"),
    "two_steps": ("INNER.STEPS", "2", "INNER.ALPHA", "0.002"),
    "first_order": ("INNER.FIRST_ORDER", "True"),
    "raw": ("REGULATOR.ENABLED", "False"),
    "random_regulator": ("REGULATOR.START", "random", "REGULATOR.INPUT", "normalised", "REGULATOR.BETA", "relative"),
    "no_meta": ("OUTER.META", "False"),
    "no_shift": ("TASKS.DOMAIN_SHIFT", "False", "OUTER.CLIP_NORM", "0"),
    "lean": (*JOINT, "MEMORY.SECOND_ORDER", "lean", "MEMORY.TASKS", "1", "MEMORY.IMAGES", "5"),
}
COOP_CONFIG, COCOOP_CONFIG = "gram_small_c4_ep10_batch32_ctxv1", "gram_small_c4_ep10_batch1_ctxv1"
JOINT_CONFIG = "gram_small_c2+2_ep10_batch32_ctxv1"
SLOW = ("OPTIM.LR", "0.005", "OPTIM.WARMUP_CONS_LR", "0.002")
FAST = ("OPTIM.LR", "0.05", "OPTIM.WARMUP_CONS_LR", "0.02")  # where gradients are small
# name: trainer, its config, the meta-training it starts from, further options
RUNS = {
    "CoOp": ("CoOp", COOP_CONFIG, "", ()),
    "CoCoOp": ("CoCoOp", COCOOP_CONFIG, "", FAST),
    "VPT": ("VPT", COOP_CONFIG, "", FAST),
    "JointPrompt": ("JointPrompt", JOINT_CONFIG, "", ()),
    "CoOpGRAM": ("CoOpGRAM", COOP_CONFIG, "text", ("TEST.FINAL_MODEL", "best_val", "TEST.PER_CLASS_RESULT", "True")),
    "CoCoOpGRAM": ("CoCoOpGRAM", COCOOP_CONFIG, "conditional", FAST),
    "VPTGRAM": ("VPTGRAM", COOP_CONFIG, "visual", FAST),
    "UniGRAM": ("UniGRAM", JOINT_CONFIG, "joint", ("TEST.PER_EPOCH", "True")),
    "scaled": ("CoOpGRAM", COOP_CONFIG, "text", ("TRAINER.GRAM.REGULATE", "False", "TRAINER.GRAM.STEP_SCALE", "0.5")),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A corpus, its store, its hierarchy, meta-trainings, trainings and what other commands print about them."""
    import torch

    from gram_meta import engine

    if engine.backend() != "builtin":
        pytest.skip("golden files are those of the built-in engine; the real Dassl has options of its own")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda descriptor: None)  # no waiting for the disk
    try:
        yield Made(tmp_path_factory.mktemp("pins"))
    finally:
        patch.undo()
        torch.set_num_threads(threads)


class Made:
    """Folders below `root`: corpus, store, hierarchy, meta/NAME, data, runs/NAME; `printed` by command."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.printed: dict[str, str] = {}
        self._write_corpus(root / "corpus")
        write_emoji_food(root / "data" / "emoji_food")
        store = ("--store", f"{root}/store", "--hierarchy", f"{root}/hierarchy", "--device", "cpu")
        clip = ("--backbone", "random-tiny", "--sentence-model", "hash:16", "--device", "cpu")
        self.gram("embed", f"{root}/corpus/pairs.tsv", "-o", f"{root}/store", *clip)
        self.gram("cluster", f"{root}/store", "-o", f"{root}/hierarchy", *CLUSTER)
        self.gram("inspect", f"{root}/hierarchy", "--json")
        for name, opts in METAS.items():
            self.gram("pretrain", *store, "-o", f"{root}/meta/{name}", *META, *opts)
        self.gram("pretrain", *store, "-o", f"{root}/meta/profiled", "--profile", "2", *META)
        text = f"{root}/meta/text/last.safetensors"
        self.gram("eval-meta", text, *store, "--tasks", "4", "--steps", "0", "1", "3", "--json")
        self.gram("interpret", text, "--format", "json")
        self.gram("export", text, "-o", f"{root}/exported.pth.tar")
        for name, (trainer, config, meta, opts) in RUNS.items():
            start = ("TRAINER.GRAM.CHECKPOINT", f"{root}/meta/{meta}/last.safetensors") if meta else ()
            self.train(trainer, name, config, "2", ("DATASET.SUBSAMPLE_CLASSES", "base", *start, *opts))
        learned = ("--eval-only", "--model-dir", f"{root}/runs/CoOp")
        self.train("CoOp", "CoOp_new", COOP_CONFIG, "2", ("DATASET.SUBSAMPLE_CLASSES", "new"), learned)
        self.train("ZeroshotCLIP", "ZeroshotCLIP", "gram_small", "-1", (), ("--eval-only",))
        pictures = f"{root}/data/emoji_food/images"
        self.gram("predict", pictures, "--model-dir", f"{root}/runs/CoOp", "--topk", "2", "--format", "json")
        self.gram("report", f"{root}/runs", "--format", "json")
        self.gram("check-data", f"{root}/data", "--datasets", "emoji_food", "--json")

    def gram(self, command: str, *argv: str) -> None:
        self.printed[command] = self.run(command, *argv)

    @staticmethod
    def run(*argv: str) -> str:
        """What a command prints."""
        from gram_meta.cli import main

        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert main(list(argv)) == 0, text.getvalue()
        return text.getvalue()

    def train(self, trainer: str, name: str, config: str, shots: str, opts=(), flags=()) -> str:
        """A training into runs/NAME, or into NAME if that is a whole path."""
        out = self.root / "runs" / name
        return self.run(
            "train",
            *("--root", f"{self.root}/data", "--seed", "1", "--trainer", trainer, "--backbone", "random-tiny"),
            *("--dataset-config-file", "emoji_food", "--config-file", config, "--output-dir", str(out), *flags),
            *("INPUT.SIZE", "(32,32)", "DATASET.NUM_SHOTS", shots, "DATALOADER.TRAIN_X.BATCH_SIZE", "2"),
            *("OPTIM.MAX_EPOCH", "2", "TRAIN.PRINT_FREQ", "1", *SLOW, *opts),
        )

    def files(self, folder: str) -> list[str]:
        """Names of files below a folder; of TensorBoard's, without time, machine and process."""
        names = [
            path.relative_to(self.root / folder).as_posix()
            for path in (self.root / folder).rglob("*")
            if path.is_file()
        ]
        return sorted(
            {f"{name.partition('.tfevents.')[0]}.tfevents.*" if ".tfevents." in name else name for name in names}
        )

    def json(self, path: str):
        return json.loads((self.root / path).read_text(encoding="utf-8"))

    def json_lines(self, path: str) -> list:
        return [json.loads(line) for line in (self.root / path).read_text(encoding="utf-8").splitlines()]

    def torch(self, path: str):
        import torch

        return torch.load(self.root / path, map_location="cpu", weights_only=True)

    def safetensors(self, path: str):
        """(metadata, tensors)."""
        from safetensors import safe_open

        with safe_open(self.root / path, framework="pt") as file:
            return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict

    @staticmethod
    def _write_corpus(folder: Path) -> None:
        """96 pictures of six words, with captions that name the word twice."""
        import numpy as np
        from PIL import Image

        folder.mkdir()
        rng = np.random.default_rng(1)
        lines = ["image\tcaption"]
        for i in range(96):
            word = WORDS[i // 16]
            pixels = rng.integers(0, 256, (40, 32, 3), dtype=np.uint8) // 2 + 20 * (i // 16)
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
            lines.append(f"{i:02d}.png\ta {word} {word} photo")
        (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- what of a value is pinned ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def keys():
    return paths_and_types


def paths_and_types(value, leave=()) -> dict[str, str]:
    """{"a.b[].c": "float"}: the paths of all values with their types; of tensors with dtype and shape.

    `leave`: paths of dicts and lists that are not looked into.
    """
    found: dict[str, set[str]] = {}
    _walk(value, "", leave, found)
    return {path: " or ".join(sorted(types)) for path, types in found.items()}


def _walk(value, path, leave, found) -> None:
    if path in leave or not isinstance(value, dict | list | tuple):
        found.setdefault(path, set()).add(_type(value))
    elif isinstance(value, dict):
        if not value:
            found.setdefault(path, set()).add("{}")
        for key, inner in value.items():
            _walk(inner, f"{path}.{key}" if path else str(key), leave, found)
    else:
        if not value:
            found.setdefault(path, set()).add("[]")
        for inner in value:
            _walk(inner, f"{path}[]", leave, found)


def _type(value) -> str:
    if hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "null" if value is None else type(value).__name__


@pytest.fixture(scope="session")
def fingerprint():
    return fingerprint_of


def fingerprint_of(tensor) -> list[float]:
    """The norm of a tensor, and the dot products of its values with four waves: changed by any change of the tensor."""
    import torch

    values = tensor.detach().double().flatten()
    place = torch.arange(len(values), dtype=torch.float64)
    waves = [math.sqrt(2) * torch.cos((0.7 + k) * place + k) for k in range(4)]
    return [values.norm().item(), *(torch.dot(values, wave).item() for wave in waves)]
