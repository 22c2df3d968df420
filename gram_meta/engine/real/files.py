"""Fixes around files: B2, B3 (checkpoints), B11 (confusion matrices), B12 (the console's copy in log.txt)."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import tempfile
from types import SimpleNamespace
from typing import Any

from gram_meta.engine.builtin.utils.torchtools import load_checkpoint
from gram_meta.engine.real.fix import Fix, rebind


def fixes() -> list[Fix]:
    return [
        Fix(
            "B2/B3", "checkpoints load, old ones too, and nothing in them is executed", _fails_or_executes, _load_safely
        ),
        Fix("B11", "confusion matrices load with torch.load as it is", _matrix_is_numpy, _matrix_of_tensors),
        Fix("B12", "closing the log file leaves the console open", _closes_console, _close_file_alone),
    ]


_executed: list[str] = []


class _Canary:
    """Records that it was unpickled: a checkpoint with it has then executed code."""

    def __reduce__(self) -> Any:
        return _record, ()


def _record() -> None:
    _executed.append("code from a file")


def _fails_or_executes() -> bool:
    """Load what an unfixed warm-up scheduler saves, together with code to execute."""
    import torch

    theirs = importlib.import_module("dassl.utils.torchtools").load_checkpoint
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


def _load_safely() -> None:
    rebind(importlib.import_module("dassl.utils.torchtools").load_checkpoint, load_checkpoint)


def _matrix_is_numpy() -> bool:
    """Return whether `torch.load` refuses the confusion matrix that the evaluator writes."""
    import torch

    evaluator = importlib.import_module("dassl.evaluation.evaluator").Classification
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
    module: Any = importlib.import_module("dassl.evaluation.evaluator")
    compute = module.confusion_matrix

    def confusion_matrix(*args: Any, **kwargs: Any) -> Any:
        import torch

        return torch.from_numpy(compute(*args, **kwargs))

    module.confusion_matrix = confusion_matrix


def _logger() -> Any:
    return importlib.import_module("dassl.utils.logger").Logger


def _closes_console() -> bool:
    console = io.StringIO()
    probe = _logger().__new__(_logger())
    probe.console, probe.file = console, io.StringIO()
    probe.close()
    return console.closed


def _close_file_alone() -> None:
    """Replace `close`, which `__del__` and `__exit__` call."""

    def close(self: Any) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    _logger().close = close
