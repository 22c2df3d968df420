"""The fixes of the installed Dassl: what each repairs, how its fault is found, and what changes in this process.

B6, B7 and B8, which show while Dassl is imported, are in `imports`.
"""

import contextlib
import importlib
import io
import os
import tempfile
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image

from gram_meta.engine.builtin.evaluation import compute_accuracy
from gram_meta.engine.builtin.utils import load_checkpoint
from gram_meta.engine.checkpoints import restore_schedule, schedule_state
from gram_meta.engine.real.fix import Fix, rebind
from gram_meta.images import coop_decoding, read_rgb


def fixes() -> list[Fix]:
    """Return the fixes in the order in which they are applied."""
    return [
        # torch refuses the `verbose` that Dassl's schedulers pass to it
        Fix("B1", "schedulers with a warm-up build", lambda: _raises(TypeError, _warmup), _build_warmup),
        Fix("B4", "a resumed run goes on in its learning-rate schedule", _keeps_successor_as_object, _keep_numbers),
        Fix(
            "B2/B3",
            "checkpoints load, old ones too, and nothing in them is executed",
            _fails_or_executes,
            lambda: rebind(_dassl("utils.torchtools").load_checkpoint, load_checkpoint),
        ),
        Fix("B11", "confusion matrices load with torch.load as it is", _matrix_is_numpy, _matrix_of_tensors),
        Fix("B12", "closing the log file leaves the console open", _closes_console, _close_file_alone),
        Fix("B5", "randaugment and the augmentation policies run", lambda: bool(_without_np_int()), _add_np_int),
        Fix(
            "B15",
            "top-k accuracy is computed for every k",
            lambda: _raises(RuntimeError, _best_two),
            lambda: rebind(_dassl("metrics.accuracy").compute_accuracy, compute_accuracy),
        ),
        Fix("B16", "images are decoded as in gram embed and gram predict", _clips_deep_grey, _replace_reader),
    ]


def _dassl(name: str) -> Any:
    return importlib.import_module(f"dassl.{name}")


def _raises(kind: type[Exception], probe: Callable[[], Any]) -> bool:
    try:
        probe()
    except kind:
        return True
    return False


def _warmup() -> Any:
    """Build one epoch of warm-up before a cosine, as in every config of CoOp."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    return _dassl("optim.lr_scheduler").ConstantWarmupScheduler(optimizer, cosine, 1, 0.5)


def _build_warmup() -> None:
    base = _dassl("optim.lr_scheduler")._BaseWarmupScheduler

    def __init__(
        self: Any, optimizer: Any, successor: Any, warmup_epoch: int, last_epoch: int = -1, verbose: bool = False
    ) -> None:
        self.successor = successor
        self.warmup_epoch = warmup_epoch
        super(base, self).__init__(optimizer, last_epoch)

    base.__init__ = __init__


def _keeps_successor_as_object() -> bool:
    """Return whether the successor is saved as an object, which would drive a copy of the optimiser after a resume."""
    return not isinstance(_warmup().state_dict().get("successor"), dict)


def _keep_numbers() -> None:
    base = _dassl("optim.lr_scheduler")._BaseWarmupScheduler
    base.state_dict = schedule_state
    base.load_state_dict = restore_schedule


_executed: list[str] = []


class _Canary:
    """Records that it was unpickled: a checkpoint with it has then executed code."""

    def __reduce__(self) -> Any:
        return _record, ()


def _record() -> None:
    _executed.append("code from a file")


def _fails_or_executes() -> bool:
    """Load what an unfixed warm-up scheduler saves, together with code to execute."""
    theirs = _dassl("utils.torchtools").load_checkpoint
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    state = {"state_dict": {}, "epoch": 1, "scheduler": {"successor": successor}, "canary": _Canary()}
    _executed.clear()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = os.path.join(folder, "model.pth.tar-1")
        try:
            torch.save(state, path)
            theirs(path)
        except Exception:
            return True
    return bool(_executed)


def _matrix_is_numpy() -> bool:
    """Return whether `torch.load` refuses the confusion matrix that the evaluator writes."""
    evaluator = _dassl("evaluation.evaluator").Classification
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        test = SimpleNamespace(PER_CLASS_RESULT=False, COMPUTE_CMAT=True)
        probe = evaluator(SimpleNamespace(TEST=test, OUTPUT_DIR=folder))
        probe.process(torch.eye(2), torch.arange(2))
        probe.evaluate()
        try:
            torch.load(os.path.join(folder, "cmat.pt"), weights_only=True)
        except Exception:
            return True
    return False


def _matrix_of_tensors() -> None:
    module = _dassl("evaluation.evaluator")
    compute = module.confusion_matrix

    def confusion_matrix(*args: Any, **kwargs: Any) -> Any:
        return torch.from_numpy(compute(*args, **kwargs))

    module.confusion_matrix = confusion_matrix


def _closes_console() -> bool:
    console = io.StringIO()
    logger = _dassl("utils.logger").Logger
    probe = logger.__new__(logger)
    probe.console, probe.file = console, io.StringIO()
    probe.close()
    return console.closed


def _close_file_alone() -> None:
    """Replace `close`, which `__del__` and `__exit__` call."""

    def close(self: Any) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    _dassl("utils.logger").Logger.close = close


def _without_np_int() -> list[Any]:
    """Return the modules that use `np.int`, where NumPy has it no more."""
    randaugment, autoaugment = (_dassl(f"data.transforms.{name}") for name in ("randaugment", "autoaugment"))
    image = Image.new("RGB", (2, 2))
    probes = {randaugment: lambda: randaugment.SolarizeAdd(image), autoaugment: autoaugment.ImageNetPolicy}
    return [module for module, probe in probes.items() if _raises(AttributeError, probe)]


def _add_np_int() -> None:
    """Give these modules a copy of NumPy's module with the aliases of Python types that it once had."""
    for module in _without_np_int():
        old = ModuleType("numpy")
        vars(old).update({**vars(module.np), "int": int, "float": float, "bool": bool, "object": object})
        module.np = old


def _best_two() -> Any:
    return _dassl("metrics.accuracy").compute_accuracy(torch.eye(3), torch.arange(3), topk=(1, 2))


def _clips_deep_grey() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "deep.png")
        Image.new("I;16", (1, 1), 3000).save(path)
        return _dassl("utils.tools").read_image(path).getpixel((0, 0)) == (255, 255, 255)


def _replace_reader() -> None:
    rebind(_dassl("utils.tools").read_image, read_rgb)
    wrapper = _dassl("data.data_manager").DatasetWrapper
    get = wrapper.__getitem__

    def __getitem__(self: Any, idx: int) -> Any:
        with coop_decoding(self.cfg.DATALOADER.get("COOP_DECODING", False)):
            return get(self, idx)

    wrapper.__getitem__ = __getitem__
