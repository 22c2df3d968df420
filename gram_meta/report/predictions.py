"""What a run predicted for each test image: accuracy of each class, confusions, and images that it got wrong."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gram_meta.errors import GramError, in_one_line
from gram_meta.runs.layout import PREDICTIONS


@dataclass(frozen=True)
class Predictions:
    """The test of one run: K classes, n images."""

    names: list[str]  # of the classes, by label
    confusion: np.ndarray  # (K, K), counts: row = label, column = prediction
    wrong: list[tuple[str, int, int, float]]  # image, label, prediction, confidence; the most confident first

    @property
    def classes(self) -> list[tuple[int, int, int, int]]:
        """Label, images, correct ones, and the class most images are mistaken for; the lowest accuracy first."""
        images, correct, mistakes = self.confusion.sum(1), self.confusion.diagonal(), self.mistakes
        order = np.argsort(correct / images.clip(1), kind="stable")
        return [(int(k), int(images[k]), int(correct[k]), int(mistakes[k].argmax())) for k in order if images[k]]

    @property
    def mistakes(self) -> np.ndarray:
        """The confusion without the correct predictions."""
        return self.confusion - np.diag(self.confusion.diagonal())

    def pairs(self, most: int) -> list[tuple[int, int, int]]:
        """Return label, prediction and count of the most frequent mistakes."""
        counts = self.mistakes
        places = np.argsort(-counts, axis=None, kind="stable")[:most]
        found = zip(*np.unravel_index(places, counts.shape), strict=True)
        return [(int(a), int(b), int(counts[a, b])) for a, b in found if counts[a, b]]


def read_predictions(folder: Path, names: list[str]) -> Predictions | None:
    """Return the predictions in a run's folder, of classes with these names; None if the run recorded none.

    Raises:
        GramError: a damaged file, or one of other classes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / PREDICTIONS
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        columns = ("image", "label", "prediction", "confidence")
        images, labels, predicted, confidence = (table[name].to_numpy() for name in columns)
        confusion = np.zeros((len(names), len(names)), np.int64)
        np.add.at(confusion, (labels, predicted), 1)
    except (OSError, pa.ArrowException, KeyError, IndexError) as error:
        found = in_one_line(error)
        raise GramError(f"{path}: expected predictions of {len(names)} classes, found another file ({found})") from None
    wrong = np.flatnonzero(labels != predicted)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    rows: Any = zip(images[wrong], labels[wrong].tolist(), predicted[wrong].tolist(), confidence[wrong], strict=True)
    return Predictions(names, confusion, [(str(a), b, c, float(d)) for a, b, c, d in rows])
