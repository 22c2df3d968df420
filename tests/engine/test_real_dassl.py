"""The real Dassl as backend: its faults are repaired, nothing else is changed.

Three grounds to try it on. A miniature `dassl` with the same breaks, written here, is tried everywhere. The published
one is tried where it can be imported: `PYTHONPATH=.../Dassl.pytorch`, or a folder `Dassl` under GRAM_CHECKOUTS. And
under GRAM_CHECKOUTS, a folder that holds the published CoOp as `CoOp`, its own train.py, trainers and datasets run in
both backends, and must give the same results.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

# ----------------------------------------------------------------------------------------------- a miniature Dassl

BREAKS = {
    "dassl/utils/torchtools.py": """
        import torch

        def load_checkpoint(fpath):
            return torch.load(fpath)
    """,
    "dassl/utils/tools.py": """
        from PIL import Image

        def read_image(path):
            return Image.open(path).convert("RGB")
    """,
    "dassl/utils/logger.py": """
        import sys

        class Logger:
            def __init__(self, fpath):
                self.console, self.file = sys.stdout, open(fpath, "w")

            def write(self, text):
                self.console.write(text)
                self.file.write(text)

            def flush(self):
                pass

            def close(self):
                self.console.close()
                self.file.close()
    """,
    "dassl/optim/lr_scheduler.py": """
        from torch.optim.lr_scheduler import LRScheduler

        class _BaseWarmupScheduler(LRScheduler):
            def __init__(self, optimizer, successor, warmup_epoch, last_epoch=-1, verbose=False):
                self.successor, self.warmup_epoch = successor, warmup_epoch
                super().__init__(optimizer, last_epoch, verbose)

            def step(self, epoch=None):
                if self.last_epoch < self.warmup_epoch:
                    super().step(epoch)
                else:
                    self.successor.step(epoch)

        class ConstantWarmupScheduler(_BaseWarmupScheduler):
            def __init__(self, optimizer, successor, warmup_epoch, cons_lr, last_epoch=-1, verbose=False):
                self.cons_lr = cons_lr
                super().__init__(optimizer, successor, warmup_epoch, last_epoch, verbose)

            def get_lr(self):
                warm = self.last_epoch < self.warmup_epoch
                return [self.cons_lr] if warm else self.successor.get_last_lr()
    """,
    "dassl/data/datasets/dg/wilds/wilds_base.py": """
        import logging
        logging.disable(logging.WARNING)
        from wilds import get_dataset

        class WILDSBase:
            pass
    """,
    "dassl/metrics/accuracy.py": """
        def compute_accuracy(output, target, topk=(1,)):
            _, predicted = output.topk(max(topk), 1)
            correct = predicted.t().eq(target.view(1, -1))
            return [correct[:k].view(-1).float().sum(0, keepdim=True).mul(100.0 / len(target)) for k in topk]
    """,
    "dassl/data/transforms/randaugment.py": """
        import numpy as np

        def SolarizeAdd(img):
            return np.array(img).astype(np.int)
    """,
    "dassl/data/transforms/autoaugment.py": """
        import numpy as np

        class ImageNetPolicy:
            def __init__(self):
                self.ranges = np.linspace(8, 4, 10).astype(np.int)
    """,
    "dassl/evaluation/evaluator.py": """
        import os
        import numpy as np
        import torch

        def confusion_matrix(true, predicted, normalize):
            return np.eye(2)

        class Classification:
            def __init__(self, cfg, lab2cname=None):
                self.cfg = cfg

            def process(self, mo, gt):
                pass

            def evaluate(self):
                cmat = confusion_matrix([0, 1], [0, 1], normalize="true")
                torch.save(cmat, os.path.join(self.cfg.OUTPUT_DIR, "cmat.pt"))
                print("saved")
    """,
    "dassl/engine/trainer.py": """
        from torch.utils.tensorboard import SummaryWriter
        from dassl.utils import load_checkpoint

        class TrainerX:
            def __init__(self):
                self.writer = SummaryWriter(log_dir="nowhere")
                self.writer.add_scalar("loss", 1.0, 1)
    """,
}

WHOLE = {
    "dassl/__init__.py": "",
    "dassl/utils/__init__.py": "from .torchtools import *\nfrom .logger import *\nfrom .tools import read_image",
    "dassl/optim/__init__.py": "",
    "dassl/metrics/__init__.py": "from .accuracy import compute_accuracy",
    "dassl/data/__init__.py": "from .data_manager import DatasetWrapper",
    "dassl/data/data_manager.py": """
        from dassl.utils import read_image
        from .datasets import DATASET_REGISTRY

        class DatasetWrapper:
            def __init__(self, data_source, cfg=None):
                self.data_source, self.cfg = data_source, cfg

            def __getitem__(self, idx):
                return read_image(self.data_source[idx])
    """,
    "dassl/data/datasets/__init__.py": "from .build import DATASET_REGISTRY\nfrom .dg import *",
    "dassl/data/datasets/build.py": """
        class Registry:
            def __init__(self):
                self.known = {}

            def register(self, obj=None):
                if obj is None:
                    return lambda cls: self.register(cls) or cls
                assert obj.__name__ not in self.known
                self.known[obj.__name__] = obj

            def registered_names(self):
                return list(self.known)

        DATASET_REGISTRY = Registry()
    """,
    "dassl/data/datasets/dg/__init__.py": "from .wilds import *",
    "dassl/data/datasets/dg/wilds/__init__.py": "from .snow import Snow",
    "dassl/data/datasets/dg/wilds/snow.py": """
        from dassl.data.datasets import DATASET_REGISTRY
        from .wilds_base import WILDSBase

        class NotADataset:
            pass

        @DATASET_REGISTRY.register()
        class Snow(WILDSBase):
            pass
    """,
    "dassl/data/transforms/__init__.py": "",
    "dassl/evaluation/__init__.py": "from .evaluator import *",
    "dassl/engine/__init__.py": "from dassl.data import *\nfrom .trainer import TrainerX",
}

# The same modules without the faults: nothing is left to repair.
REPAIRED = {
    "dassl/utils/tools.py": ('Image.open(path).convert("RGB")', "__import__('gram_meta.images').images.read_rgb(path)"),
    "dassl/utils/torchtools.py": ("torch.load(fpath)", "__import__('reader').read_checkpoint(fpath)"),
    "dassl/utils/logger.py": ("self.console.close()", "pass"),
    "dassl/data/datasets/dg/wilds/wilds_base.py": ("logging.disable(logging.WARNING)", "pass"),
    "dassl/data/transforms/randaugment.py": ("np.int", "int"),
    "dassl/data/transforms/autoaugment.py": ("np.int", "int"),
    "dassl/metrics/accuracy.py": (".view(-1).float()", ".reshape(-1).float()"),
    "dassl/evaluation/evaluator.py": ("torch.save(cmat,", "torch.save(torch.from_numpy(cmat),"),
    "dassl/optim/lr_scheduler.py": (
        "super().__init__(optimizer, last_epoch, verbose)",
        "super().__init__(optimizer, last_epoch)\n\n"
        "    def state_dict(self):\n        return {'successor': self.successor.state_dict()}",
    ),
}

FACTS = """
import gc, io, json, logging, os, pickle, sys
facts = {}
class Keep(logging.Handler):
    def emit(self, record): facts["logged"].append(record.getMessage())
facts["logged"] = []
logging.getLogger("gram_meta.engine").setLevel(logging.DEBUG)
logging.getLogger("gram_meta.engine").addHandler(Keep())
"""

TRY = """
import torch
from types import SimpleNamespace
from dassl.optim.lr_scheduler import ConstantWarmupScheduler
from dassl.data.transforms import autoaugment, randaugment
from dassl.evaluation.evaluator import Classification
import dassl.engine, dassl.utils, dassl.data, numpy
from gram_meta.engine.checkpoints import Record

class Touch:
    def __reduce__(self): return os.mkdir, ("was run",)

def build():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, ConstantWarmupScheduler(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6), 1, 0.25)

def rates(optimizer, scheduler, epochs):
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"]); optimizer.step(); scheduler.step()
    return seen

facts["rates"] = rates(*build(), 6)
optimizer, scheduler = build()
rates(optimizer, scheduler, 3)
unfixed = {key: value for key, value in vars(scheduler).items() if key != "optimizer"}
torch.save({"state_dict": {}, "o": optimizer.state_dict(), "s": scheduler.state_dict(), "x": Touch(), "old": unfixed}, "saved")
state = dassl.engine.trainer.load_checkpoint("saved")
optimizer, scheduler = build()
optimizer.load_state_dict(state["o"]); scheduler.load_state_dict(state["s"])
facts["resumed"] = rates(optimizer, scheduler, 3)
optimizer, scheduler = build()
optimizer.load_state_dict(state["o"]); scheduler.load_state_dict(state["old"])
facts["resumed from unfixed"] = rates(optimizer, scheduler, 3)
facts["executed"] = os.path.exists("was run")
facts["records"] = [isinstance(value, Record) for value in (state["x"], state["old"]["successor"])]

evaluator = Classification(SimpleNamespace(TEST=SimpleNamespace(COMPUTE_CMAT=True, PER_CLASS_RESULT=False), OUTPUT_DIR="."))
evaluator.process(torch.eye(2), torch.arange(2))
evaluator.evaluate()
facts["matrix"] = torch.load("cmat.pt").tolist()
console = sys.stdout
sys.stdout = io.StringIO()
kept = sys.stdout
logger = dassl.utils.Logger("./log.txt"); logger.write("one"); logger.close(); logger.close()
sys.stdout = console
facts["log"] = [kept.closed, open("log.txt").read()]
facts["transformed"] = transformed()
import dassl.metrics
facts["top"] = [v.item() for v in dassl.metrics.compute_accuracy(torch.eye(4), torch.arange(4).flip(0), topk=(1, 4))]
facts["numpy"] = hasattr(numpy, "int")
facts["mute"] = logging.root.manager.disable
from PIL import Image
Image.new("I;16", (1, 1), 3000).save("deep.png")
facts["pixels"] = [dassl.utils.read_image("deep.png").getpixel((0, 0)), *map(pixel, (False, True))]
facts["wrapper"] = pickle.dumps(wrapped()).hex()
"""

MINIATURE = """
def transformed(): return [randaugment.SolarizeAdd([[1.5]]).tolist(), autoaugment.ImageNetPolicy().ranges.tolist()[:2]]
def wrapped(): return dassl.data.DatasetWrapper([1, 2])
def pixel(as_coop):
    cfg = SimpleNamespace(DATALOADER={"COOP_DECODING": as_coop})
    return dassl.data.DatasetWrapper(["deep.png"], cfg)[0].getpixel((0, 0))
"""

PUBLISHED = """
def transformed():
    from PIL import Image
    image = Image.new("RGB", (3, 2))
    return [randaugment.SolarizeAdd(image).size, autoaugment.ImageNetPolicy()(image).size]
def wrapped(): return dassl.data.DatasetWrapper(engine.get_cfg_default(), [1, 2])
def pixel(as_coop):
    cfg = engine.get_cfg_default()
    cfg.DATALOADER.COOP_DECODING = as_coop
    item = SimpleNamespace(impath="deep.png", label=0, domain=0)
    return dassl.data.DatasetWrapper(cfg, [item])[0]["img"].getpixel((0, 0))
"""

ASK = """
facts["fixes"] = {r.id: r.applied for r in engine.fixes()}
facts["still"] = [r.id for r in engine.fixes() if r.applied and r.id not in ("B6", "B8") and r.found()]
print("FACTS" + json.dumps(facts))
"""

ADAPTER = "from gram_meta import engine\nassert engine.backend() == 'real'\n"
IDS = {"B1", "B2/B3", "B4", "B5", "B6", "B7", "B8", "B11", "B12", "B15", "B16"}


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def python(code, cwd, *path, backend="real", **env):
    """Run code with a Dassl backend."""
    return processes.python(code, cwd, *path, **{"GRAM_DASSL": backend, **env})


def facts_of(code, cwd, *path, **env):
    """The JSON that `code` prints after the word FACTS; `env` may hold `backend` too."""
    out = python(code, cwd, *path, **env).stdout
    return json.loads(out[out.index("FACTS") + 5 :])


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The miniature with all breaks, and what is true of it after the adapter was imported and TensorBoard is
    missing."""
    folder = tmp_path_factory.mktemp("broken")
    write(folder, {**WHOLE, **BREAKS})
    before = {path: path.read_bytes() for path in folder.rglob("*.py")}
    code = FACTS + "sys.modules['tensorboard'] = None\n" + ADAPTER + MINIATURE + TRY
    code += """
dassl.engine.TrainerX()
try:
    dassl.data.datasets.DATASET_REGISTRY.known["Snow"](None)
except ValueError as error:
    facts["snow"] = str(error)
facts["known"] = dassl.data.datasets.DATASET_REGISTRY.registered_names()
facts["left behind"] = [n for n in sys.modules if n == "wilds" or n == "torch.utils.tensorboard"]
"""
    facts = facts_of(code + ASK, folder, folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.py")}, "a file of Dassl's was changed"
    return folder, facts


COSINE = [0.25, 1.0, 0.9330127018922194, 0.75, 0.5, 0.25]  # one epoch at 0.25, then (1 + cos(pi e / 6)) / 2


def test_every_fault_is_found_and_repaired(broken):
    _, facts = broken
    assert facts["fixes"] == dict.fromkeys(IDS, True)
    assert facts["still"] == []


def test_each_fix_is_logged_once_at_debug_level(broken):
    _, facts = broken
    repaired = [line for line in facts["logged"] if line.startswith("Dassl repaired, ")]
    assert sorted(line.split()[2].rstrip(":") for line in repaired) == sorted(IDS)


def test_warmup_schedules_build_and_go_on_after_a_resume(broken):
    _, facts = broken
    assert facts["rates"] == pytest.approx(COSINE, rel=1e-12)
    assert facts["resumed"] == facts["resumed from unfixed"] == facts["rates"][3:]


def test_checkpoints_load_and_run_nothing(broken):
    _, facts = broken
    assert facts["executed"] is False and facts["records"] == [True, True]


def test_matrices_transforms_and_the_console(broken):
    _, facts = broken
    assert facts["matrix"] == [[1.0, 0.0], [0.0, 1.0]]
    assert facts["transformed"] == [[[1]], [8, 7]]
    assert facts["top"] == [0.0, 100.0]
    assert facts["numpy"] is False, "NumPy itself was changed"
    assert facts["log"] == [False, "one"]


def test_images_are_read_as_everywhere_unless_coops_reading_is_asked_for(broken):
    assert broken[1]["pixels"] == [[12] * 3, [12] * 3, [255] * 3]  # 3000 / 65535 * 255


def test_neither_wilds_nor_tensorboard_is_needed_nor_pretended(broken):
    _, facts = broken
    assert facts["left behind"] == []
    assert facts["known"] == ["Snow"]
    assert facts["snow"] == (
        "DATASET.NAME is 'Snow': this dataset of WILDS needs the package wilds, which is not here: "
        "python -m pip install wilds"
    )
    assert facts["mute"] == 0


def test_a_spawned_worker_imports_dassl_with_the_fixes(broken):
    folder, facts = broken
    code = f"import pickle; print(pickle.loads(bytes.fromhex({facts['wrapper']!r})).data_source)"
    assert python(code, folder, folder).stdout.strip() == "[1, 2]"


def test_dassl_may_have_been_imported_before(broken, tmp_path):
    """Its names are held by others already; wilds is installed, so that it could be imported at all."""
    folder, _ = broken
    (tmp_path / "wilds.py").write_text("def get_dataset(): return 'the real one'")
    code = FACTS + (
        "import dassl.engine, dassl.utils\n"
        "from dassl.utils import load_checkpoint\n"
        "from dassl.optim.lr_scheduler import ConstantWarmupScheduler as held_class\n"
        "facts['muted'] = logging.root.manager.disable\n"
    )
    code += ADAPTER + MINIATURE + TRY
    code += """
facts["held"] = load_checkpoint is engine.load_checkpoint is dassl.utils.torchtools.load_checkpoint
facts["held class"] = held_class is ConstantWarmupScheduler
import wilds; facts["wilds"] = wilds.get_dataset()
from dassl.data.datasets.dg.wilds.snow import Snow; facts["snow"] = Snow is dassl.data.datasets.DATASET_REGISTRY.known["Snow"]
"""
    facts = facts_of(code + ASK, tmp_path, tmp_path, folder)
    assert facts["muted"] == 30 and facts["mute"] == 0
    assert facts["held"] and facts["held class"]
    assert facts["wilds"] == "the real one" and facts["snow"], "wilds is here and must be left alone"
    assert facts["fixes"] == {id: id not in ("B6", "B8") for id in IDS}
    assert facts["resumed"] == facts["rates"][3:] and facts["executed"] is False


def test_a_dassl_without_breaks_is_left_alone(tmp_path):
    files = {**WHOLE, **BREAKS}
    for name, (broken, whole) in REPAIRED.items():
        text = textwrap.dedent(files[name])
        assert broken in text
        files[name] = text.replace(broken, whole)
    write(tmp_path, files)
    (tmp_path / "wilds.py").write_text("def get_dataset(): pass")
    (tmp_path / "reader.py").write_text("from gram_meta.engine.checkpoints import read_checkpoint")
    code = FACTS + ADAPTER
    code += """
import dassl.utils.torchtools, dassl.utils.logger
facts["own"] = [f.__module__ for f in (dassl.utils.torchtools.load_checkpoint, dassl.utils.logger.Logger.close)]
"""
    facts = facts_of(code + ASK, tmp_path, tmp_path)
    assert facts["fixes"] == dict.fromkeys(IDS, False)
    assert facts["logged"] == []
    assert facts["own"] == ["dassl.utils.torchtools", "dassl.utils.logger"]


def test_who_has_muted_logging_keeps_it_muted(broken):
    """To the very level that Dassl mutes it to."""
    folder, _ = broken
    code = f"import logging; logging.disable(30)\n{ADAPTER}\nprint(logging.root.manager.disable)"
    assert python(code, folder, folder).stdout.strip() == "30"


def test_a_missing_dependency_is_named_with_the_command(tmp_path):
    write(tmp_path, {"dassl/__init__.py": "", "dassl/engine.py": "import sklearn_not_here.metrics"})
    code = """
from gram_meta import engine
try: engine.backend()
except ValueError as error: print(error)
else: import dassl; print(engine.backend(), dassl.__name__)
"""
    sentence = (
        "the installed Dassl needs the package sklearn_not_here, which is not here: "
        "python -m pip install sklearn_not_here"
    )
    assert python(code, tmp_path, tmp_path).stdout.strip() == sentence
    auto = python(code, tmp_path, tmp_path, backend="auto")
    assert auto.stdout.strip() == "builtin gram_meta.engine.builtin"
    assert auto.stderr.strip() == f"Note: {sentence}; the built-in engine steps in"


def test_the_builtin_engine_has_no_fixes():
    code = "from gram_meta import engine\nprint(engine.backend(), engine.fixes())"
    assert python(code, ROOT, backend="builtin").stdout.strip() == "builtin []"


# --------------------------------------------------------------------------------------------- the published packages


def _checkout(name):
    folder = os.environ.get("GRAM_CHECKOUTS")
    return Path(folder, name) if folder and Path(folder, name).is_dir() else None


def _where_dassl_is():
    """Extra entries of sys.path under which a real Dassl imports, or None."""
    found = subprocess.run(
        [sys.executable, "-c", "import importlib.util as u; s = u.find_spec('dassl'); print(s.origin if s else None)"],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
    ).stdout.strip()
    if found not in ("", "None"):
        return [str(Path(found).parent.parent)]
    checkout = _checkout("Dassl")
    return [str(checkout)] if checkout else None


DASSL = _where_dassl_is()
COOP = _checkout("CoOp")
needs_dassl = pytest.mark.skipif(
    DASSL is None, reason="no real Dassl: `import dassl` fails, and GRAM_CHECKOUTS has no folder Dassl"
)
needs_coop = pytest.mark.skipif(
    COOP is None, reason="no CoOp checkout: GRAM_CHECKOUTS is not set, or has no folder CoOp"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    code = FACTS + ADAPTER + PUBLISHED + TRY
    return folder, facts_of(code + ASK, folder, *DASSL)


@needs_dassl
def test_the_published_dassl_is_repaired(published):
    import torch

    folder, facts = published
    assert facts["still"] == []
    assert {"B2/B3", "B4", "B12"} <= {id for id, applied in facts["fixes"].items() if applied}
    assert facts["fixes"]["B1"] or int(torch.__version__.split(".")[1]) < 7
    assert facts["rates"] == pytest.approx(COSINE, rel=1e-12)
    assert facts["resumed"] == facts["resumed from unfixed"] == facts["rates"][3:]
    assert facts["executed"] is False and facts["records"] == [True, True]
    assert facts["matrix"] == [[1.0, 0.0], [0.0, 1.0]]
    assert facts["log"] == [False, "one"] and facts["mute"] == 0
    assert facts["transformed"] == [[3, 2], [3, 2]] and facts["numpy"] is False
    assert facts["pixels"] == [[12] * 3, [12] * 3, [255] * 3]


@needs_dassl
def test_every_transform_of_the_published_dassl_runs(published):
    folder, _ = published
    code = """
from gram_meta import engine
engine.backend()
from PIL import Image
from dassl.data.transforms.transforms import AVAI_CHOICES
image = Image.new("RGB", (40, 30), (90, 120, 30))
for name in AVAI_CHOICES:
    cfg = engine.get_cfg_default()
    cfg.INPUT.SIZE, cfg.INPUT.TRANSFORMS, cfg.INPUT.GB_K = (16, 16), (name,), 3
    transform = engine.build_transform(cfg)
    for _ in range(20):
        assert transform(image).shape == (3, 16, 16), name
print(len(AVAI_CHOICES))
"""
    assert int(python(code, folder, *DASSL).stdout.split()[-1]) >= 18


@needs_dassl
def test_a_worker_of_the_published_dassl_that_is_spawned(published):
    folder, facts = published
    if not facts["fixes"]["B6"]:
        pytest.skip("wilds is installed: a spawned worker needs no help")
    code = f"import pickle; print(pickle.loads(bytes.fromhex({facts['wrapper']!r})).data_source)"
    assert python(code, folder, *DASSL).stdout.strip().endswith("[1, 2]")


# ------------------------------------------------------------------------------------ the two backends, part by part

PARTS = """
import contextlib, io, json, os, random, sys
from gram_meta import engine
engine.backend()
import numpy as np, torch
from PIL import Image
from torch import nn
import dassl.config.defaults
from dassl.data.datasets import DatasetBase, Datum
from dassl.data.transforms import build_transform
from dassl.evaluation import build_evaluator
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import AverageMeter, MetricMeter, set_random_seed

printed = io.StringIO()
seen = {}

def config(*opts):
    cfg = engine.get_cfg_default()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.merge_from_list(list(opts))
    return cfg

def flat(node, prefix=""):
    for key, value in node.items():
        yield from flat(value, f"{prefix}{key}.") if hasattr(value, "items") else [(prefix + key, repr(value))]

def rates(*opts):
    cfg = config("OPTIM.NAME", "sgd", "OPTIM.LR", 0.002, "OPTIM.MAX_EPOCH", 9, *opts).OPTIM
    optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], cfg)
    scheduler, seen = build_lr_scheduler(optimizer, cfg), []
    for _ in range(9):
        seen.append(optimizer.param_groups[0]["lr"]); optimizer.step(); scheduler.step()
    return seen

def optimised(name):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    optimizer = build_optimizer(model, config("OPTIM.NAME", name, "OPTIM.LR", 0.1).OPTIM)
    for _ in range(8):
        optimizer.zero_grad(); model(x).square().mean().backward(); optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()

def transformed(names, is_train):
    cfg = config("INPUT.SIZE", (16, 20), "INPUT.TRANSFORMS", names, "INPUT.INTERPOLATION", "bicubic")
    transform = build_transform(cfg, is_train=is_train)
    set_random_seed(3)
    return [transform(image).double().sum().item() for _ in range(6)]

def evaluated():
    cfg = config("TEST.PER_CLASS_RESULT", True)
    evaluator = build_evaluator(cfg, lab2cname={i: f"c{i}" for i in range(5)})
    torch.manual_seed(1)
    for _ in range(3):
        evaluator.process(torch.randn(30, 5), torch.randint(0, 4, (30,)))
    return evaluator.evaluate()

def loaded(count, batch, is_train):
    cfg = config("INPUT.SIZE", (8, 8))
    set_random_seed(1)
    loader = engine.build_data_loader(
        cfg, "RandomSampler" if is_train else "SequentialSampler", images[:count], batch,
        tfm=build_transform(cfg, is_train=is_train), is_train=is_train)
    return [[b["index"].tolist(), b["label"].tolist(), b["domain"].tolist(), sorted(b), b["img"].sum().item()] for b in loader]

with contextlib.redirect_stdout(printed):
    rng, images = np.random.default_rng(0), []
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(f"{i}.png")
        images.append(Datum(f"{i}.png", label=i % 4, domain=i % 3, classname=f"class {i % 4}"))
    image = Image.open("0.png").convert("RGB")
    data = DatasetBase(train_x=images, test=images)
    seen["rates"] = [
        rates("OPTIM.LR_SCHEDULER", kind, "OPTIM.STEPSIZE", (2, 5), "OPTIM.WARMUP_EPOCH", epochs, "OPTIM.WARMUP_TYPE", warmup,
              "OPTIM.WARMUP_RECOUNT", recount)
        for kind in ("cosine", "single_step", "multi_step") for warmup in ("constant", "linear")
        for epochs in (-1, 1, 3) for recount in (True, False)]
    seen["optimisers"] = [optimised(name) for name in ("sgd", "adam", "adamw")]
    seen["transforms"] = [transformed(names, is_train) for is_train in (True, False) for names in (
        ("random_resized_crop", "random_flip", "normalize"), ("random_crop",), ("center_crop",), ("instance_norm",),
        ("random_flip", "normalize"), ())]
    seen["evaluator"] = evaluated()
    set_random_seed(2)
    seen["few shots"] = [[item.impath for item in data.generate_fewshot_dataset(images, num_shots=count, repeat=repeat)]
                         for count in (1, 2, 9) for repeat in (False, True)]
    seen["dataset"] = [data.num_classes, data.lab2cname, data.classnames]
    seen["loaders"] = [loaded(24, 5, True), loaded(24, 5, False), loaded(3, 5, True)]
    meter = MetricMeter(); meter.update({"loss": 1.5, "acc": torch.tensor(3.0)}); meter.update({"loss": 2.25, "acc": 1})
    average = AverageMeter(); [average.update(value) for value in (1.0, 2.0, 5.0)]
    seen["meters"] = [str(meter), average.val, average.avg]
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    seen["accuracy"] = [value.tolist() for value in compute_accuracy(scores, torch.tensor([0, 1, 2, 3, 4, 0]), topk=(1, 3))]
seen["printed"] = printed.getvalue()
seen["defaults"] = dict(flat(dassl.config.defaults._C))
print("FACTS" + json.dumps(seen))
"""


@needs_dassl
def test_both_backends_agree_part_by_part(tmp_path):
    """Schedules, optimisers, transforms, evaluator, few-shot draws, loaders, meters, and what they print."""
    seen = {}
    for backend in ("real", "builtin"):
        (tmp_path / backend).mkdir()
        seen[backend] = facts_of(PARTS, tmp_path / backend, *(DASSL if backend == "real" else ()), backend=backend)
    real, builtin = (seen[backend].pop("defaults") for backend in ("real", "builtin"))
    for part, value in seen["real"].items():
        assert seen["builtin"][part] == value, part
    assert {key: real.get(key) for key in builtin} == builtin
    # the only options that the built-in engine lacks are those of Dassl's own trainers
    lacking = {key.split(".")[1] for key in set(real) - set(builtin) if key.startswith("TRAINER.")}
    assert {key for key in set(real) - set(builtin) if not key.startswith("TRAINER.")} == set()
    assert "MIXMATCH" in lacking and not lacking & {"COOP", "COCOOP", "VPT", "GRAM"}


# ------------------------------------------------------------------------ CoOp's own code, on one backend and the other

DRIVER = """
import json, os, runpy, sys
record, weights, *flags = sys.argv[1:]
sys.path.insert(0, ".")
from gram_meta import engine
engine.backend()
import dassl.engine, torch
from clip import clip
clip._download = lambda url, root=None: weights
build = dassl.engine.build_trainer
seen = {"backend": engine.backend(), "steps": [], "tests": [], "results": []}

def recording(cfg):
    trainer = build(cfg)
    step, infer, test, after = trainer.forward_backward, trainer.model_inference, trainer.test, trainer.after_epoch

    def forward_backward(batch):
        rate, summary = trainer.get_current_lr(), step(batch)
        learned = torch.cat([p.detach().flatten() for p in trainer.model.prompt_learner.parameters()]).tolist()
        seen["steps"].append({
            "images": [os.path.relpath(path, cfg.DATASET.ROOT) for path in batch["impath"]],
            "pixels": batch["img"].double().sum().item(), "labels": batch["label"].tolist(),
            "rate": rate, **summary, "learned": learned,
        })
        return summary

    def model_inference(images):
        scores = infer(images)
        seen["tests"].append([images.double().sum().item(), scores.tolist()])
        return scores

    def tested(*args, **kwargs):
        seen["results"].append(test(*args, **kwargs))
        return seen["results"][-1]

    def after_epoch():
        after()
        if trainer.epoch + 1 == int(os.environ.get("STOP_AFTER", 0)):
            sys.exit(0)

    trainer.forward_backward, trainer.model_inference = forward_backward, model_inference
    trainer.test, trainer.after_epoch = tested, after_epoch
    seen["classes"] = [type(trainer).__module__, type(trainer.dm.dataset).__module__]
    return trainer

dassl.engine.build_trainer = recording
sys.argv = ["train.py", *flags]
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    json.dump(seen, open(record, "w"))
"""


@pytest.fixture(scope="module")
def coop_world(tmp_path_factory):
    """A data root with an `eurosat` of four classes for each backend (few-shot files are drawn anew), and CLIP
    weights."""
    import numpy as np
    import torch
    from PIL import Image

    from gram_meta.backbone.clip import _random_model

    folder = tmp_path_factory.mktemp("coop")
    for backend in ("real", "builtin"):
        rng = np.random.default_rng(0)
        images = folder / backend / "eurosat/2750"
        images.mkdir(parents=True)
        split = {"train": [], "val": [], "test": []}
        for label, name in enumerate(("forest", "river", "highway", "lake")):
            for part, count in (("train", 6), ("val", 2), ("test", 3)):
                for index in range(count):
                    file = f"{name}_{part}_{index}.png"
                    pixels = rng.integers(0, 160, (48, 40, 3)) + 30 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(images / file)
                    split[part].append([file, label, name])
        (images.parent / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    state = _random_model("tiny").state_dict()
    torch.save({key: value.half().float() for key, value in state.items()}, folder / "tiny.pt")
    return folder


def coop(world, backend, name, trainer, config, *opts, flags=(), **env):
    """Run CoOp's train.py as it is; what it saw, and what it printed."""
    out = world / f"{name} {backend}"
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", DRIVER, str(out / "record.json"), str(world / "tiny.pt")]
    command += ["--root", str(world / backend), "--seed", "1", "--trainer", trainer]
    command += ["--dataset-config-file", "configs/datasets/eurosat.yaml"]
    command += ["--config-file", f"configs/trainers/{config}.yaml", "--output-dir", str(out / "run"), *flags]
    command += ["INPUT.SIZE", "(32,32)", "DATASET.NUM_SHOTS", "4", *map(str, opts)]
    path = os.pathsep.join([*(DASSL if backend == "real" else ()), str(ROOT)])
    env = {
        **os.environ,
        "GRAM_DASSL": backend,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        **env,
    }
    done = subprocess.run(command, cwd=COOP, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "record.json").read_text()), done.stdout


TRAINERS = {
    "coop": (
        "CoOp",
        "CoOp/vit_b16_ep50_ctxv1",
        "TRAINER.COOP.PREC",
        "fp32",
        "OPTIM.MAX_EPOCH",
        4,
        "DATALOADER.TRAIN_X.BATCH_SIZE",
        4,
        "DATALOADER.NUM_WORKERS",
        2,
        "OPTIM.LR",
        0.1,
    ),
    "coop of a class, best_val": (
        "CoOp",
        "CoOp/vit_b16",
        "TRAINER.COOP.PREC",
        "fp32",
        "TRAINER.COOP.CSC",
        True,
        "TRAINER.COOP.CLASS_TOKEN_POSITION",
        "middle",
        "TRAINER.COOP.N_CTX",
        4,
        "OPTIM.MAX_EPOCH",
        3,
        "DATALOADER.TRAIN_X.BATCH_SIZE",
        8,
        "DATALOADER.NUM_WORKERS",
        0,
        "TEST.FINAL_MODEL",
        "best_val",
        "TEST.PER_CLASS_RESULT",
        True,
        "TEST.COMPUTE_CMAT",
        True,
        "DATASET.SUBSAMPLE_CLASSES",
        "base",
    ),
    "cocoop": (
        "CoCoOp",
        "CoCoOp/vit_b16_c4_ep10_batch1_ctxv1",
        "TRAINER.COCOOP.PREC",
        "fp32",
        "OPTIM.MAX_EPOCH",
        2,
        "DATALOADER.NUM_WORKERS",
        0,
        "OPTIM.LR",
        0.1,
    ),
    "zsclip": ("ZeroshotCLIP2", "CoOp/vit_b16", "DATALOADER.NUM_WORKERS", 0),
}


@needs_coop
@needs_dassl
@pytest.mark.parametrize("name", TRAINERS)
def test_coops_own_trainers_see_the_same_on_both_backends(coop_world, name):
    """Images, augmented pixels, learning rates, losses, learned tensors, scores and results: all equal."""
    trainer, config, *opts = TRAINERS[name]
    flags = ("--eval-only",) if name == "zsclip" else ()
    real, printed = coop(coop_world, "real", name, trainer, config, *opts, flags=flags)
    builtin, builtin_text = coop(coop_world, "builtin", name, trainer, config, *opts, flags=flags)
    assert (real["backend"], builtin["backend"]) == ("real", "builtin")
    assert real["classes"] == builtin["classes"] == [f"trainers.{name.split()[0]}", "datasets.eurosat"]
    assert len(real["steps"]) == {"coop": 16, "cocoop": 32, "zsclip": 0}.get(name, 3)
    assert len({step["rate"] for step in real["steps"]}) == {"coop": 4, "cocoop": 2, "zsclip": 0}.get(name, 3)
    for one, other in zip(real["steps"], builtin["steps"], strict=True):
        assert one == other
    assert real["tests"] == builtin["tests"] and len(real["tests"]) > 0
    assert real["results"] == builtin["results"]
    assert _results_in(printed) == _results_in(builtin_text)


def _results_in(text):
    """What a run prints, without where and when it ran: the lines about data, training and results."""
    start = text.index("Loading trainer")
    lines = [line for line in text[start:].splitlines() if "load_model() is skipped" not in line]
    kept = []
    for line in lines:
        line = line.replace(" real/", " ROOM/").replace(" builtin/", " ROOM/")
        line = line.replace("/real/", "/ROOM/").replace("/builtin/", "/ROOM/")
        if line.startswith("epoch ["):
            words = line.split()
            line = " ".join(words[:4] + words[words.index("loss") : words.index("eta")])
        if not line.startswith("Elapsed"):
            kept.append(line)
    return kept


@needs_coop
@needs_dassl
@pytest.mark.parametrize("backend", ["real", "builtin"])
def test_coop_resumes_its_schedule_exactly(coop_world, backend):
    """Killed after the second epoch of four and started again: the rates are those of a run that went through."""
    trainer, config, *opts = TRAINERS["coop"]
    opts += ["TRAIN.CHECKPOINT_FREQ", 1]
    whole, _ = coop(coop_world, backend, "whole", trainer, config, *opts)
    first, _ = coop(coop_world, backend, "killed", trainer, config, *opts, STOP_AFTER="2")
    then, printed = coop(coop_world, backend, "killed", trainer, config, *opts)
    assert "Loaded scheduler" in printed and "Previous epoch: 2" in printed
    rates = [step["rate"] for step in whole["steps"]]
    assert [step["rate"] for step in first["steps"]] == rates[:8]
    assert [step["rate"] for step in then["steps"]] == rates[8:]
    assert len(set(rates)) == 4
