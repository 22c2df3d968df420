"""Reader of the log.txt of a CoOp-style checkout: arguments, configuration, results.

CoOp and its descendants (MaPLe, PromptSRC, ProMetaR, ...) print their arguments and Dassl's config before they begin,
and Dassl's evaluator prints what it measured. Nothing else is left of most published runs.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gram_meta.config import flatten
from gram_meta.errors import as_gram_error

# Dassl prints the first; older trainers print the second, and the parsers of some checkouts expect it
_END = ("Finish training", "Finished training")
_SPLIT = re.compile(r"Evaluate on the \*(\w+)\* set|Do evaluation on (\w+) set")  # the second: older Dassl
_METRIC = re.compile(r"\* (total|correct|accuracy|error|macro_f1|average): (\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?)%?")
_EPOCH = re.compile(r"epoch \[(\d+)/\d+\]|\(epoch = (\d+)\)")
_ENTRY = re.compile(r"( *)([\w.]+):(?: (.*))?")
_NAMES = {"error": "error_rate", "average": "perclass_accuracy"}


@dataclass
class Result:
    """An evaluation: its split, and Dassl's metrics in percent. Counts make accuracy and error rate exact."""

    split: str
    after_training: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Log:
    """The log of one run; if several runs have written to the file, of the last one."""

    path: Path
    arguments: dict[str, Any] = field(default_factory=dict)  # the command line's flags by name
    config: dict[str, Any] = field(default_factory=dict)  # Dassl's config, nested
    results: list[Result] = field(default_factory=list)  # all evaluations, in order
    trained: bool = False  # whether training ended
    epoch: int = 0  # the last trained or loaded epoch; 0 if the log names none

    @property
    def options(self) -> dict[str, Any]:
        """The config's options by their full keys."""
        return flatten(self.config)

    @property
    def eval_only(self) -> bool:
        return bool(self.arguments.get("eval_only"))

    @property
    def final(self) -> Result | None:
        """The last evaluation, after training if the run trains; None if the run has not finished."""
        whole = [it for it in self.results if "accuracy" in it.metrics and (self.eval_only or it.after_training)]
        return whole[-1] if whole else None


def read_log(path: Path) -> Log | None:
    """Read a log; return None if the file is no log of a CoOp-style run, or was cut before its config."""
    with as_gram_error(path, "cannot be read"), open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\r\n") for line in file]
    log = Log(path)
    rest = iter(lines)
    for line in rest:
        if line.strip("* ") == "Arguments":
            log = Log(path, arguments=dict(_flags(rest)))
            log.config = _config(rest)
        else:
            _take(log, line)
    return log if log.config else None


def _flags(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Yield the `key: value` lines up to the headline of the config."""
    for line in lines:
        if line.strip("* ") == "Config":
            return
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(), _value(value.strip())


def _config(lines: Iterator[str]) -> dict[str, Any]:
    """Read a config as yacs prints it, two spaces more for each level, up to the first line that is no entry."""
    tree: dict[str, Any] = {}
    nodes: list[tuple[int, dict[str, Any]]] = [(-1, tree)]  # (indentation, node) from the root to the current node
    for line in lines:
        if not line.strip() or not line.strip("* "):
            continue
        entry = _ENTRY.fullmatch(line)
        if entry is None:
            break
        spaces, key, value = len(entry[1]), entry[2], entry[3]
        while nodes[-1][0] >= spaces:
            nodes.pop()
        if value is None:  # a node, or an empty text whose space an editor has removed; the next lines decide
            nodes[-1][1][key] = {}
            nodes.append((spaces, nodes[-1][1][key]))
        else:
            nodes[-1][1][key] = _value(value)
    return _with_empty_texts(tree)


def _with_empty_texts(node: dict[str, Any]) -> dict[str, Any]:
    return {key: _with_empty_texts(it) or "" if isinstance(it, dict) else it for key, it in node.items()}


def _value(text: str) -> Any:
    """Return the value of a Python literal; words without quotes are text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | list | tuple | type(None)) else text


def _take(log: Log, line: str) -> None:
    """Add the content of one line to a log."""
    line = line.strip()
    if line in _END:
        log.trained = True
    elif match := _SPLIT.search(line):
        log.results.append(Result(match[1] or match[2], log.trained))
    elif line == "=> result":
        if not log.results or log.results[-1].metrics:  # a log that names no split
            log.results.append(Result("test", log.trained))
    elif (match := _METRIC.fullmatch(line)) and log.results:
        _measure(log.results[-1].metrics, match[1], float(match[2].replace(",", "")))
    elif match := _EPOCH.search(line):
        log.epoch = int(match[1] or match[2])


def _measure(metrics: dict[str, float], name: str, value: float) -> None:
    """Add a metric; the counts make accuracy exact, which is printed with one decimal."""
    total, correct = metrics.get("total"), metrics.get("correct")
    if name in ("accuracy", "error") and total and correct is not None:
        exact = 100.0 * (correct if name == "accuracy" else total - correct) / total
        if abs(value - exact) < 0.0501:  # these are its counts
            value = exact
    metrics[_NAMES.get(name, name)] = value


def is_rounded(metrics: Iterable[str]) -> bool:
    """Return whether accuracy has one decimal only, because the counts are missing."""
    return not {"total", "correct"} <= set(metrics)
