"""Draw the packages of gram_meta and the imports between them to docs/architecture.svg.

Each row is a layer; a package imports only from rows below its own. An arrow that another path of arrows already
implies is left out. `--check` writes nothing and exits with 1 if the file differs from what would be drawn.
"""

import argparse
import ast
import sys
from pathlib import Path

import networkx
from jinja2 import Environment

ROOT = Path(__file__).resolve().parent.parent

# Top row first, as in the layers contract of pyproject.toml. A package not named here is an error.
LAYERS: list[dict[str, str]] = [
    {"commands": "one file per command"},
    {"api": "the Python API", "demo": "the emoji world"},
    {"bench": "many runs", "tools": "predict, interpret, export, ..."},
    {"trainers": "nine Dassl trainers", "report": "tables, figures, pages"},
    {"cli": "the command gram", "plugin": "the import line"},
    {"coop": "hooks into a checkout"},
    {"runs": "what a run folder holds"},
    {"method": "the paper: prompts to meta-training"},
    {"clustering": "topics and domains (CHC)", "datasets": "fifteen datasets"},
    {"corpus": "image-text pairs, the pair store"},
    {"engine": "the adapter to Dassl", "backbone": "CLIP and its towers"},
    {"ground": "errors, files, config, processes, ..."},
]
GROUND = {"errors", "files", "images", "locks", "config", "hooks", "processes", "progress", "intervals"}
GROUND |= {"random_state", "trackers"}
SHIMS = {"_moved", "regulation", "checkpoint", "prompts", "predict", "__init__", "__main__"}


def sources() -> dict[str, list[Path]]:
    """Return Python files by package (a folder, or a module at the top of gram_meta)."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*ROOT.glob("gram_meta/**/*.py"), *ROOT.glob("trainers/*.py"), *ROOT.glob("datasets/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = parts[1] if parts[0] == "gram_meta" else parts[0]
        if name not in SHIMS:
            found.setdefault("ground" if name in GROUND else name, []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """Return the packages of gram_meta that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    packages = {name.split(".")[1] for name in names if name.startswith("gram_meta.")}
    return {"ground" if name in GROUND else name for name in packages}


def arrows(files: dict[str, list[Path]]) -> list[tuple[str, str]]:
    """Return (importer, imported) between packages, without those that a longer path implies."""
    graph = networkx.DiGraph()
    for name, paths in files.items():
        others = set().union(*map(imported, paths)) & files.keys() - {name}
        graph.add_edges_from((name, other) for other in others)
    return sorted(networkx.transitive_reduction(graph).edges)


def draw() -> str:
    files = sources()
    if unplaced := set(files).difference(*LAYERS):
        sys.exit(f"scripts/draw_architecture.py: expected every package in LAYERS, found {', '.join(sorted(unplaced))}")
    template = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True).from_string(
        Path(__file__).with_name("architecture.svg.jinja").read_text("utf-8")
    )
    layers = [{name: title for name, title in layer.items() if name in files} for layer in LAYERS]
    return template.render(layers=layers, arrows=arrows(files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is out of date")
    check, path, picture = parser.parse_args().check, ROOT / "docs" / "architecture.svg", draw()
    if not check:
        path.write_text(picture, encoding="utf-8")
    elif not path.is_file() or path.read_text("utf-8") != picture:
        sys.exit(f"{path}: out of date; run python scripts/draw_architecture.py")


if __name__ == "__main__":
    main()
