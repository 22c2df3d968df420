"""Dassl's default options, extended in place, so that a train.py that knows nothing of this project has ours too.

CoOp's train.py asks Dassl for a copy of its defaults, adds options of its own, and merges two YAML files and KEY VALUE
pairs into it. After `extend_defaults()` that copy

- has this project's options; what the train.py adds, or replaces (`cfg.TRAINER.VPT = CN()`), is completed, not replaced;
- finds a config file of this package where there is none at that path, and says so;
- names the nearest known key when it meets an unknown one;
- has SEED 0 under `--seed 0`, which CoOp's `if args.seed` loses;
- has TRAINER.GRAM.CHECKPOINT from the environment variable GRAM_CHECKPOINT when `--trainer` is one with GRAM: a shell
  script that takes TRAINER and CFG alone has no other place for it.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from yacs.config import CfgNode

from gram_meta.config import current_key, did_you_mean, find_config, rename_old_keys
from gram_meta.engine.options import extend_cfg
from gram_meta.errors import GramError

CHECKPOINT_VARIABLE = "GRAM_CHECKPOINT"

# What yacs says of a key that it does not know, and of a value of another type
UNKNOWN = re.compile(r"Non-existent (?:config )?key: ([^\s'\"]+)")
MISMATCH = re.compile(r"Type mismatch \(<class '(?:[\w.]*\.)?(\w+)'> vs.* vs\. (.*)\) for config key: (\S+)", re.DOTALL)


def extend_defaults() -> None:
    """Extend the tree that every `get_cfg_default()` copies, whoever imported it when; a second time changes nothing."""
    from gram_meta import engine

    engine.room()  # opens the door
    tree = importlib.import_module("dassl.config.defaults")._C
    if not isinstance(tree, Defaults):
        object.__setattr__(tree, "__class__", Defaults)  # yacs takes an assignment for a new option
    extend_cfg(tree)


class Defaults(CfgNode):
    """The root of such a tree; its nodes stay ordinary ones."""

    def clone(self) -> Any:
        tree = super().clone()
        if not tree.is_frozen() and "TRAINER" in tree:
            _heed_command_line(tree)
        return tree

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        return CfgNode._decode_cfg_value(value)  # yacs merges nodes of one and the same class only

    def merge_from_file(self, cfg_filename: str) -> None:
        path = config_path(os.fspath(cfg_filename))
        self._complete()
        with self._clear_errors(path):
            super().merge_from_file(path)

    def merge_from_other_cfg(self, cfg_other: Any) -> None:
        rename_old_keys(cfg_other)
        super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        self._complete()
        words = [word if i % 2 else current_key(word) for i, word in enumerate(cfg_list)]
        with self._clear_errors("options"):
            super().merge_from_list(words)

    def _complete(self) -> None:
        if not self.is_frozen() and "TRAINER" in self:
            extend_cfg(self)

    @contextmanager
    def _clear_errors(self, source: str) -> Iterator[None]:
        """Yacs' errors as one sentence that names the source, the key and the nearest known one."""
        try:
            yield
        except (KeyError, AssertionError) as error:
            unknown = UNKNOWN.search(str(error))
            if unknown is None:
                raise
            hint = did_you_mean(unknown[1], _keys(self))
            raise GramError(f"{source}: unknown key {unknown[1]!r}{hint}") from None
        except ValueError as error:
            other = MISMATCH.search(str(error))
            if other is None:
                raise
            raise GramError(f"{source}: {other[3]}: expected {other[1]}, found {other[2]}") from None


def config_path(name: str) -> str:
    """The YAML file `name`: here, or by the same path or its bare name among this package's configs.

    Raises:
        GramError: neither here nor in the package; the nearest name in the package is named.
    """
    if os.path.exists(name):
        return name
    folders = ["/".join(filter(None, ("trainers", flag("--trainer")))), "datasets"]
    if name == flag("--dataset-config-file"):
        folders.reverse()
    problems = []
    for folder in folders:
        try:
            found = os.fspath(find_config(name, folder))
        except GramError as problem:
            problems.append(problem)
        else:
            print(f"Note: no file {name} here; taken from the package: {found}")
            return found
    raise problems[0]


def flag(name: str) -> str:
    """The value of a flag on this process's command line; "" where it has none."""
    words = [*sys.argv[1:], ""]
    for word, following in pairwise(words):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return ""


def _heed_command_line(tree: Any) -> None:
    if re.fullmatch(r"0+", flag("--seed")) and tree.SEED < 0:
        tree.SEED = 0
    checkpoint = os.environ.get(CHECKPOINT_VARIABLE, "")
    if checkpoint and not tree.TRAINER.GRAM.CHECKPOINT and _has_gram(flag("--trainer")):
        tree.TRAINER.GRAM.CHECKPOINT = checkpoint


def _has_gram(trainer: str) -> bool:
    """Whether a registered trainer of this name starts from a meta-checkpoint: one of ours, or somebody's own."""
    from gram_meta.engine import TRAINER_REGISTRY
    from gram_meta.method.dassl import WithGRAM

    return trainer in TRAINER_REGISTRY.registered_names() and issubclass(TRAINER_REGISTRY.get(trainer), WithGRAM)


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """Every key, those of nodes too."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
