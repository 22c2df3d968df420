"""Draw the packages of gram_meta and the imports between them to docs/architecture.svg.

Each row is a layer; a package imports only from rows below its own. An arrow that another path of arrows already
implies is left out. `--check` writes nothing and exits with 1 if the file differs from what would be drawn.
"""

import argparse
import ast
import sys
from html import escape
from pathlib import Path

import networkx

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
GROUND = {"errors", "files", "images", "locks", "config", "hooks", "processes", "progress", "intervals", "random_state"}
SHIMS = {"_moved", "regulation", "checkpoint", "prompts", "predict", "__init__", "__main__"}
WIDTH, HEIGHT, GAP_X, GAP_Y = 250, 54, 40, 46


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
    """Return the picture as SVG."""
    files = sources()
    if unplaced := set(files).difference(*LAYERS):
        sys.exit(f"scripts/draw_architecture.py: expected every package in LAYERS, found {', '.join(sorted(unplaced))}")
    total = max(map(len, LAYERS)) * (WIDTH + GAP_X) + GAP_X
    place: dict[str, tuple[float, float]] = {}
    boxes: list[str] = []
    for row, layer in enumerate(LAYERS):
        present = {name: title for name, title in layer.items() if name in files}
        left = (total - len(present) * (WIDTH + GAP_X) + GAP_X) / 2
        for column, (name, title) in enumerate(present.items()):
            x, y = left + column * (WIDTH + GAP_X), 20 + row * (HEIGHT + GAP_Y)
            place[name] = x + WIDTH / 2, y
            boxes.append(
                f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
                f'<text x="{x + WIDTH / 2:g}" y="{y + 22:g}" class="name">{escape(name)}</text>'
                f'<text x="{x + WIDTH / 2:g}" y="{y + 41:g}">{escape(title)}</text>'
            )
    curves = [
        f'<path d="M{place[a][0]:g} {place[a][1] + HEIGHT:g} C{place[a][0]:g} {place[a][1] + HEIGHT + 26:g} '
        f'{place[b][0]:g} {place[b][1] - 26:g} {place[b][0]:g} {place[b][1] - 3:g}"/>'
        for a, b in arrows(files)
    ]
    bottom = 20 + len(LAYERS) * (HEIGHT + GAP_Y)
    style = (
        "svg{background:#fff}rect{fill:#eef3fb;stroke:#4a6fa5}text{font:13px sans-serif;text-anchor:middle;fill:#333}"
        ".name{font-weight:bold;font-size:15px;fill:#111}"
        "path{fill:none;stroke:#8a97a8;stroke-width:1.3;marker-end:url(#tip)}"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<polygon points="0,0 8,4 0,8" fill="#8a97a8"/></marker>'
    )
    body = "\n".join([f"<style>{style}</style>", f"<defs>{tip}</defs>", *curves, *boxes])
    size = f'viewBox="0 0 {total:g} {bottom:g}" width="{total:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


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
