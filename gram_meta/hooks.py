"""The switches of every hook: a place where this package changes how code outside it behaves.

gram_meta/coop/HOOKS.md describes each hook. The environment variable GRAM_HOOKS switches hooks off; its words stand
between commas or spaces and are applied in order: `-NAME` switches a hook off, `NAME` on, `none` all of them off.

    GRAM_HOOKS=-excepthook,-seed-zero       all hooks but these two
    GRAM_HOOKS=none,answer-as-dassl         this one alone
"""

import os

from gram_meta.errors import GramError

VARIABLE = "GRAM_HOOKS"

HOOKS = {
    "checkout-train-py": "`gram train`, started in a checkout, runs the checkout's train.py",
    "checkout-folders": "the folders of a script that `gram` runs win over installed packages of the same names",
    "excepthook": "an uncaught GramError ends a program with one line instead of a traceback",
    "default-options": "Dassl's default config tree has this project's options; the five hooks below need it",
    "config-files": "a config file that is missing at its path is taken from the package",
    "config-errors": "an unknown option or a value of the wrong type is one sentence",
    "seed-zero": "`--seed 0` sets SEED 0",
    "checkpoint-variable": "GRAM_CHECKPOINT sets TRAINER.GRAM.CHECKPOINT",
    "packaged-clip": "the `clip` of a checkout knows the packaged CLIP, `gram-small`",
    "give-way": "a checkout's trainer or dataset replaces this project's of the same name in Dassl's registries",
    "missing-packages": "a checkout's trainer that lacks a package is left out when another trainer is asked for",
    "answer-as-dassl": "the built-in engine can be imported as `dassl`",
    "dassl-fixes": "known faults of the installed Dassl are repaired in memory",
    "log-copy": "a resumed run under a foreign train.py also appends what it prints to log.txt",
    "hugging-face-datasets": "a checkout's datasets/ is hidden while sentence-transformers is imported",
}


def is_on(name: str) -> bool:
    """Return whether the hook `name` is switched on; every hook is, unless GRAM_HOOKS switches it off."""
    assert name in HOOKS, name
    on = True
    for word in _words():
        if word.removeprefix("-") in (name, "none"):
            on = word == name
    return on


def check() -> None:
    """Raise a `GramError` if GRAM_HOOKS holds a word that is no hook."""
    for word in _words():
        if word != "none" and word.removeprefix("-") not in HOOKS:
            from gram_meta.config import did_you_mean

            hint = did_you_mean(word.removeprefix("-"), HOOKS) or f"; known: {', '.join(HOOKS)}"
            raise GramError(f"{VARIABLE}: expected hooks' names, each perhaps with '-', or none; found {word!r}{hint}")


def _words() -> list[str]:
    return os.environ.get(VARIABLE, "").replace(",", " ").split()
