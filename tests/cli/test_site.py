"""The documentation as a site: its navigation, and the pages that `mkdocs build` writes."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import gram_meta

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(page for folder in ("docs", "gram_meta") for page in (ROOT / folder).rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
API = ROOT / "docs" / "reference" / "api.md"


def pages_of(entry):
    """Yield the pages of a piece of the navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(part)


def test_the_navigation_has_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load("nav:" + text.partition("\nnav:")[2])["nav"]
    assert sorted(pages_of(nav)) == sorted(NAMES)


def test_the_index_links_every_page():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / path).resolve() for path in re.findall(r"\]\(([^)#\s]+)", index.read_text("utf-8"))}
    assert {page for page in PAGES if page.is_relative_to(index.parent)} <= linked | {index}


def test_the_reference_has_every_public_name_once():
    names = re.findall(r"^::: gram_meta\.(\w+)$", API.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted([*names, "__version__"]) == sorted(gram_meta.__all__)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_further_block_of_a_list_item_has_four_spaces(page):
    """Python-Markdown ends the list at a block with two or three, which GitHub takes as part of the item."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\n\s*\n {1,3}\S.*", text)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a strict build."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def built(site, page):
    """Return the path and the text of a page of the site."""
    path = site / page.relative_to(ROOT).with_name(page.name.replace("README", "index")).with_suffix(".html")
    return path, path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_loads_and_links_is_a_file_of_the_site(site, page):
    path, text = built(site, page)
    loaded = re.findall(r'<(?:script|img|source)\b[^>]*?\ssrc="?([^"\s>]+)', text)
    loaded += re.findall(r'<link\b[^>]*?rel="?(?:stylesheet|icon)\b[^>]*?href="?([^"\s>]+)', text)
    assert loaded and not [target for target in loaded if urlsplit(target).netloc]
    for target in loaded + re.findall(r'<a\b[^>]*?\shref="?([^"\s>]+)', text):
        parts = urlsplit(html.unescape(target))
        if not parts.scheme:
            linked = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert (linked / "index.html" if linked.is_dir() else linked).is_file(), target


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != API], ids=str)
def test_blocks_of_code_and_tables_are_those_of_the_page(site, page):
    source, text = page.read_text(encoding="utf-8"), built(site, page)[1]
    assert "theta<em>" not in text
    assert text.count("<pre") == len(re.findall(r"^ *```\w+$", source, re.MULTILINE))
    assert text.count("<table>") == len(re.findall(r"^ *\|[ :|-]*--[ :|-]*\|$", source, re.MULTILINE))


@pytest.mark.slow
def test_the_reference_shows_signatures_fields_and_sections(site):
    page = built(site, API)[1]
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "load(path: PathLike) -> MetaCheckpoint" in re.sub(r"\s+", " ", text).replace("( ", "(").replace(" )", ")")
    assert "theta*, float32, (M, d) by kind" in text and "quantiles of the raw support gradient's norm" in text
    assert 'id="gram_meta.Regulation.attach"' in page and "_before_step" not in text
    assert not re.search(r"^\s*(Args|Returns|Raises|Attributes|Yields):\s*\n\s+\w+: ", text, re.MULTILINE)
