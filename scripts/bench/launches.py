"""Count what a step asks of a GPU, without a GPU: operations, casts, and how often the processor waits for it.

    python scripts/bench/launches.py -o launches.json

Counts are not times. docs/results/benchmarks.md explains the columns and the official ways. The towers are narrow and
have twelve layers, as ViT-B/16.
"""

import contextlib
import copy
import importlib
import io
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import cache, partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import common
import meta_step
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gram_meta import engine, plugin  # noqa: F401, registers the trainers
from gram_meta.backbone.clip import Backbone, clip_module, empty_clip
from gram_meta.clustering.hierarchy import Hierarchy, Topic
from gram_meta.config import load_meta_config
from gram_meta.coop import launch
from gram_meta.files import write_json
from gram_meta.method import episodes
from gram_meta.method.apply import Regulation
from gram_meta.method.meta_trainer import READ_EVERY, MetaTrainer
from gram_meta.method.outer import OuterLoop
from gram_meta.method.profiling import IMAGE_TOWER, OPTIMISER, OTHER, REGULATOR, TEXT_TOWER, Profile

REGIONS = (TEXT_TOWER, IMAGE_TOWER, REGULATOR, OPTIMISER, OTHER)
FAMILIES = {"text": (4, 0, False), "conditional": (4, 0, True), "visual": (0, 4, False), "joint": (2, 2, False)}
DEEP = {"deep": "independent", "maple": "maple"}  # in meta-training alone: PROMPT.FAMILY, with joint's tokens in LAYERS
LAYERS = 9  # with a prompt of their own, as in MaPLe, if the towers have so many
TRAINERS = {"ZeroshotCLIP": ("COOP", ""), "CoOp": ("COOP", "text"), "CoOpGRAM": ("COOP", "text")}  # options, family
TRAINERS |= {"CoCoOp": ("COCOOP", "conditional"), "CoCoOpGRAM": ("COCOOP", "conditional")}
TRAINERS |= {"VPT": ("VPT", "visual"), "VPTGRAM": ("VPT", "visual")}
TRAINERS |= {"JointPrompt": ("JOINT", "joint"), "UniGRAM": ("JOINT", "joint")}
NAMES = [f"{look} {it}" for look in ("big", "very old") for it in "cat dog boat lamp tree spoon cloud can".split()]
BATCH = {"img": torch.zeros(4, 3, 32, 32), "label": torch.arange(4)}
PIXELS = torch.zeros(4, 5, 2, 3, 32, 32, dtype=torch.uint8)  # of the sets of 4 tasks, 5 ways
Row = dict[str, float]


class Counter(TorchDispatchMode):
    """Counts operations, casts and waits."""

    VIEWS = ("aten::detach", "aten::_unsafe_view", "aten::lift_fresh", "aten::alias")
    WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(3, int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        cast = name == "_to_copy" and kwargs.get("dtype") is not None
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        view = func.is_view or func.namespace == "profiler" or func._schema.name in self.VIEWS
        self.counts += (not view, cast, name in self.WAITS or by_mask)
        return func(*args, **kwargs)

    def wait(self) -> Any:
        self.counts[2] += 1
        return contextlib.nullcontext()


def inside(owner: type, method: str, context: Callable[[], Any]) -> Any:
    """Return a patch that runs a method inside a context."""
    function = getattr(owner, method)

    @wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return mock.patch.object(owner, method, patched)


def count(step: Callable[[], Any], towers: Any, regulator: Any = None, steps: int = 1) -> Row:
    """Return operations by region and in all, casts and waits of steps, per step; they have run before."""
    counter = Counter()
    profile: Any = Profile(clock=lambda: counter.counts.copy())  # type: ignore[arg-type, return-value]
    optimiser, regulates = partial(profile.region, OPTIMISER), partial(profile.region, REGULATOR)
    patches = [inside(OuterLoop, "update", optimiser), inside(torch.amp.GradScaler, "step", optimiser)]
    patches += [inside(torch.optim.SGD, "step", optimiser), inside(Regulation, "regulate", regulates)]
    patches += [inside(Tensor, read, counter.wait) for read in ("tolist", "cpu", "numpy")]  # no operation on a CPU
    for module in ("utils._foreach_utils", "optim.optimizer"):  # multi-tensor code, as on a GPU
        owner = importlib.import_module(f"torch.{module}")
        patches.append(mock.patch.object(owner, "_get_foreach_kernels_supported_devices", lambda: ["cpu"]))
    with contextlib.ExitStack() as stack:
        for context in (*patches, profile.watching(towers, regulator), counter, profile.step()):
            stack.enter_context(context)
        step()
    seen = {region: profile.seconds.get(region, np.zeros(3)) for region in REGIONS}
    seen[OPTIMISER] -= seen[OPTIMISER][2] * np.array([1, 0, 1])  # Adam's step numbers are on the host
    all_operations, casts, waits = (sum(seen.values()) / steps).tolist()
    each = {region: value[0] / steps for region, value in seen.items()}
    return each | {"operations": all_operations, "casts": casts, "waits": waits}


@cache
def narrow(precision: str, layers: int) -> Backbone:
    """Return random towers in the layout for GPUs."""
    model = empty_clip(clip_module(), 64, 32, layers, 64, 8, 77, 49408, 64, 1, layers)
    backbone = Backbone(model, "narrow", "cpu", precision)
    backbone.packs_texts = False
    assert backbone.fingerprint  # waits for the thread that computes it, whose operations are not the step's
    return backbone


def official_rows(precision: str, layers: int) -> dict[str, Row]:
    """Return the counts of CoOp's training step and test batch as its code has them."""
    towers = copy.deepcopy(narrow("fp32", layers))
    if precision == "fp16":
        clip_module().model.convert_weights(towers.model)
    clip, context = towers.model, torch.zeros(4, 64, dtype=towers.dtype, requires_grad=True)
    text, optimiser = common.PlainClassText(towers, NAMES, 4), torch.optim.SGD([context], 1e-3, momentum=0.9)
    methods = {"encode_text": staticmethod(text.features), "encode_images": staticmethod(clip.visual.__call__)}
    parts: Any = type("Parts", (), methods)()

    def logits() -> Tensor:
        features = parts.encode_images(BATCH["img"].type(towers.dtype))
        features = features / features.norm(dim=-1, keepdim=True)
        return clip.logit_scale.exp() * features @ parts.encode_text(context).t()

    def step() -> None:
        scores = logits()
        loss = torch.nn.functional.cross_entropy(scores, BATCH["label"])
        optimiser.zero_grad()
        assert torch.isfinite(loss).all()
        loss.backward()
        optimiser.step()
        loss.item(), engine.compute_accuracy(scores, BATCH["label"])[0].item()

    @torch.no_grad()
    def test() -> None:
        predicted = logits().max(1)[1]
        predicted.eq(BATCH["label"]).float().sum().item(), BATCH["label"].cpu(), predicted.cpu()

    step()
    return {"CoOp, step, official": count(step, parts), "CoOp, test batch, official": count(test, parts)}


def build_trainer(name: str, precision: str, layers: int, folder: Path) -> Any:
    """Return a trainer of this project on made-up batches; it prints every five steps."""
    (node, family), backbone = TRAINERS[name], narrow(precision, layers)
    options: dict[str, Any] = {"MODEL.BACKBONE.NAME": backbone.name}
    options |= {"INPUT.SIZE": "(32,32)", f"TRAINER.{node}.PREC": precision, "TRAIN.PRINT_FREQ": 5, "USE_CUDA": False}
    options |= {"TRAINER.COOP.N_CTX": 4, "TRAINER.COCOOP.N_CTX": 4, "OPTIM.NAME": "sgd"}
    if name.endswith("GRAM"):
        start = common.save_start(folder / f"{name}.safetensors", backbone, *FAMILIES[family])
        options["TRAINER.GRAM.CHECKPOINT"] = start
    words = ["--trainer", name, "--output-dir", folder / name, "--seed", 1, *(x for o in options.items() for x in o)]
    cfg = launch.setup_cfg(launch.build_parser().parse_args([str(word) for word in words]))

    def data(trainer: Any) -> None:
        trainer.dm = SimpleNamespace(dataset=SimpleNamespace(classnames=NAMES))
        trainer.train_loader_x, trainer.val_loader, trainer.test_loader = [BATCH] * 10, None, [BATCH]
        trainer.num_classes, trainer.lab2cname = len(NAMES), dict(enumerate(NAMES))

    loading = mock.patch("gram_meta.trainers.base.load_backbone", lambda *_: backbone)
    trainer_class = engine.TRAINER_REGISTRY.get(name)
    with loading, mock.patch.object(trainer_class, "build_data_loader", data):
        return trainer_class(cfg)


def trainer_rows(name: str, precision: str, layers: int, folder: Path) -> dict[str, Row]:
    """Return the counts of a training step (none of ZeroshotCLIP), with the waits of an epoch, and of a test batch."""
    trainer, rows = build_trainer(name, precision, layers, folder), {}

    @torch.no_grad()
    def test() -> None:
        images, labels = trainer.parse_batch_test(BATCH)
        trainer.evaluator.process(trainer.model_inference(images), labels)

    if TRAINERS[name][1]:
        trainer.epoch = 0
        trainer.run_epoch()
        epoch = count(trainer.run_epoch, trainer.backbone, steps=10)
        trainer.batch_idx = 0
        step = count(partial(trainer.forward_backward, BATCH), trainer.backbone)
        rows[f"{name}, step"] = step | {"waits": epoch["waits"]}
    trainer.set_model_mode("eval")
    test()
    return rows | {f"{name}, test batch": count(test, trainer.backbone)}


def meta_rows(family: str, layers: int, folder: Path) -> dict[str, Row]:
    """Return the counts of a meta-step on made-up features or pixels of 16 topics with 2 domains."""
    text, visual, conditional = FAMILIES["joint" if family in DEEP else family]
    rows, topics = np.arange(16 * 2 * 12), [Topic(name, 1.0, [[name, 1.0]], 24, 24, [12, 12]) for name in NAMES]
    hierarchy = Hierarchy(rows, rows, rows // 24, rows // 12 % 2, topics, np.zeros(len(rows), np.uint8), {})
    store = mock.MagicMock(fingerprint="", image_features=np.ones((len(rows), 64), np.float16))
    options = {"PROMPT.TEXT_TOKENS": text, "PROMPT.VISUAL_TOKENS": visual, "PROMPT.CONDITIONAL": conditional}
    if family in DEEP:
        depth = min(LAYERS, layers)
        options |= {"PROMPT.FAMILY": DEEP[family], "PROMPT.TEXT_DEPTH": depth, "PROMPT.VISUAL_DEPTH": depth}
    options |= {"TASKS.HELD_OUT": 0.4, "TASKS.SUPPORT_SHOTS": 1, "TASKS.QUERY_SHOTS": 2, "LOADER.WORKERS": 0}
    config = load_meta_config([], ["PROMPT.WORDS", "", *(str(x) for option in options.items() for x in option)])
    with mock.patch.object(Hierarchy, "check_store"):
        trainer = MetaTrainer(store, hierarchy, folder, config, progress=False, backbone=narrow("fp32", layers))
    trainer.read_every = READ_EVERY
    coming, numbers, towers = iter(trainer.episodes_of(0, 99)), iter(range(1, 99)), trainer.backbone

    def take(steps: int) -> None:
        for number, _ in zip(numbers, range(steps), strict=False):
            trainer.step(number, next(coming))
            trainer.record(number, mock.MagicMock())

    take(READ_EVERY)
    waits = count(partial(take, READ_EVERY), towers, trainer.regulator, READ_EVERY)["waits"]
    return {f"meta-step, {family}": count(partial(take, 1), towers, trainer.regulator) | {"waits": waits}}


def cloned_rows(family: str, layers: int) -> dict[str, Row]:
    """Return the counts of the meta-step with cloned models."""
    bench = meta_step.Bench(narrow("fp32", layers), family, Namespace(tasks=4, ways=5, support=1, query=2))
    bench.step(meta_step.CLONE)
    step = partial(bench.step, meta_step.CLONE)
    return {f"meta-step, {family}, cloned models": count(step, bench.backbone, bench.made.regulator)}


def measure(precision: str, layers: int, official: bool = True) -> dict[str, Row]:
    """Return the counts of every step by its name; meta-steps in fp32 alone."""

    def pixels(batches: Any, places: Any, transform: Any, index: int) -> tuple[Any, Tensor, Tensor]:
        return batches[index], PIXELS[:, :, :1], PIXELS

    rows = official_rows(precision, layers) if official else {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(episodes, "read_pixels", pixels):
        for name in TRAINERS:
            rows |= trainer_rows(name, precision, layers, Path(folder))
        for family in (*FAMILIES, *DEEP) if precision == "fp32" else ():
            rows |= meta_rows(family, layers, Path(folder, family))
            rows |= cloned_rows(family, layers) if official and family in FAMILIES and family != "conditional" else {}
    return rows


def main() -> None:
    options = common.plain_parser(__doc__)
    options.add_argument("--layers", type=int, default=12, help="of both towers (%(default)s)")
    options.add_argument("-o", "--output", type=Path, help="JSON file for all numbers")
    args = options.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):
        table, half = (measure(precision, args.layers) for precision in ("fp32", "fp16"))
    for name, row in half.items():
        table[name] |= {f"{what}, fp16": row[what] for what in ("operations", "casts")}
    common.print_table([{"": name} | {key: f"{n:,g}" for key, n in row.items()} for name, row in table.items()])
    if args.output:
        write_json(args.output, {"torch": torch.__version__, "layers": args.layers, "counts": table})


if __name__ == "__main__":
    main()
