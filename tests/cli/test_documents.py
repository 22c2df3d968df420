"""The documents: every link leads somewhere, and every option of a command exists."""

import argparse
import functools
import importlib
import re
from pathlib import Path

import pytest

from gram_meta import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in ("docs", "gram_meta") for page in (ROOT / name).rglob("*.md"))])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(linked), f"{target}: no heading has this anchor"


@functools.cache
def options() -> dict[str, set[str]]:
    """Return the options of each command of `gram`."""
    found = {}
    for name in cli.COMMANDS:
        parser = argparse.ArgumentParser(add_help=name != "train")
        importlib.import_module(f"gram_meta.commands.{name.replace('-', '_')}").add_arguments(parser)
        found[name] = set(parser._option_string_actions)
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options(page):
    known = options()
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            line = re.sub(r'"[^"]*"', "TEXT", line.split(" #")[0])
            for name, rest in re.findall(r"(?:\bgram|-m gram_meta) ([a-z-]+)((?: [^;&|)]+)?)", line):
                assert name in known, f"gram {name}: no such command"
                unknown = set(re.findall(r"(?<=\s)-{1,2}[a-z][\w-]*", rest)) - known[name]
                assert not unknown, f"gram {name}: no option {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_of_scripts(page):
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        block = re.sub(r'([A-Z]+)="(.*?)"\n(.*)', _replaced, re.sub(r"\\\n", " ", block), flags=re.DOTALL)
        for script, rest in re.findall(r"\b(?:python|bash) ((?:scripts|tests)/[\w/.]+)([^\n#;]*)", block):
            path = ROOT / script
            assert path.exists(), f"{script} does not exist"
            folder = path if path.is_dir() else path.parent
            code = "".join(
                file.read_text(encoding="utf-8") for file in folder.iterdir() if file.suffix in {".py", ".sh"}
            )
            unknown = [option for option in re.findall(r"(?<=\s)--[a-z][\w-]*", rest) if option not in code]
            assert not unknown, f"{script}: no option {unknown}"


def _replaced(assignment: re.Match) -> str:
    """Return a block with the value in the place of a shell variable."""
    name, value, rest = assignment.groups()
    return rest.replace("$" + name, value)
