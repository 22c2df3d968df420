"""What a run predicted for each test image."""

from pathlib import Path
from typing import Any

import numpy as np

from gram_meta.errors import GramError, in_one_line
from gram_meta.runs.layout import PREDICTIONS


def read_predictions(folder: Path, classes: int, most: int) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
    """Read predictions.parquet in a run's folder; raise `GramError` for a damaged one.

    Returns:
        The confusion matrix (classes, classes), numbers of images: row = label, column = prediction; and image, label,
        prediction and confidence of at most `most` wrong predictions, the most confident first. None without the file.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = folder / PREDICTIONS
    if not path.is_file():
        return None
    confusion = np.zeros((classes, classes), np.int64)
    try:
        table = pq.read_table(path).select(["image", "label", "prediction", "confidence"])
        np.add.at(confusion, (table["label"].to_numpy(), table["prediction"].to_numpy()), 1)
        wrong = table.filter(pc.not_equal(table["label"], table["prediction"]))
    except (OSError, pa.ArrowException, KeyError, IndexError) as error:
        found = in_one_line(error)
        raise GramError(f"{path}: expected predictions of {classes} classes, found another file ({found})") from None
    return confusion, wrong.sort_by([("confidence", "descending")]).slice(0, most).to_pylist()
