"""Numbers of tiny meta-trainings and trainings: whoever changes the mathematics changes these.

On one machine they repeat to the last bit. Other processors round another way: with the vector instructions of another
processor (ATEN_CPU_CAPABILITY) they differ by less than 1e-4 of their size, so 1e-3 is allowed.
"""

import json
import re

import pytest

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3


def test_features(made, golden, fingerprint):
    """Features of the store; those of images are stored in half precision."""
    import numpy as np
    import torch

    names = ("image_features", "sentence_features", "similarity")
    arrays = {name: torch.from_numpy(np.load(made.root / f"store/{name}.npy").astype(np.float64)) for name in names}
    golden.numbers("numbers_store.json", {name: fingerprint(array) for name, array in arrays.items()}, TOLERANCE)


def test_meta_trainings(made, golden, fingerprint):
    """Held-out scores, prompts, regulator and quantiles of gradient norms."""
    found = {}
    for path in sorted((made.root / "meta").iterdir()):
        if path.name == "profiled":
            continue
        metadata, tensors = made.safetensors(f"meta/{path.name}/last.safetensors")
        (facts,) = (json.loads(value) for value in metadata.values())
        rows = made.json_lines(f"meta/{path.name}/log.jsonl")
        found[path.name] = {
            "tensors": {name: fingerprint(tensors[name]) for name in sorted(tensors)},
            "scores": {
                key: [row[key] for row in rows] for key in rows[0] if not key.startswith(("path_beta", "spread"))
            },
            "gradient_norms": facts["gradient_norms"],
        }
    golden.numbers("numbers_meta.json", found, TOLERANCE)


def test_adaptation_on_held_out_tasks(made, golden):
    """`gram eval-meta --json`: everything in it that is a number."""
    golden.numbers("numbers_eval_meta.json", _numbers_of(json.loads(made.printed["eval-meta"])), TOLERANCE)


def test_trainings(made, golden, fingerprint):
    """Losses and learning rates as the log prints them, metrics, the regulator's summary, and what is learned."""
    found = {}
    for path in sorted((made.root / "runs").iterdir()):
        results = made.json(f"runs/{path.name}/results.json")
        log = (path / "log.txt").read_text(encoding="utf-8")
        steps = re.findall(r"^epoch .* loss (\S+) .* lr (\S+) eta", log, re.MULTILINE)
        found[path.name] = {
            "losses": [float(loss) for loss, _ in steps],
            "learning_rates": [float(rate) for _, rate in steps],
            "metrics": results["metrics"],
            "regulator": results["regulator"],
            "curve": _numbers_of(results["curve"]),
        }
        if steps:
            state = made.torch(f"runs/{path.name}/prompt_learner/model.pth.tar-2")["state_dict"]
            found[path.name]["tensors"] = {name: fingerprint(value) for name, value in sorted(state.items())}
    golden.numbers("numbers_runs.json", found, TOLERANCE)


def test_predictions(made, golden):
    rows = json.loads(made.printed["predict"])
    found = {
        row["image"].rpartition("/")[2]: {entry["class"]: entry["probability"] for entry in row["classes"]}
        for row in rows
    }
    golden.numbers(
        "numbers_predict.json", {name: dict(sorted(row.items())) for name, row in sorted(found.items())}, TOLERANCE
    )


def _numbers_of(value):
    """The same without texts and nulls."""
    if isinstance(value, dict):
        return {key: _numbers_of(inner) for key, inner in value.items() if isinstance(inner, dict | list | int | float)}
    if isinstance(value, list):
        return [_numbers_of(inner) for inner in value if isinstance(inner, dict | list | int | float)]
    return value
