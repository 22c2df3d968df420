"""Put the tables of `gram report` into docs/results/emoji-world.md, between `<!-- table N -->` and `<!-- end -->`.

`<!-- table 0 -->` holds the controls and variants, which are in no table of the paper, without rows that have no run.

    gram report DIR/output --collect docs/results/emoji.json
    python scripts/experiments/fill_results.py             # --check: say whether the page is as the results are
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
NO_RUN = re.compile(r"^\|[^|]*\|[^|]*(\| missing +)+\|$")  # a row of which every cell is missing
PLACE = re.compile(r"(<!-- table (\d) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, results: Path) -> str:
    """Return the page with every table as the results give it."""
    return PLACE.sub(lambda place: f"{place[1]}\n{table(place[2], results)}\n\n{place[3]}", page)


def table(number: str, results: Path) -> str:
    """Return table `number` as Markdown; 0 is the controls."""
    from gram_meta.cli import main

    wanted = ["--table", number] if number != "0" else []
    text = io.StringIO()
    with redirect_stdout(text):
        status = main(["report", str(results), *wanted, "--format", "markdown"])
    if status:
        raise SystemExit(status)
    tables = text.getvalue().strip()
    if wanted:
        return tables
    controls = tables[tables.index("**Controls and variants") :].splitlines()
    return "\n".join(line for line in controls if not NO_RUN.search(line))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is out of date")
    args = parser.parse_args()
    path = DOCS / "results/emoji-world.md"
    page = path.read_text(encoding="utf-8")
    now = filled(page, DOCS / "results/emoji.json")
    if args.check:
        print("up to date" if now == page else f"{path}: tables differ from docs/results/emoji.json")
        return int(now != page)
    path.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
