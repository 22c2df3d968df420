"""What a log.txt of a CoOp-style checkout says: arguments, configuration, results.

CoOp and its descendants (MaPLe, PromptSRC, ProMetaR, ...) print their arguments and Dassl's config before they begin, and
Dassl's evaluator prints what it measured. Nothing else is left of most published runs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gram_meta.config import flatten

# Dassl prints the first; parsers of some checkouts wait for the second, which older trainers print
_END = ("Finish training", "Finished training")
_SPLIT = re.compile(r"Evaluate on the \*(\w+)\* set|Do evaluation on (\w+) set")  # the second: older Dassl
_METRIC = re.compile(r"\* (total|correct|accuracy|error|macro_f1|average): ([\d.,eE+-]+)%?")
_EPOCH = re.compile(r"epoch \[(\d+)/\d+\]|\(epoch = (\d+)\)")
_ENTRY = re.compile(r"( *)([\w.]+):(?: (.*))?")
_NAMES = {"error": "error_rate", "average": "perclass_accuracy"}


@dataclass
class Result:
    """One evaluation: its split, and Dassl's metrics in percent. Accuracy and error rate are exact where counts are there."""

    split: str
    after_training: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Log:
    """One run's log; of a file that several runs have written to, the last one's.

    Attributes:
        arguments: the command line's flags by name.
        config: Dassl's config, nested.
        results: all evaluations, in order.
        trained: whether training ended.
        epoch: the last that was trained, or that was loaded; 0 where the log does not say.
    """

    path: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    trained: bool = False
    epoch: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The config's options by their full keys."""
        return flatten(self.config)

    @property
    def eval_only(self) -> bool:
        return bool(self.arguments.get("eval_only"))

    @property
    def final(self) -> Result | None:
        """The run's result: the last evaluation, which stands after training where the run trains. None: not finished."""
        whole = [it for it in self.results if "accuracy" in it.metrics and (self.eval_only or it.after_training)]
        return whole[-1] if whole else None


def read_log(path: Path) -> Log | None:
    """The run that a log is of; None where the file is no log of a CoOp-style run (or was cut before its config)."""
    with open(path, encoding="utf-8", errors="replace") as file:
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
    """`key: value` up to the headline of the config."""
    for line in lines:
        if line.strip("* ") == "Config":
            return
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(), _value(value.strip())


def _config(lines: Iterator[str]) -> dict[str, Any]:
    """What yacs prints of a config: two spaces more for each level, up to the first line that is no entry."""
    tree: dict[str, Any] = {}
    nodes: list[tuple[int, dict[str, Any]]] = [(-1, tree)]  # (indentation, node) from the top to where we are
    for line in lines:
        if not line.strip() or not line.strip("* "):
            continue
        entry = _ENTRY.fullmatch(line)
        if entry is None:
            break
        spaces, key, value = len(entry[1]), entry[2], entry[3]
        while nodes[-1][0] >= spaces:
            nodes.pop()
        if value is None:  # a node, or an empty text whose space an editor has removed: what follows tells
            nodes[-1][1][key] = {}
            nodes.append((spaces, nodes[-1][1][key]))
        else:
            nodes[-1][1][key] = _value(value)
    return _with_empty_texts(tree)


def _with_empty_texts(node: dict[str, Any]) -> dict[str, Any]:
    return {key: _with_empty_texts(it) or "" if isinstance(it, dict) else it for key, it in node.items()}


def _value(text: str) -> Any:
    """A value as Python prints it; words without quotes are text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | list | tuple | type(None)) else text


def _take(log: Log, line: str) -> None:
    """What one line adds to a run."""
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
    """Counts are whole numbers and make accuracy exact; the printed one has one decimal."""
    total, correct = metrics.get("total"), metrics.get("correct")
    if name in ("accuracy", "error") and total and correct is not None:
        exact = 100.0 * (correct if name == "accuracy" else total - correct) / total
        if abs(value - exact) < 0.0501:  # these are its counts
            value = exact
    metrics[_NAMES.get(name, name)] = value


def is_rounded(metrics: Iterable[str]) -> bool:
    """Whether accuracy was read with one decimal, for want of counts."""
    return not {"total", "correct"} <= set(metrics)
