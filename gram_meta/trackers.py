"""Where the numbers of a run go while it runs: TensorBoard, Weights & Biases, MLflow, or an object of your own.

A tracker receives `log(step, metrics)` for every number that a run writes, and `close()` at its end. TensorBoard is
the first; GRAM_TRACKERS names further ones: "wandb", "mlflow", or "module:Class" for a class that is called with
the run's folder and its settings. docs/guide/runs.md shows an example.
"""

import importlib
import os
from collections.abc import Mapping
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
    """Writes scalars to `<folder>/tensorboard`; of a run that is resumed, those after step `first` are purged."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], first: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Logs to Weights & Biases; WANDB_PROJECT and its other variables choose the project and the mode."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb = _import("wandb")
        self.run = wandb.init(name=str(folder), dir=str(folder), config=dict(settings))
        self.run.define_metric("*", step_metric="step")  # tests have steps of their own, which W&B's may not go back to

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        self.run.log({**metrics, **({} if step is None else {"step": step})})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """Logs to MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME choose the place."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.mlflow = _import("mlflow")
        self.mlflow.start_run(run_name=str(folder))
        items = [(name, str(value)[:LONGEST]) for name, value in settings.items()]
        for start in range(0, len(items), 100):  # MLflow's limit for one call
            self.mlflow.log_params(dict(items[start : start + 100]))

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({name: float(value) for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


KNOWN = {"wandb": WandB, "mlflow": MLflow}


class Trackers:
    """TensorBoard and the trackers that GRAM_TRACKERS names, as one tracker.

    Args:
        folder: the run's.
        settings: of the run, by their full keys.
        first: the step after which a resumed run goes on.

    Raises:
        GramError: an unknown name, or a package that is not installed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], first: int = 0) -> None:
        names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
        classes = [_class_of(name) for name in names]
        self.all: list[Tracker] = [make(folder, settings) for make in classes]  # may refuse, before a file is written
        try:
            self.all.insert(0, TensorBoard(folder, settings, first))
        except ImportError:
            print("TensorBoard is not installed: no scalars are written")

    def log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        """Give numbers to all; one that fails, as without a network, is named in a note and gets no more of them."""
        for tracker in list(self.all):
            try:
                tracker.log(step, metrics)
            except Exception as error:  # noqa: BLE001 - of packages and servers that are not ours
                if isinstance(tracker, TensorBoard):  # a full disk, or no right to write
                    raise
                self.all.remove(tracker)
                print(f"Note: {type(tracker).__name__} receives no more numbers of this run ({in_one_line(error)})")

    def close(self) -> None:
        for tracker in self.all:
            tracker.close()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _class_of(name: str) -> Any:
    if name in KNOWN:
        return KNOWN[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise GramError(f"{VARIABLE}: expected {', '.join(KNOWN)} or module:Class, found {name!r}")
    found = getattr(_import(module), attribute, None)
    if found is None:
        raise GramError(f"{VARIABLE}: expected a class {attribute} in {module}, found none")
    return found


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = f"; run pip install 'gram-meta[{module}]'" if module in KNOWN else ""
        raise GramError(f"{VARIABLE}: expected the module {module}, found none ({error}){hint}") from None
