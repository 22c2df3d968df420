"""Dassl's default options, extended in place, so that a train.py that knows nothing of this project has its options.

CoOp's train.py asks Dassl for a copy of its defaults, adds options of its own, and merges two YAML files and KEY VALUE
pairs into it. After `extend_defaults()` that copy has this project's options, takes config files of this package, names
the nearest key in errors, and follows `--seed 0` and GRAM_CHECKPOINT: the hook default-options in HOOKS.md, and the
five that need it.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from yacs.config import CfgNode

from gram_meta import config, hooks
from gram_meta.coop.command_line import CommandLine
from gram_meta.coop.packaged_clip import offer_packaged_clip
from gram_meta.engine import dassl_module
from gram_meta.engine.options import extend_cfg
from gram_meta.errors import GramError
from gram_meta.files import expand_home

CHECKPOINT_VARIABLE = "GRAM_CHECKPOINT"

# yacs' messages about a key that it does not know, and about a value of another type
UNKNOWN = re.compile(r"Non-existent (?:config )?key: ([^\s'\"]+)")
MISMATCH = re.compile(r"Type mismatch \(<class '(?:[\w.]*\.)?(\w+)'> vs.* vs\. (.*)\) for config key: (\S+)", re.DOTALL)


def extend_defaults(command_line: CommandLine | None = None) -> CommandLine:
    """Extend the tree that every `get_cfg_default()` copies; return the command line that copies follow.

    None stands for that of an earlier call, at first the process's own.
    """
    Defaults.command_line = command_line or Defaults.command_line or CommandLine.parse(sys.argv[1:])
    if hooks.is_on("default-options"):
        tree = dassl_module("dassl.config.defaults")._C
        object.__setattr__(tree, "__class__", Defaults)  # yacs takes an assignment for a new option
        extend_cfg(tree)
    return Defaults.command_line


class Defaults(CfgNode):
    """The root of the extended tree; its nodes are ordinary ones."""

    command_line: ClassVar[CommandLine | None] = None  # a class attribute, so that copies made earlier follow it too

    def clone(self) -> Any:
        tree = super().clone()
        offer_packaged_clip()  # now: a train.py has imported its trainers, and these have imported its clip
        if not tree.is_frozen() and "TRAINER" in tree:
            follow_command_line(tree, self.command_line or CommandLine())
        return tree

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        return CfgNode._decode_cfg_value(value)  # yacs merges nodes of one and the same class only

    def merge_from_file(self, cfg_filename: str) -> None:
        path = os.fspath(cfg_filename)
        if hooks.is_on("config-files"):
            path = config_path(path, self.command_line or CommandLine())
        self._complete()
        with self._clear_errors(path):
            super().merge_from_file(path)

    def merge_from_other_cfg(self, cfg_other: Any) -> None:
        config.rename_old_keys(cfg_other)
        config.expand_homes(cfg_other)
        super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        self._complete()
        if hooks.is_on("config-errors"):
            config.refuse_flags([word for word in cfg_list if isinstance(word, str)])
        words = [expand_home(word) if i % 2 else config.current_key(word) for i, word in enumerate(cfg_list)]
        with self._clear_errors("options"):
            super().merge_from_list(words)

    def _complete(self) -> None:
        if not self.is_frozen() and "TRAINER" in self:
            extend_cfg(self)

    @contextmanager
    def _clear_errors(self, source: str) -> Iterator[None]:
        """Turn yacs' errors into one sentence that names the source, the key and the nearest known key."""
        try:
            yield
        except (KeyError, AssertionError, ValueError) as error:
            sentence = _sentence(error, self) if hooks.is_on("config-errors") else ""
            if not sentence:
                raise
            raise GramError(f"{source}: {sentence}") from None


def _sentence(error: Exception, tree: Any) -> str:
    if isinstance(error, ValueError):
        mismatch = MISMATCH.search(str(error))
        return f"{mismatch[3]}: expected {mismatch[1]}, found {mismatch[2]}" if mismatch else ""
    unknown = UNKNOWN.search(str(error))
    if not unknown:
        return ""
    known = [name for key in config.flatten(tree) for name in (key, key.rpartition(".")[0])]  # options and their nodes
    return f"unknown key {unknown[1]!r}{config.did_you_mean(unknown[1], known)}"


def config_path(name: str, command_line: CommandLine) -> str:
    """Return the YAML file `name`, or, if it does not exist, the one of that path or bare name in configs/.

    The checkout's configs/ comes before the package's. A trainer with GRAM on a trainer of the checkout takes the
    files of that trainer, too. The file that is taken is printed. Raises `GramError` for no such file; an unknown
    `--trainer`, or else the nearest name in the package, is named.
    """
    from gram_meta.engine import TRAINER_REGISTRY

    if os.path.exists(name) and not os.path.isdir(name):
        return name
    project = Path("." if Path("configs").is_dir() else os.path.dirname(sys.argv[0]))
    folders = ["/".join(filter(None, ("trainers", command_line.trainer))), "datasets"]
    if name == command_line.dataset_config_file:
        folders.reverse()
    places = [(name, folder) for folder in folders]
    if hasattr(trainer := _registered(command_line.trainer), "checkout_class"):
        places.append((os.path.basename(name), f"trainers/{trainer.checkout_class().__name__}"))
    problems = []
    for wanted, folder in places:
        try:
            found = config.find_config(wanted, folder, project)
        except GramError as problem:
            problems.append(problem)
        else:
            place = "this checkout" if found.is_relative_to(project) else "the package"
            print(f"Note: no file {name} here; taken from {place}: {found}")
            return os.fspath(found)
    if command_line.trainer and folders[0] != "datasets":
        config.check_known("--trainer", "trainer", command_line.trainer, TRAINER_REGISTRY.registered_names())
    raise problems[0]


def follow_command_line(tree: Any, command_line: CommandLine) -> None:
    """Set SEED 0 and TRAINER.GRAM.CHECKPOINT in a config tree where the command line and the environment ask for it."""
    if hooks.is_on("seed-zero") and re.fullmatch(r"0+", command_line.seed) and tree.SEED < 0:
        tree.SEED = 0
    checkpoint = os.environ.get(CHECKPOINT_VARIABLE, "") if hooks.is_on("checkpoint-variable") else ""
    if checkpoint and not tree.TRAINER.GRAM.CHECKPOINT and _has_gram(command_line.trainer):
        tree.TRAINER.GRAM.CHECKPOINT = expand_home(checkpoint)


def _has_gram(trainer: str) -> bool:
    """Return whether a registered trainer of this name starts from a meta-checkpoint: this project's or another one."""
    from gram_meta.method.dassl import WithGRAM

    return issubclass(_registered(trainer) or object, WithGRAM)


def _registered(trainer: str) -> Any:
    """Return the class that is registered under this name; None if there is none."""
    from gram_meta.engine import TRAINER_REGISTRY

    return TRAINER_REGISTRY.get(trainer) if trainer in TRAINER_REGISTRY.registered_names() else None
