"""Exit 0 if this repository is installed, editable and with all requirements of EXTRA; else print what is missing.

Usage: python scripts/installed.py EXTRA

The requirements are read from setup.py itself, so a change there is noticed, and so is a package that was removed.
"""

import importlib.util
import json
import runpy
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent


def declared() -> dict:
    """Return the keyword arguments that setup.py passes to `setup`."""
    import setuptools

    captured: dict = {}
    setuptools.setup = lambda **keywords: captured.update(keywords)
    runpy.run_path(str(ROOT / "setup.py"))
    return captured


def missing(extra: str) -> str:
    """Return a sentence on what differs from setup.py; empty if nothing does."""
    try:
        from packaging.requirements import Requirement

        wanted = declared()
    except ImportError as error:
        return f"{error.name} is not installed"
    project = f"{wanted['name']}=={wanted['version']}"
    for line in (project, *wanted["install_requires"], *wanted["extras_require"][extra]):
        requirement = Requirement(line)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            return f"{requirement.name} is not installed"
        if not requirement.specifier.contains(version, prereleases=True):
            return f"expected {line}, found {version}"
    return missing_project(wanted)


def missing_project(wanted: dict) -> str:
    """Return the same for the project itself: this checkout, editable, every mapped package found."""
    source = json.loads(metadata.distribution(wanted["name"]).read_text("direct_url.json") or "{}").get("url", "")
    if not source or Path(unquote(urlparse(source).path)).resolve() != ROOT:
        return f"{wanted['name']} is installed from {source or 'a package index'}, not from {ROOT}"
    lost = [name for name in wanted["packages"] if importlib.util.find_spec(name) is None]
    return f"{', '.join(lost)} cannot be imported" if lost else ""


if __name__ == "__main__":
    sys.path.pop(0)  # this folder; nothing here may be imported by accident
    lacking = missing(sys.argv[1])
    if lacking:
        sys.exit(f"{sys.executable}: {lacking}")
