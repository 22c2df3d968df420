"""Where the numbers of a run go while it runs: TensorBoard, Weights & Biases, MLflow, or an object of your own.

A tracker receives `log(step, metrics)` for every number that a run writes, and `close()` at its end. TensorBoard is
the first; GRAM_TRACKERS names further ones: "wandb", "mlflow", or "module:Class" for a class that is called with
the run's folder and its settings. docs/guide/runs.md shows an example.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gram_meta.errors import GramError, in_one_line

VARIABLE = "GRAM_TRACKERS"
LONGEST = 500  # characters of a setting in MLflow


class Tracker(Protocol):
    """What receives the numbers of one run."""

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        """Take numbers by name ("train/loss"), of a step or, for tests, an epoch."""

    def close(self) -> None:
        """End the run."""


class TensorBoard:
    """Writes scalars to `<folder>/tensorboard`; those of an earlier part of the run from step `first` on are purged.

    TensorBoard compares bare numbers: of scalars over epochs ("val/accuracy"), those of an epoch that is trained again
    stay in the file, with the same value twice.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], first: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Logs to Weights & Biases; WANDB_PROJECT and its other variables choose the project and the mode."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb = _import("wandb")
        # a run beside others: several seeds are meta-trained at once
        self.run = wandb.init(name=str(folder), dir=str(folder), config=dict(settings), reinit="create_new")
        self.run.define_metric("*", step_metric="step")  # tests have steps of their own, which W&B's may not go back to

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        self.run.log({**metrics, **({} if step is None else {"step": step})})

    def close(self) -> None:
        self.run.finish(exit_code=int(_is_failing()))


class MLflow:
    """Logs to MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME choose the place."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.mlflow = _import("mlflow")
        self.run = self.mlflow.start_run(run_name=str(folder), nested=True)  # beside the run of another seed
        items = [(name, str(value)[:LONGEST]) for name, value in settings.items()]
        for start in range(0, len(items), 100):  # MLflow's limit for one call
            self.mlflow.log_params(dict(items[start : start + 100]))

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(metrics), step=step, run_id=self.run.info.run_id)

    def close(self) -> None:
        self.mlflow.end_run("FAILED" if _is_failing() else "FINISHED")


KNOWN = {"wandb": WandB, "mlflow": MLflow}


class Trackers:
    """TensorBoard and the trackers that GRAM_TRACKERS names, as one tracker.

    Args:
        folder: the run's.
        settings: of the run, by their full keys.
        first: the first step that is logged now; an earlier part of the run may have logged it too.

    Raises:
        GramError: an unknown name, a package that is not installed, or a tracker that cannot begin.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], first: int = 0) -> None:
        self.all: list[Tracker] = []
        self.failed: list[Tracker] = []  # of `all`: they get no more numbers
        names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
        classes = {name: _class_of(name) for name in names}
        try:
            for name, make in classes.items():  # may refuse, before TensorBoard writes a file
                self.all.append(_begun(name, make, folder, settings))
            self.all.append(TensorBoard(folder, settings, first))
        except ImportError:
            print("TensorBoard is not installed: no scalars are written")
        except BaseException:
            self.close()
            raise

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        """Give numbers to all; one that fails, as without a network, is named in a note and gets no more of them."""
        for tracker in self.all:
            if tracker not in self.failed and not _is_done(tracker, tracker.log, step, metrics):
                self.failed.append(tracker)

    def close(self) -> None:
        """End all, TensorBoard last; one that fails is named in a note. A second call does nothing."""
        while self.all:
            tracker = self.all.pop(0)
            _is_done(tracker, tracker.close)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _is_failing() -> bool:
    """Return whether an error is ending the run."""
    return sys.exc_info()[0] is not None


def _is_done(tracker: Tracker, call: Callable[..., None], *values: Any) -> bool:
    """Call a tracker; return whether it did its work. An error of TensorBoard, as on a full disk, ends the run."""
    try:
        call(*values)
    except Exception as error:  # noqa: BLE001 - of packages and servers that are not ours
        if isinstance(tracker, TensorBoard):
            raise
        print(f"Note: {type(tracker).__name__} receives no more numbers of this run ({in_one_line(error)})")
        return False
    return True


def _begun(name: str, make: Callable[..., Tracker], folder: Path, settings: Mapping[str, Any]) -> Tracker:
    try:
        return make(folder, settings)
    except GramError:
        raise
    except Exception as error:  # noqa: BLE001 - of packages and servers that are not ours
        found = f"expected a tracker {name} that can begin, found an error ({in_one_line(error)})"
        raise GramError(f"{VARIABLE}: {found}; leave {name} out to run without it") from None


def _class_of(name: str) -> Any:
    if name in KNOWN:
        return KNOWN[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise GramError(f"{VARIABLE}: expected {', '.join(KNOWN)} or module:Class, found {name!r}")
    found = getattr(_import(module), attribute, None)
    if not callable(found):
        raise GramError(
            f"{VARIABLE}: expected a class {attribute} in {module}, found {'none' if found is None else found}"
        )
    return found


def _import(module: str) -> Any:
    path = list(sys.path)
    sys.path.append(os.getcwd())  # where a module of one's own may be; the path of the command `gram` lacks it
    try:
        return importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - of modules that are not ours
        found = "none" if isinstance(error, ImportError) else "one that cannot be imported"
        hint = f"; run pip install 'gram-meta[{module}]'" if module in KNOWN else ""
        what = f"expected the module {module}, found {found} ({in_one_line(error)})"
        raise GramError(f"{VARIABLE}: {what}{hint}") from None
    finally:
        sys.path[:] = path
