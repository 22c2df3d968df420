"""The names of the files in the folder of a meta-training, and whether it is finished. Light at import: no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gram_meta.files import parse_json, read_text

BEST = "best.safetensors"  # the meta-checkpoint with the lowest loss after adaptation on the held-out tasks
LAST = "last.safetensors"  # the meta-checkpoint of the last evaluation
STATE = "state.pt"  # theta, phi, optimiser and records, for --resume
FACTS = "run.json"  # the identity of the run: settings, store, hierarchy
LOG = "log.jsonl"  # scores of the held-out tasks, a line for each evaluation
PROFILE = "profile.json"


def is_finished(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether the meta-training in a folder has evaluated its last step.

    Args:
        config: the settings in its run.json, nested.

    Raises:
        GramError: a last line of the log that is whole, but no JSON object.
    """
    log = folder / LOG
    lines = read_text(log).splitlines() if log.is_file() else []
    whole = bool(lines) and lines[-1].endswith("}")  # a kill may have cut it off
    last = parse_json(lines[-1], str(log), dict[str, Any]).get("step") if whole else None
    return (folder / BEST).is_file() and last == config.get("OUTER", {}).get("STEPS")
