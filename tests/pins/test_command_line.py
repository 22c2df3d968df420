"""The command line, read from argparse's actions: what `--help` prints of them differs between Python's versions.

cli_flags.json has the flags, kinds, defaults and choices; cli_help.txt has every text, so that a rewording changes that
file alone.
"""

import argparse
import json
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

COMMANDS = (
    *(
        "embed",
        "cluster",
        "inspect",
        "check-overlap",
        "pretrain",
        "eval-meta",
        "check-data",
        "train",
        "bench",
        "report",
    ),
    *("predict", "interpret", "export", "estimate", "doctor", "demo"),
)


class _Seen(Exception):
    """Ends `main` once its parser is known."""


@pytest.fixture(scope="module")
def parsers():
    """The top parser, under "", and that of each command."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:

        def see(parser, args=None, namespace=None):
            found["seen"] = parser
            raise _Seen

        patch.setattr(argparse.ArgumentParser, "parse_known_args", see)
        from gram_meta.cli import main

        for command in ("", *COMMANDS):
            with pytest.raises(_Seen):
                main([command] if command else [])
            top = found.pop("seen")
            found[command] = subparsers(top)[command] if command else top
    return found


def subparsers(parser) -> dict:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def flags_of(parser) -> dict:
    """What the flags mean, without any text."""
    groups = [[action.dest for action in group._group_actions] for group in parser._mutually_exclusive_groups]
    return {
        "flags": {name_of(action): flag(action) for action in parser._actions},
        "positionals": [action.dest for action in parser._actions if not action.option_strings],
        "exclusive": groups,
    }


def flag(action) -> dict:
    facts = {
        "dest": action.dest,
        "action": type(action).__name__.removeprefix("_").removesuffix("Action"),
        "nargs": action.nargs,
        "const": action.const,
        "default": action.default,
        "type": getattr(action.type, "__name__", action.type),
        "choices": list(action.choices) if action.choices is not None else None,
        "required": action.required if action.option_strings else None,  # else nargs decides
    }
    return json.loads(json.dumps({key: value for key, value in facts.items() if value is not None}))


def name_of(action) -> str:
    return " ".join(action.option_strings) or action.dest


def texts_of(parser) -> str:
    lines = [parser.description or ""]
    for action in parser._actions:
        metavar = f" {action.metavar}" if action.metavar is not None else ""
        lines.append(f"\n  {name_of(action)}{metavar}\n      {action.help}")
        if isinstance(action, argparse._SubParsersAction):
            lines += [f"        {choice.dest}: {choice.help}" for choice in action._choices_actions]
    if parser.epilog:
        lines.append(f"\n{parser.epilog}")
    return "\n".join(lines)


def test_commands(parsers):
    assert tuple(subparsers(parsers[""])) == COMMANDS


def test_flags(parsers, golden):
    golden.json("cli_flags.json", {f"gram {command}".strip(): flags_of(parser) for command, parser in parsers.items()})


def test_texts(parsers, golden):
    parts = [f"=== gram {command}".strip() + f"\n\n{texts_of(parser)}\n" for command, parser in parsers.items()]
    golden.text("cli_help.txt", "\n\n".join(parts))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_printed(command, capsys):
    """Without an error, on stdout, and with every flag that has a text."""
    from gram_meta.cli import main

    with pytest.raises(SystemExit) as end:
        main([command, "--help"] if command else ["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: gram {command}".rstrip()) and not printed.err


def test_train_py_has_the_flags_of_gram_train(parsers):
    """`train.py` of the repository, as CoOp's scripts call it."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:

        def see(parser, args=None, namespace=None):
            found["parser"] = parser
            raise _Seen

        patch.setattr(argparse.ArgumentParser, "parse_known_args", see)
        with pytest.raises(_Seen):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert flags_of(found["parser"]) == flags_of(parsers["train"])
